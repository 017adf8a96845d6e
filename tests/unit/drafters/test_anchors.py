import pytest
import torch

from drafters.anchors import (
    Anchors,
    PackedBlocks,
    anchor_candidates,
    block_inputs,
    draw_anchors,
    seeded_generators,
    supervise,
)
from drafters.batch import Span

#                          0  1  2  3  4  5  6  7
LOSS_MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1, 0, 0]])
INPUT_IDS = torch.arange(10, 26).view(2, 8)


def test_candidates_are_supervised_with_a_supervised_successor():
    assert anchor_candidates(LOSS_MASK).nonzero().tolist() == [[0, 1], [0, 2], [0, 5], [0, 6], [1, 4]]


def test_last_position_is_no_candidate():
    assert anchor_candidates(torch.ones(1, 3)).tolist() == [[True, True, False]]


def test_draw_takes_all_candidates_ascending_when_they_suffice():
    drawn = draw_anchors(LOSS_MASK, 10, seeded_generators([1, 2], 2))
    assert drawn.positions.tolist() == [[1, 2, 5, 6], [4, 0, 0, 0]]
    assert drawn.keep.tolist() == [[True] * 4, [True, False, False, False]]


def test_draw_takes_num_anchors_distinct_candidates_ascending_when_there_are_more():
    drawn = draw_anchors(torch.ones(1, 50), 8, seeded_generators([5], 1))
    places = drawn.positions[0].tolist()
    assert len(set(places)) == 8
    assert places == sorted(places)
    assert drawn.keep.all()


def test_draw_without_candidates_gives_one_dummy():
    drawn = draw_anchors(torch.zeros(1, 4), 3, seeded_generators([1], 1))
    assert drawn.positions.tolist() == [[0]]
    assert drawn.keep.tolist() == [[False]]


def test_draw_of_a_row_depends_on_its_seed_alone():
    mask = torch.ones(1, 40)
    alone = draw_anchors(mask, 6, seeded_generators([11], 1)).positions[0]
    among = draw_anchors(torch.ones(3, 60) * (torch.arange(60) < 40), 6, seeded_generators([4, 11, 9], 3)).positions
    assert torch.equal(among[1], alone)
    assert not torch.equal(among[0], alone)


def test_seeds_must_be_one_a_row():
    with pytest.raises(ValueError, match="1 anchor seeds for 2 rows"):
        seeded_generators([1], 2)


def test_seeds_come_from_the_global_generator_when_none_are_given():
    torch.manual_seed(3)
    first = [generator.initial_seed() for generator in seeded_generators(None, 2)]
    torch.manual_seed(3)
    assert [generator.initial_seed() for generator in seeded_generators(None, 2)] == first


def test_block_inputs_are_the_anchor_token_then_masks():
    assert block_inputs(torch.tensor([12, 15]), 3, 99).tolist() == [[12, 99, 99], [15, 99, 99]]


def test_supervision_ends_at_the_first_unsupervised_label_and_at_the_end_of_the_row():
    anchors = Anchors(torch.tensor([[1, 6], [4, 0]]), torch.tensor([[True, True], [True, False]]))
    slots = supervise(INPUT_IDS, LOSS_MASK, anchors, 4, [Span(0, 8), Span(8, 16)])
    # anchor 1: labels at 2, 3, 4 (unsupervised), 5 (supervised, but after a gap); anchor 6: 7, then past the end
    assert slots.labels.tolist() == [[[12, 13, 14, 15], [17, 17, 17, 17]], [[23, 24, 25, 25], [18, 18, 18, 18]]]
    assert slots.target_rows.tolist() == [[[1, 2, 3, 4], [6, 6, 6, 6]], [[12, 13, 14, 14], [8, 8, 8, 8]]]
    assert slots.eval_mask.int().tolist() == [
        [[1, 1, 0, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [0, 0, 0, 0]],
    ]


def test_supervision_of_packed_samples_ends_with_the_sample():
    ids, mask = torch.arange(10, 19)[None], torch.ones(1, 9)
    anchors = Anchors(torch.tensor([[3], [1]]), torch.ones(2, 1, dtype=torch.bool))
    slots = supervise(ids, mask, anchors, 2, [Span(0, 5), Span(5, 9)])
    assert slots.labels.tolist() == [[[14, 14]], [[17, 18]]]
    assert slots.target_rows.tolist() == [[[3, 3]], [[6, 7]]]
    assert slots.eval_mask.tolist() == [[[True, False]], [[True, True]]]


SAMPLES = [Span(0, 5), Span(5, 8)]


def test_anchors_inside_their_samples_are_taken_as_they_are():
    anchors = Anchors(torch.tensor([[1, 4], [2, 0]]), torch.tensor([[True, True], [True, False]]))
    assert anchors.checked(SAMPLES) is anchors


@pytest.mark.parametrize(
    ("positions", "keep", "message"),
    [
        ([[1], [3]], [[True], [True]], "anchor 3 of sample 1 is none of its 3 positions"),
        ([[-1], [2]], [[True], [True]], "anchor -1 of sample 0 is none of its 5 positions"),
        ([[1]], [[True]], r"\[1, 1\] positions and \[1, 1\] keep, but both must be \[B, A\] with B 2"),
        ([[1], [2]], [[True, True], [True, True]], r"\[2, 1\] positions and \[2, 2\] keep"),
        ([[], []], [[], []], "A at least 1"),
    ],
)
def test_anchors_that_are_not_of_their_samples_are_refused(positions, keep, message):
    with pytest.raises(ValueError, match=message):
        Anchors(torch.tensor(positions), torch.tensor(keep)).checked(SAMPLES)


def test_packed_blocks_see_the_rows_before_their_anchor_of_their_own_sample():
    anchors = Anchors(
        torch.tensor([[2, 4], [0, 0], [3, 0]]), torch.tensor([[True, True], [False, False], [True, False]])
    )
    blocks = PackedBlocks.of(anchors, [Span(0, 8), Span(8, 16), Span(16, 24)])
    assert blocks.chosen.tolist() == [0, 1, 4]
    assert blocks.anchors.tolist() == [2, 4, 3]
    assert blocks.anchor_rows.tolist() == [2, 4, 19]
    assert blocks.context_rows.tolist() == [0, 1, 2, 3, 16, 17, 18]
    assert blocks.context_positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert blocks.spans == (Span(0, 2), Span(0, 4), Span(4, 7))


def test_without_a_kept_anchor_one_dummy_block_remains():
    anchors = Anchors(torch.tensor([[3], [2]]), torch.zeros(2, 1, dtype=torch.bool))
    blocks = PackedBlocks.of(anchors, [Span(0, 8), Span(8, 16)])
    assert blocks.chosen.tolist() == [0]
    assert blocks.context_rows.tolist() == [0]
    assert blocks.spans == (Span(0, 0),)
