import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from drafters.attention import BlockLayout
from drafters.batch import Span
from drafters.eagle3_attention import StepLayout
from drafters.flex import TILE, attend_spans, span_masks, uses_flex
from drafters.key_values import KeyValues

CPU = torch.device("cpu")


def tiles_of(counts, indices):
    return {
        (row, key) for row, count in enumerate(counts[0, 0].tolist()) for key in indices[0, 0, row, :count].tolist()
    }


def causal_spans(*samples):
    """Eagle3's: the last queries of each sample of (keys, queries), each up to its own key."""
    rows, start = [], 0
    for num_keys, num_queries in samples:
        rows += [(start, start + place + 1) for place in range(num_keys - num_queries, num_keys)]
        start += num_keys
    return torch.tensor(rows, dtype=torch.int32), start, 1


def block_spans(*samples):
    """DSpark's: blocks of 4 of each sample of (context rows, blocks), at ascending anchors."""
    rows, start = [], 0
    for length, num_blocks in samples:
        anchors = torch.randperm(length + 1)[:num_blocks].sort().values.tolist()
        rows += [(start, start + anchor) for anchor in anchors]
        start += length
    return torch.tensor(rows, dtype=torch.int32), start, 4


@pytest.mark.parametrize(("device", "flex"), [("cuda", True), ("cuda:1", True), ("cpu", False), ("meta", False)])
def test_flex_attention_is_for_gpus(device, flex):
    assert uses_flex(torch.device(device)) is flex


def test_a_cpu_gets_no_masks():
    assert BlockLayout.of_spans([Span(0, 5)], 5, 4, CPU).mask is None
    assert StepLayout.of_spans([Span(0, 5)], 3, CPU).masks is None


def test_a_gpu_gets_masks(eager_flex):
    assert BlockLayout.of_spans([Span(0, 5)], 5, 4, CPU).mask is not None
    assert StepLayout.of_spans([Span(0, 5)], 3, CPU).masks is not None


@pytest.mark.parametrize(
    ("spans", "copies"),
    [
        (block_spans((300, 70)), (1,)),
        (block_spans((130, 40), (700, 40), (5, 2)), (1,)),
        (block_spans((20, 1)), (0, 1, 3)),
        (causal_spans((1, 1)), range(3)),
        (causal_spans((300, 300)), range(4)),
        (causal_spans((900, 130), (1, 1), (2 * TILE, TILE), (40, 3)), range(4)),
    ],
)
def test_tiles_are_those_that_the_mask_of_single_keys_gives(spans, copies):
    rows, num_context, block_size = spans
    num_queries = len(rows) * block_size
    masks = span_masks(rows, num_context, block_size, copies=copies, device=CPU)
    for mask, num_copies in zip(masks, copies, strict=True):
        num_keys = num_context + num_copies * num_queries
        assert mask.seq_lengths == (num_queries, num_keys)
        expected = create_block_mask(mask.mask_mod, 1, 1, num_queries, num_keys, device="cpu")
        assert tiles_of(mask.kv_num_blocks, mask.kv_indices) == tiles_of(expected.kv_num_blocks, expected.kv_indices)
        assert tiles_of(mask.full_kv_num_blocks, mask.full_kv_indices) == tiles_of(
            expected.full_kv_num_blocks, expected.full_kv_indices
        )


def test_a_query_sees_its_span_and_its_own_block_of_every_copy():
    rows, num_context, block_size, copies = torch.tensor([(0, 2), (1, 3)], dtype=torch.int32), 4, 2, (0, 1, 2)
    masks = span_masks(rows, num_context, block_size, copies=copies, device=CPU)
    for mask, num_copies in zip(masks, copies, strict=True):
        queries, keys = torch.arange(4)[:, None], torch.arange(num_context + 4 * num_copies)
        seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), queries, keys).int().tolist()
        assert seen[0] == seen[1] == [1, 1, 0, 0] + [1, 1, 0, 0] * num_copies
        assert seen[2] == seen[3] == [0, 1, 1, 0] + [0, 0, 1, 1] * num_copies


def test_masks_of_all_steps_share_what_single_queries_see():
    rows, num_context, block_size = causal_spans((50, 20))
    assert len({mask.mask_mod for mask in span_masks(rows, num_context, block_size, copies=range(7), device=CPU)}) == 1


def test_other_lengths_compile_nothing_anew(monkeypatch):
    """Lengths in a kernel would make one a batch: too many to compile, and more than torch lets there be."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True, backend=count)
    monkeypatch.setattr("drafters.flex._compiled_flex", lambda: attend)
    compiled = []
    for num_keys, num_queries in ((700, 300), (1301, 600), (555, 399), (2000, 1999)):
        rows, num_context, block_size = causal_spans((num_keys, num_queries), (90, 40))
        queries = torch.randn(1, 4, len(rows), 8)
        pieces = [KeyValues(*torch.randn(2, 1, 2, length, 8)) for length in (num_context, len(rows), len(rows))]
        for step, mask in enumerate(span_masks(rows, num_context, block_size, copies=range(3), device=CPU)):
            attend_spans(queries, pieces[: step + 1], mask, 0.3)
        compiled.append(len(graphs))
    assert compiled[0] > 0
    assert compiled[1:] == [compiled[1]] * 3
    assert compiled[1] <= compiled[0] + 1
