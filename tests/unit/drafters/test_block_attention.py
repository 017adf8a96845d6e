import pytest
import torch

from drafters.attention import GROUP_QUERIES, BlockLayout, attend_blocks
from drafters.batch import Span
from drafters.key_values import KeyValues

CPU = torch.device("cpu")
BLOCK = 4


def random_spans(*samples):
    """Spans of samples of (context rows, blocks): contexts end to end, anchors drawn and ascending."""
    spans, start = [], 0
    for length, num_blocks in samples:
        anchors = torch.randperm(length + 1)[:num_blocks].sort().values.tolist()
        spans += [Span(start, start + anchor) for anchor in anchors]
        start += length
    return spans, start


def random_rows(num_blocks, num_context, heads=4, key_heads=2, dtype=torch.float32):
    def rows(count, length):
        return torch.randn(1, count, length, 8).to(dtype).requires_grad_()

    own, context = num_blocks * BLOCK, num_context
    return (
        rows(heads, own),
        KeyValues(rows(key_heads, context), rows(key_heads, context)),
        KeyValues(rows(key_heads, own), rows(key_heads, own)),
    )


def plain_attention(queries, context, block, spans, scale):
    """One block at a time over exactly the keys that it may see."""
    repeats = queries.shape[1] // block.keys.shape[1]
    outputs = []
    for number, (start, end) in enumerate(spans):
        own = slice(number * BLOCK, (number + 1) * BLOCK)
        keys, values = (
            torch.cat([rows[:, :, start:end], mine[:, :, own]], dim=2).repeat_interleave(repeats, dim=1)
            for rows, mine in zip(context, block, strict=True)
        )
        outputs.append((queries[:, :, own] @ keys.transpose(2, 3) * scale).softmax(-1) @ values)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "samples", [[(50, 3)], [(30, 2), (1, 1), (41, 5)], [(90, 2 * GROUP_QUERIES // BLOCK + 1), (9, 3)]]
)
def test_output_and_gradients_equal_plain_attention(samples, key_heads):
    torch.manual_seed(len(samples))
    spans, num_context = random_spans(*samples)
    queries, context, block = random_rows(len(spans), num_context, key_heads=key_heads)
    ours = attend_blocks(queries, context, block, BlockLayout.of_spans(spans, num_context, BLOCK, CPU), 0.3)
    theirs = plain_attention(queries, context, block, spans, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    leaves, direction = (queries, *context, *block), torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_block_without_context_sees_itself_alone():
    queries, context, block = random_rows(2, 5)
    layout = BlockLayout.of_spans([Span(0, 0), Span(0, 3)], 5, BLOCK, CPU)
    output = attend_blocks(queries, context, block, layout, 0.3)
    moved = KeyValues(context.keys + 1, context.values + 1)
    again = attend_blocks(queries, moved, block, layout, 0.3)
    assert torch.equal(output[:, :, :BLOCK], again[:, :, :BLOCK])
    assert not torch.allclose(output[:, :, BLOCK:], again[:, :, BLOCK:])


def test_one_block_sees_the_whole_context():
    queries, context, block = random_rows(1, 7)
    ours = attend_blocks(queries, context, block, BlockLayout.of_spans([Span(0, 7)], 7, BLOCK, CPU), 0.3)
    torch.testing.assert_close(ours, plain_attention(queries, context, block, [Span(0, 7)], 0.3))


def test_bf16_attends_in_float32():
    spans, num_context = random_spans((30, 4))
    queries, context, block = random_rows(4, num_context, dtype=torch.bfloat16)
    layout = BlockLayout.of_spans(spans, num_context, BLOCK, CPU)
    ours = attend_blocks(queries, context, block, layout, 0.3)
    exact = plain_attention(
        queries.float(), KeyValues(*(x.float() for x in context)), KeyValues(*(x.float() for x in block)), spans, 0.3
    )
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=1e-2, atol=1e-3)
    ours.sum().backward()
    assert queries.grad.dtype == context.keys.grad.dtype == block.values.grad.dtype == torch.bfloat16


def test_groups_take_blocks_of_one_sample_and_no_context_beyond_their_last_anchor():
    size = GROUP_QUERIES // BLOCK
    spans = [Span(0, end) for end in range(2 * size)] + [Span(100, 103)]
    groups = BlockLayout.of_spans(spans, 200, BLOCK, CPU).groups
    assert [(group.first, group.last) for group in groups] == [(0, size), (size, 2 * size), (2 * size, 2 * size + 1)]
    assert [group.span for group in groups] == [(0, size - 1), (0, 2 * size - 1), (100, 103)]
    assert (groups[0].bias == 0).sum(2).flatten().tolist() == list(range(size))
    assert groups[2].bias is None


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("samples", [[(300, 70)], [(130, 40), (700, 40), (5, 2)], [(20, 1)]])
def test_flex_attention_computes_the_same(samples, key_heads, eager_flex):
    torch.manual_seed(2)
    spans, num_context = random_spans(*samples)
    queries, context, block = random_rows(len(spans), num_context, key_heads=key_heads)
    layout = BlockLayout.of_spans(spans, num_context, BLOCK, CPU)
    assert layout.mask is not None
    ours = attend_blocks(queries, context, block, layout, 0.3)
    theirs = plain_attention(queries, context, block, spans, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    leaves, direction = (queries, *context, *block), torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
