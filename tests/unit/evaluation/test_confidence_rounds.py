from __future__ import annotations

import numpy as np
import pytest
from confidence_rounds import Decoded, rounds_of

from evaluation.confidence.rounds import Rounds, clamped, confidences, survival


def test_rounds_of_samples_stand_in_order() -> None:
    first = Decoded([2, 1], [2, 2], [1, 0], [[0.5, 1.0], [1.5, 2.0]])
    ended_at_once = Decoded([], [], [], None)
    second = Decoded([3], [2], [2], [[2.5, 3.0]])
    rounds = Rounds.of_samples([first, ended_at_once, second])
    assert rounds.logits.tolist() == [[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]]
    assert (rounds.proposed.tolist(), rounds.accepted.tolist()) == ([2, 2, 2], [1, 0, 2])
    assert rounds.committed.tolist() == [2, 1, 3]
    assert (rounds.num_rounds, rounds.num_drafts) == (3, 2)


def test_rounds_without_confidences_are_refused() -> None:
    with pytest.raises(ValueError, match="no confidence head"):
        Rounds.of_samples([Decoded([1], [2], [0], None)])


def test_samples_without_a_round_are_refused() -> None:
    with pytest.raises(ValueError, match="no round was decoded"):
        Rounds.of_samples([Decoded([], [], [], None)])


def test_survival_is_the_cumulative_product_of_tempered_confidences() -> None:
    logits = np.array([[0.0, np.log(4.0)], [np.log(3.0), 0.0]])
    np.testing.assert_allclose(survival(logits), [[0.5, 0.5 * 0.8], [0.75, 0.75 * 0.5]])
    # Halving log 4 and log 3: odds of 2 and √3.
    root = np.sqrt(3.0)
    np.testing.assert_allclose(
        survival(logits, [2.0, 2.0]), [[0.5, 0.5 * 2 / 3], [root / (1 + root), 0.5 * root / (1 + root)]]
    )


def test_confidences_of_huge_logits_do_not_overflow() -> None:
    with np.errstate(over="raise"):
        assert confidences(np.array([[-1000.0, 1000.0]])).tolist() == [[0.0, 1.0]]
    assert clamped(np.array([0.0, 0.25, 1.0])).tolist() == [1e-8, 0.25, 1 - 1e-8]


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [
        ([0, 0, 0], [1, 1, 1]),
        ([1, 1, 1], [2, 2, 1]),
        ([2, 2, 2], [3, 2, 1]),
        ([3, 3, 3], [4, 2, 1]),
        ([3, 0, 2], [4, 1, 1]),
    ],
)
def test_cut_rounds_keep_the_verdicts_of_what_is_left(lengths: list[int], tokens: list[int]) -> None:
    rounds = rounds_of([[0.5] * 3] * 3, accepted=[3, 1, 0])
    assert rounds.committed_if_cut(np.array(lengths)).tolist() == tokens


def test_round_that_a_stop_token_ended_gains_no_bonus_token() -> None:
    # The second draft is the stop token: it ends the round with two tokens, drafted or chosen by the target.
    rounds = Rounds(np.zeros((1, 3)), np.array([2]), np.array([2]), np.array([2]))
    assert [int(rounds.committed_if_cut(np.array([cut]))[0]) for cut in range(4)] == [1, 2, 2, 2]
