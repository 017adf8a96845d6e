from __future__ import annotations

from dataclasses import replace

import pytest

from services.dashboard.bottleneck import Load, Verdict
from services.dashboard.bottleneck import find_bottleneck as find

LOAD = Load(
    run="qwen-1", wait_fraction=0.35, fill=0.04, capture_tokens_per_s=900.0, train_tokens_per_s=900.0,
    num_serving=2, num_targets=2,
)  # fmt: skip


def find_bottleneck(load: Load) -> Verdict:
    """The verdict with ordinary spaces."""
    verdict = find(load)
    return replace(verdict, text=verdict.text.replace("\N{NO-BREAK SPACE}", " "))


def test_waiting_beside_an_empty_buffer_is_capture() -> None:
    verdict = find_bottleneck(LOAD)
    assert verdict.who == "capture"
    assert (
        verdict.text
        == "The trainer waits 35 % of its time and the buffer is nearly empty (4 %): capture is the bottleneck."
    )
    assert (verdict.advice, verdict.command) == ("Add targets:", "slipstream scale qwen-1 targets=3")


@pytest.mark.parametrize(
    ("num_targets", "wait", "wanted"),
    [(1, 0.12, 2), (4, 0.5, 8), (10, 0.2, 12), (3, 0.9, 6), (2, 1.0, 4)],  # n / (1 − wait), at most twice as many
)
def test_advice_is_enough_targets_to_end_the_wait(num_targets: int, wait: float, wanted: int) -> None:
    load = replace(LOAD, wait_fraction=wait, num_targets=num_targets, num_serving=num_targets)
    assert find_bottleneck(load).command == f"slipstream scale qwen-1 targets={wanted}"


@pytest.mark.parametrize(("wait", "fill"), [(0.35, 0.04), (0.0, 0.97)])
def test_run_that_scales_itself_gets_no_advice_to_scale(wait: float, fill: float) -> None:
    verdict = find_bottleneck(replace(LOAD, wait_fraction=wait, fill=fill, autoscaling="1 to 4"))
    assert verdict.command == ""
    assert "by itself (1 to 4)" in verdict.advice


def test_waiting_beside_a_filled_buffer_is_the_stream() -> None:
    verdict = find_bottleneck(replace(LOAD, fill=0.6))
    assert verdict.who == "stream"
    assert "although the buffer is 60 % full" in verdict.text
    assert verdict.command == ""


def test_never_waiting_beside_a_full_buffer_is_training_and_targets_are_to_spare() -> None:
    verdict = find_bottleneck(replace(LOAD, wait_fraction=0.0, fill=0.97))
    assert verdict.who == "train"
    assert "always busy" in verdict.text
    assert "97 % full" in verdict.text
    assert verdict.command == "slipstream scale qwen-1 targets=1"


def test_last_target_is_never_advised_away() -> None:
    verdict = find_bottleneck(replace(LOAD, wait_fraction=0.02, fill=0.97, num_targets=1, num_serving=1))
    assert verdict.who == "train"
    assert verdict.command == ""


def test_busy_trainer_with_room_in_the_buffer_needs_nothing() -> None:
    verdict = find_bottleneck(replace(LOAD, wait_fraction=0.05, fill=0.5))
    assert (verdict.who, verdict.advice) == ("train", "")
    assert "capture keeps up" in verdict.text


def test_targets_that_do_not_serve_are_named_before_more_are_advised() -> None:
    verdict = find_bottleneck(replace(LOAD, num_serving=1, missing="target 1 is pending: needs 1 GPU, 0 free"))
    assert verdict.who == "capture"
    assert "only 1 of 2 targets serve" in verdict.text
    assert verdict.advice == "target 1 is pending: needs 1 GPU, 0 free"
    assert verdict.command == ""


def test_no_serving_target_is_said_even_before_the_first_step() -> None:
    verdict = find_bottleneck(replace(LOAD, wait_fraction=None, num_serving=0, missing="target 0 is silent"))
    assert (verdict.who, verdict.advice) == ("capture", "target 0 is silent")


def test_nobody_is_blamed_before_the_first_step() -> None:
    assert find_bottleneck(replace(LOAD, wait_fraction=None)).who is None
