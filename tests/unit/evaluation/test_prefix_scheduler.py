from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.confidence.scheduler import StepsPerSecond, schedule

Policy = Callable[[Sequence[Sequence[float]], StepsPerSecond], list[int]]


def table(*steps_per_s: float) -> StepsPerSecond:
    """SPS of 1, 2, … tokens."""
    return lambda num_tokens: steps_per_s[num_tokens - 1]


def search_everything(survival: Sequence[Sequence[float]], steps_per_s: StepsPerSecond) -> list[int]:
    """The lengths of greatest expected throughput, whatever they look at."""
    num_requests = len(survival)

    def throughput(lengths: Sequence[int]) -> float:
        expected = num_requests + sum(sum(row[:length]) for row, length in zip(survival, lengths, strict=True))
        return expected * steps_per_s(num_requests + sum(lengths))

    return list(max(product(*(range(len(row) + 1) for row in survival)), key=throughput))


def first_token(policy: Policy) -> tuple[float, float]:
    """Distribution of the first token that one request outputs, whose length a policy chooses after two drafts.

    The target samples A with 0.7 and B with 0.3, the drafter each with 0.5, and takes 0.8 for the probability that its
    first draft is accepted. If that is A, it is certain of the second; if B, it gives the second no chance.
    """
    p_target, p_draft, second = (0.7, 0.3), (0.5, 0.5), (1.0, 0.0)
    steps_per_s = table(1.0, 0.5, 0.45)
    residual = [max(0.0, target - draft) for target, draft in zip(p_target, p_draft, strict=True)]
    output = [0.0, 0.0]
    for draft in (0, 1):
        [length] = policy([[0.8, 0.8 * second[draft]]], steps_per_s)
        if length == 0:
            for token in (0, 1):
                output[token] += p_draft[draft] * p_target[token]
            continue
        accepted = min(1.0, p_target[draft] / p_draft[draft])
        output[draft] += p_draft[draft] * accepted
        for token in (0, 1):
            output[token] += p_draft[draft] * (1 - accepted) * residual[token] / sum(residual)
    return output[0], output[1]


def test_early_stop_outputs_the_targets_distribution_where_a_search_does_not() -> None:
    assert first_token(schedule) == pytest.approx((0.7, 0.3))
    assert first_token(search_everything) == pytest.approx((0.85, 0.15))


def test_early_stop_passes_over_a_later_gain() -> None:
    # Θ: 1 · 1.0, 1.8 · 0.5, 2.6 · 0.45. The last is best, the second is not.
    survival, steps_per_s = [[0.8, 0.8]], table(1.0, 0.5, 0.45)
    assert schedule(survival, steps_per_s) == [0]
    assert search_everything(survival, steps_per_s) == [2]


def test_drafts_are_admitted_by_falling_survival_while_throughput_grows() -> None:
    # B and τ start at 2 requests. Θ: 2·1.0, 2.9·0.9, 3.7·0.8, 4.3·0.7, 4.8·0.62: 2, 2.61, 2.96, 3.01, 2.976.
    survival = [[0.9, 0.6, 0.1], [0.8, 0.5]]
    assert schedule(survival, table(9.0, 1.0, 0.9, 0.8, 0.7, 0.62, 0.1)) == [2, 1]


def test_tie_stops() -> None:
    # Θ: 1 · 1.0, 1.5 · (2/3).
    assert schedule([[0.5, 0.5]], table(3.0, 2.0, 2.0)) == [0]
    assert schedule([[0.5, 0.5]], table(3.0, 2.0 + 1e-9, 2.0)) == [2]


def test_first_b_is_the_number_of_requests() -> None:
    asked: list[int] = []

    def steps_per_s(num_tokens: int) -> float:
        asked.append(num_tokens)
        return 1.0

    assert schedule([[0.5], [0.5], [0.5]], steps_per_s) == [1, 1, 1]
    assert asked == [3, 4, 5, 6]


def test_drafts_without_a_chance_are_left_out_however_cheap_they_are() -> None:
    # More tokens are quicker here, so every candidate would be admitted.
    assert schedule([[0.5, 0.0, 0.0], [0.0]], lambda num_tokens: float(num_tokens)) == [1, 0]


def test_equal_survival_admits_the_earlier_draft_of_a_request() -> None:
    # Only three drafts pay: the first of each request, and then the second of the first.
    cost = {2: 1.0, 3: 0.9, 4: 0.8, 5: 0.75, 6: 0.1}
    assert schedule([[0.9, 0.9], [0.9, 0.9]], cost.__getitem__) == [2, 1]


def test_no_request_and_no_draft() -> None:
    assert schedule([], lambda num_tokens: 1.0) == []
    assert schedule([[], []], lambda num_tokens: 1.0) == [0, 0]


def test_survival_that_rises_is_refused() -> None:
    with pytest.raises(ValueError, match=r"survival of request 1 rises .* give cumulative products"):
        schedule([[0.5], [0.5, 0.6]], lambda num_tokens: 1.0)


ROWS = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), max_size=4).map(lambda row: sorted(row, reverse=True)),
    min_size=1,
    max_size=4,
)
TABLES = st.lists(st.floats(0.01, 10.0), min_size=20, max_size=20)


@given(ROWS, TABLES)
def test_lengths_are_those_of_the_leading_candidates(survival: list[list[float]], speeds: list[float]) -> None:
    lengths = schedule(survival, table(*speeds))
    assert all(0 <= length <= len(row) for length, row in zip(lengths, survival, strict=True))
    admitted = [value for row, length in zip(survival, lengths, strict=True) for value in row[:length]]
    rest = [value for row, length in zip(survival, lengths, strict=True) for value in row[length:]]
    assert 0.0 not in admitted
    # Whatever is left out is no likelier than what is admitted, so every request's lengths are a prefix of the order.
    assert not admitted or not rest or min(admitted) >= max(rest)


@given(ROWS, TABLES)
def test_throughput_grows_with_every_draft_and_would_not_with_the_next(
    survival: list[list[float]], speeds: list[float]
) -> None:
    steps_per_s = table(*speeds)
    num_admitted = sum(schedule(survival, steps_per_s))
    ordered = sorted((value for row in survival for value in row if value > 0), reverse=True)
    expected, throughputs = float(len(survival)), []
    for count in range(len(ordered) + 1):
        throughputs.append(expected * steps_per_s(len(survival) + count))
        if count < len(ordered):
            expected += ordered[count]
    grows = [later > earlier for earlier, later in pairwise(throughputs)]
    assert all(grows[:num_admitted])
    assert num_admitted == len(ordered) or not grows[num_admitted]


@given(ROWS, TABLES, st.data())
def test_what_is_admitted_of_a_request_does_not_depend_on_its_later_drafts(
    survival: list[list[float]], speeds: list[float], data: st.DataObject
) -> None:
    """The property that makes it lossless: whether draft j is verified is known before draft j is drawn."""
    steps_per_s = table(*speeds)
    request = data.draw(st.integers(0, len(survival) - 1))
    row = survival[request]
    known = data.draw(st.integers(0, len(row)))
    limit = row[known - 1] if known else 1.0
    others = [data.draw(st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.9, 1.0])) for _ in row[known:]]
    changed = [*survival]
    changed[request] = row[:known] + sorted((min(value, limit) for value in others), reverse=True)
    before, after = schedule(survival, steps_per_s)[request], schedule(changed, steps_per_s)[request]
    assert min(before, known) == min(after, known)
