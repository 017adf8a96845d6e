import pytest
import torch

from drafters.anchors import Anchors
from drafters.attention import GROUP_QUERIES, BlockLayout, KeyValues, attend_blocks

CPU = torch.device("cpu")


def plain_attention(queries, context, block, anchors, block_size, scale):
    """One query at a time over exactly the keys it may see."""
    repeats = queries.shape[1] // block.keys.shape[1]
    output = torch.zeros_like(queries)
    for row in range(queries.shape[0]):
        for query in range(queries.shape[2]):
            number = query // block_size
            if not anchors.keep[row, number]:
                continue
            before, own = int(anchors.positions[row, number]), slice(number * block_size, (number + 1) * block_size)
            for head in range(queries.shape[1]):
                shared = head // repeats
                keys = torch.cat([context.keys[row, shared, :before], block.keys[row, shared, own]])
                values = torch.cat([context.values[row, shared, :before], block.values[row, shared, own]])
                output[row, head, query] = (keys @ queries[row, head, query] * scale).softmax(0) @ values
    return output


@pytest.mark.parametrize("num_blocks", [1, 3, 2 * GROUP_QUERIES // 4 + 1])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_blocks_see_context_before_their_anchor_and_their_own_block_only(num_blocks, key_heads):
    torch.manual_seed(num_blocks)
    block_size, length = 4, 50
    positions = torch.stack([torch.randperm(length)[:num_blocks].sort().values for _ in range(2)])
    keep = torch.ones(2, num_blocks, dtype=torch.bool)
    keep[1, -1] = False
    positions[1, -1] = 0
    anchors = Anchors(positions, keep)
    queries = torch.randn(2, 2, num_blocks * block_size, 8)
    context = KeyValues(*torch.randn(2, 2, key_heads, length, 8))
    block = KeyValues(*torch.randn(2, 2, key_heads, num_blocks * block_size, 8))
    layout = BlockLayout.of_anchors(anchors, block_size, CPU)
    ours = attend_blocks(queries, context, block, layout, 0.3)
    torch.testing.assert_close(ours, plain_attention(queries, context, block, anchors, block_size, 0.3))


def test_dummy_blocks_attend_to_nothing():
    anchors = Anchors(torch.tensor([[0]]), torch.tensor([[False]]))
    rows = KeyValues(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))
    output = attend_blocks(torch.randn(1, 1, 2, 4), rows, rows, BlockLayout.of_anchors(anchors, 2, CPU), 1.0)
    assert output.abs().max() == 0


def test_groups_take_no_context_beyond_their_last_anchor():
    num_blocks = 2 * GROUP_QUERIES
    anchors = Anchors(torch.arange(num_blocks)[None], torch.ones(1, num_blocks, dtype=torch.bool))
    layout = BlockLayout.of_anchors(anchors, 1, CPU)
    assert [group.num_context for group in layout.groups] == [GROUP_QUERIES - 1, 2 * GROUP_QUERIES - 1]
