"""Who is to blame: each test tells a story of captures and targets, and what follows from it."""

from __future__ import annotations

import pytest

from services.errors import (
    CaptureRequestError,
    FeatureError,
    SignatureError,
    SlipstreamError,
    TargetAccessError,
    TargetBusyError,
    TargetError,
    TargetStalledError,
    TargetUnavailableError,
    WireError,
)
from services.replay.quarantine import AGAINST_CAPTURE, AGAINST_TARGET, GONE_APART_S, WINDOW_S, Fault, Judge, fault_of

FREE = (None, None)


class Court(Judge):
    """A judge whose clock stands still unless moved, with two targets alive unless said otherwise."""

    now_s = 1000.0
    num_live = 2

    def on(self, address: str, capture: int, fault: Fault, *, against_target: bool = True) -> tuple[object, object]:
        verdict = self.fault(
            address, capture, fault, "why", self.now_s, num_live=self.num_live, against_target=against_target
        )
        return verdict.quarantine, verdict.skip


def test_every_fault_has_its_weights() -> None:
    assert set(AGAINST_TARGET) == set(AGAINST_CAPTURE) == set(Fault)


def test_one_bad_answer_of_one_target_blames_nobody() -> None:
    for fault in set(Fault) - {Fault.IDENTITY}:
        assert Court().on("a", 1, fault) == FREE


def test_target_of_other_weights_is_quarantined_at_once() -> None:
    assert Court().on("a", 1, Fault.IDENTITY) == ("it is no target of this run once: why", None)


@pytest.mark.parametrize(
    ("fault", "num_captures"),
    [(Fault.WIRE, 2), (Fault.STALLED, 2), (Fault.FEATURES, 3), (Fault.FAILED, 3), (Fault.GONE, 6)],
)
def test_target_that_fails_several_captures_is_quarantined(fault: Fault, num_captures: int) -> None:
    court = Court()
    for capture in range(num_captures - 1):
        assert court.on("a", capture, fault) == FREE
    quarantine, skip = court.on("a", 99, fault)
    assert (quarantine, skip) == (f"it {fault.value} {num_captures} times: why", None)
    assert court.quarantined() == {"a": quarantine}


def test_target_that_fails_rarely_is_kept() -> None:
    court = Court()
    for capture in range(100):
        assert court.on("a", capture, Fault.FEATURES) == FREE
        court.now_s += WINDOW_S / 2


def test_captures_that_fall_with_their_target_count_once_against_it() -> None:
    court = Court()
    assert court.on("a", 0, Fault.GONE) == FREE
    for capture in range(1, 50):
        assert court.on("a", capture, Fault.GONE, against_target=False) == FREE


@pytest.mark.parametrize(("fault", "num_targets"), [(Fault.FEATURES, 2), (Fault.FAILED, 2), (Fault.WIRE, 3)])
def test_capture_that_fails_on_several_targets_is_skipped(fault: Fault, num_targets: int) -> None:
    court = Court()
    for target in range(num_targets - 1):
        assert court.on(f"t{target}", 7, fault) == FREE
    assert court.on("last", 7, fault) == (None, f"why (on {num_targets} different targets)")


def test_guilty_capture_clears_its_targets() -> None:
    court = Court()
    court.on("a", 1, Fault.FEATURES)
    for capture in range(2, 40):
        assert court.on("a", capture, Fault.FEATURES) == FREE
        assert court.on("b", capture, Fault.FEATURES)[1] is not None
        court.ended(capture)
    assert court.quarantined() == {}


def test_capture_that_fails_twice_beside_good_ones_on_the_only_target_is_skipped() -> None:
    court = Court()
    court.num_live = 1
    assert court.on("a", 1, Fault.FEATURES) == FREE
    court.good("a", 2)
    assert court.on("a", 1, Fault.FEATURES) == (None, "why (2 times on a target that serves others)")


def test_only_target_that_does_nothing_right_is_restarted_and_then_the_capture_is_skipped() -> None:
    court = Court()
    court.num_live = 1
    assert [court.on("a", 1, Fault.FEATURES) for _ in range(2)] == [FREE] * 2
    assert court.on("a", 1, Fault.FEATURES) == ("it gave NaN or infinity 3 times: why", None)
    assert court.on("a", 1, Fault.FEATURES) == FREE, "a quarantined target is worth no word"
    assert court.on("restarted", 1, Fault.FEATURES) == FREE
    assert court.on("restarted", 1, Fault.FEATURES) == (None, "why (2 times on a target that has restarted)")


def test_target_that_breaks_after_many_good_answers_is_blamed_and_no_capture() -> None:
    court = Court()
    for capture in range(100):
        court.good("a", capture)
    found = [court.on("a", capture, Fault.FEATURES) for capture in (200, 200, 201)]
    assert found[:2] == [FREE] * 2
    assert found[2] == ("it gave NaN or infinity 3 times: why", None)


def test_good_answer_shows_that_a_slow_target_is_not_stuck() -> None:
    court = Court()
    for capture in range(10):
        assert court.on("a", capture, Fault.STALLED) == FREE
        court.good("a", 100 + capture)


def test_request_that_is_refused_is_taken_elsewhere_first() -> None:
    court = Court()
    assert court.on("a", 1, Fault.REFUSED) == FREE
    assert court.on("b", 1, Fault.REFUSED) == (None, "why (on 2 different targets)")
    court.num_live = 1
    assert court.on("a", 2, Fault.REFUSED) == (None, "why (there is no other target to ask)")


def test_target_that_refuses_what_another_takes_is_quarantined() -> None:
    court = Court()
    for capture in (1, 2):
        assert court.on("a", capture, Fault.REFUSED) == FREE
    assert court.good("b", 1).quarantine is None
    verdict = court.good("b", 2)
    assert verdict.address == "a"
    assert verdict.quarantine is not None
    assert "other targets made captures that it refused, such as 2" in verdict.quarantine


def test_capture_that_kills_its_targets_is_skipped_in_the_end() -> None:
    court = Court()
    for target in range(5):
        assert court.on(f"t{target}", 1, Fault.GONE) == FREE
        court.now_s += GONE_APART_S
    assert court.on("t5", 1, Fault.GONE) == (None, "why (on 6 different targets)")


def test_lost_node_with_many_targets_costs_no_capture() -> None:
    court = Court()
    for target in range(20):
        assert court.on(f"t{target}", 1, Fault.GONE) == FREE
        court.now_s += 0.1


def test_restarted_target_begins_with_a_clean_record() -> None:
    court = Court()
    court.on("a", 1, Fault.WIRE)
    court.forget_all_but(["b"])
    assert court.on("a", 2, Fault.WIRE) == FREE
    assert court.on("a", 3, Fault.WIRE)[0] is not None
    court.forget_all_but([])
    assert court.quarantined() == {}


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (TargetBusyError("full"), None),
        (SignatureError("other weights"), Fault.IDENTITY),
        (TargetAccessError("wrong token"), Fault.IDENTITY),
        (WireError("checksum"), Fault.WIRE),
        (TargetStalledError("nothing came"), Fault.STALLED),
        (TargetUnavailableError("reset"), Fault.GONE),
        (FeatureError("NaN"), Fault.FEATURES),
        (CaptureRequestError("too long"), Fault.REFUSED),
        (TargetError("out of memory"), Fault.FAILED),
    ],
)
def test_error_is_one_fault(error: SlipstreamError, fault: Fault | None) -> None:
    assert fault_of(error) is fault
