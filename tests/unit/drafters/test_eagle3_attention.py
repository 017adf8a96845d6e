import pytest
import torch

from drafters import eagle3_attention
from drafters.batch import Span
from drafters.eagle3_attention import StepKeys, StepLayout, attend_plainly, attend_steps
from drafters.key_values import KeyValues

HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def inputs(length, num_queries, num_later, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length + num_later)

    def rows(heads, count):
        return torch.randn(2, heads, count, SIZE, generator=generator).to(dtype).requires_grad_()

    first = KeyValues(rows(KEY_HEADS, length), rows(KEY_HEADS, length))
    later = [KeyValues(rows(KEY_HEADS, num_queries), rows(KEY_HEADS, num_queries)) for _ in range(num_later)]
    return rows(HEADS, num_queries), first, later


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, and a last one that is not full."""
    monkeypatch.setattr(eagle3_attention, "BLOCK_QUERIES", 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("num_later", [0, 1, 3])
@pytest.mark.parametrize(("length", "num_queries"), [(1, 1), (13, 13), (13, 6)])
def test_output_and_gradients_equal_the_plain_form(length, num_queries, num_later, dtype, tolerance):
    queries, first, later = inputs(length, num_queries, num_later, dtype)
    tensors = [queries, *first, *(rows for step in later for rows in step)]
    direction = torch.randn(queries.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for attend in (attend_steps, attend_plainly):
        output = attend(queries, first, later, SCALE)
        assert output.dtype == dtype
        results.append([output, *torch.autograd.grad((output * direction).sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        # a softmax over a single key has no gradient, hence the 1
        assert (ours - theirs).float().norm() < tolerance * max(1, theirs.float().norm())


def test_a_query_sees_earlier_keys_of_step_0_and_its_own_of_later_steps():
    queries, first, later = inputs(4, 4, 2)
    weights = torch.zeros(4, 4 + 2 * 4)
    for query in range(4):
        weights[query, : query + 1] = 1.0
        weights[query, [4 + query, 8 + query]] = 1.0
    values = torch.cat([first.values, *(step.values for step in later)], dim=2)
    # equal scores: every key that is seen weighs the same
    expected = (weights / weights.sum(-1, keepdim=True)) @ values.repeat_interleave(2, dim=1)
    for attend in (attend_steps, attend_plainly):
        torch.testing.assert_close(attend(queries * 0, first, later, SCALE), expected)


def test_very_large_scores_stay_finite():
    queries, first, later = inputs(7, 7, 2)
    output = attend_steps(queries * 1e4, first, later, SCALE)
    output.sum().backward()
    assert output.isfinite().all()
    assert queries.grad.isfinite().all()


def packed_rows(heads, count):
    return torch.randn(1, heads, count, SIZE).requires_grad_()


def run_packed(layout, queries, steps):
    keys, outputs = StepKeys(layout), []
    for own, rows in zip(queries, steps, strict=True):
        keys.append(rows)
        outputs.append(keys.attend(own, SCALE))
    return outputs


PACKED = [
    [Span(0, 1)],
    [Span(0, 300)],
    [Span(0, 20), Span(0, 1), Span(3, 4), Span(0, 0), Span(117, 250), Span(0, 140)],
]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("spans", PACKED)
def test_flex_attention_of_a_packed_row_equals_sample_after_sample(spans, key_heads, request):
    torch.manual_seed(len(spans))
    num_steps, device = 4, torch.device("cpu")
    num_keys, num_queries = sum(span.end for span in spans), sum(span.end - span.start for span in spans)
    queries = [packed_rows(HEADS, num_queries) for _ in range(num_steps)]
    counts = [num_keys] + [num_queries] * (num_steps - 1)
    steps = [KeyValues(packed_rows(key_heads, count), packed_rows(key_heads, count)) for count in counts]
    by_sample = StepLayout.of_spans(spans, num_steps, device)
    request.getfixturevalue("eager_flex")
    at_once = StepLayout.of_spans(spans, num_steps, device)
    assert by_sample.masks is None
    assert len(at_once.masks) == num_steps

    leaves = [*queries, *(rows for step in steps for rows in step)]
    directions = [torch.randn_like(own) for own in queries]
    results = []
    for layout in (at_once, by_sample):
        outputs = run_packed(layout, queries, steps)
        total = sum((output * direction).sum() for output, direction in zip(outputs, directions, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_samples_of_a_packed_row_do_not_see_each_other():
    spans = [Span(0, 3), Span(2, 6)]
    queries, steps = packed_rows(HEADS, 7), [KeyValues(packed_rows(2, 9), packed_rows(2, 9))]
    [output] = run_packed(StepLayout.of_spans(spans, 1, torch.device("cpu")), [queries], steps)
    second = KeyValues(*(rows[:, :, 3:] for rows in steps[0]))
    torch.testing.assert_close(output[:, :, 3:], attend_plainly(queries[:, :, 3:], second, (), SCALE))
