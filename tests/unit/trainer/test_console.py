from __future__ import annotations

import io

import pytest
from rich.console import Console

from services.contracts import Event
from services.prompts.ledger import LedgerSummary
from trainer.console import RunConsole, RunState, sparkline, summary_table
from trainer.summary import Summary
from trainer.traffic import FeatureTraffic

LEDGER = LedgerSummary(planned=1000, trained=160, skipped=3, not_reached=837, captured=162, recaptured=2, balanced=True)
SUMMARY = Summary(
    run_id="demo-1a2b3c",
    output_dir="/runs/[demo]",
    steps=20,
    resumed_from_step=None,
    final_loss=2.3456,
    accepted_length_start=1.25,
    accepted_length_start_interval=(1.2, 1.3),
    accepted_length_end=2.5,
    accepted_length_end_interval=(2.4, 2.6),
    lossless=True,
    tokens_trained=20_000,
    tokens_captured=21_000,
    peak_buffer_bytes=2 * 1024**2,
    buffer_capacity_bytes=48 * 1024**2,
    cache_bytes_avoided=30 * 1024**2,
    features=FeatureTraffic(
        streamed_bytes=10 * 1024**2,
        all_rows_bytes=30 * 1024**2,
        saved_by_rows_bytes=3 * 1024**2,
        saved_by_dtype_bytes={"fp8_e4m3": 18 * 1024**2, "fp32": -(1024**2), "bf16": 0},
    ),
    trainer_wait_fraction=0.125,
    first_step_s=31.4,
    total_s=99.6,
    ledger=LEDGER,
    checkpoint="/runs/[demo]/step_20",
    events=(),
)


def shown(summary: Summary) -> str:
    """What the command prints at the end, without colours."""
    console = RunConsole(to_stderr=False)
    console.console = Console(file=io.StringIO(), width=200, highlight=False)
    console.say(summary_table(summary))
    assert isinstance(console.console.file, io.StringIO)
    return console.console.file.getvalue()


def row(summary: Summary, label: str) -> str:
    [line] = [line for line in shown(summary).splitlines() if line.strip("│ ").startswith(label)]
    return line.strip("│ ").removeprefix(label).strip(" │")


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("τ before training", "1.25  (95 % interval 1.20 – 1.30)"),
        ("τ after training", "2.50  (95 % interval 2.40 – 2.60)  ×2.00"),
        ("greedy output", "equal to the target's own, token for token"),
        ("optimizer steps", "20"),
        ("final loss", "2.346"),
        ("tokens", "21,000 captured, 20,000 trained"),
        ("features in memory", "2.0 MiB at the peak, of 48.0 MiB allowed"),
        (
            "features streamed",
            "10.0 MiB, where all rows in bf16 are 30.0 MiB: saved 3.0 MiB by needed rows, 18.0 MiB by fp8_e4m3, "
            "1.0 MiB more for fp32",
        ),
        ("disk cache avoided", "30.0 MiB (15 × the peak)"),
        ("trainer waited", "12.5% of its time after the first step"),
        ("time", "100 s, first optimizer step after 31 s"),
        (
            "ledger of uses",
            "balanced: 1,000 planned = 160 trained + 3 skipped + 837 not reached; 162 captures, 2 of them again",
        ),
        ("drafter", "/runs/[demo]/step_20"),
    ],
)
def test_summary_table_says_what_the_summary_holds(label: str, text: str) -> None:
    assert row(SUMMARY, label) == text


def test_summary_table_of_a_run_without_evaluation_or_steps_leaves_those_rows_out() -> None:
    nothing = {
        "accepted_length_start": None, "accepted_length_end": None, "lossless": None, "final_loss": None,
        "trainer_wait_fraction": None, "first_step_s": None, "peak_buffer_bytes": 0,
    }  # fmt: skip
    summary = SUMMARY.model_copy(update=nothing)
    text = shown(summary)
    for label in ("τ", "greedy", "final loss", "waited", "first optimizer step"):
        assert label not in text
    assert row(summary, "disk cache avoided") == "30.0 MiB"


def test_summary_table_warns_of_what_is_wrong() -> None:
    summary = SUMMARY.model_copy(
        update={"lossless": False, "ledger": LEDGER.model_copy(update={"balanced": False}), "resumed_from_step": 15}
    )
    assert row(summary, "greedy output") == "DIFFERS from the target's own"
    assert row(summary, "ledger of uses").startswith("NOT balanced: ")
    assert row(summary, "optimizer steps") == "20 (resumed from step 15)"


@pytest.mark.parametrize(
    ("values", "curve"),
    [([], ""), ([2.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█")],
)
def test_sparkline_scales_to_its_own_range(values: list[float], curve: str) -> None:
    assert sparkline(values) == curve


def test_plain_lines_are_whole_and_not_for_every_update(capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState(
        step=3,
        total_steps=20,
        metrics={"loss": 4.5, "tau_probabilistic": 1.234},
        resident_bytes=1024**2,
        capacity_bytes=4 * 1024**2,
        capture_tokens_per_s=1500.4,
        train_tokens_per_s=900.6,
        wait_fraction=0.05,
    )
    with RunConsole(to_stderr=True) as console:
        console.update(RunState())
        console.phase("training")
        console.update(state)
        console.update(state)
        console.event(Event(time_s=0.0, kind="restart", message="target 0 restarted [again]"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training",
        "step 3/20 · loss 4.500 · expected accepted length 1.23 · buffer 1.0 MiB of 4.0 MiB · "
        "capture 1,500 tok/s, train 901 tok/s · trainer waits 5%",
        "! target 0 restarted [again]",
    ]


def test_error_goes_to_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole(to_stderr=False).error("trainer.max_step: unknown key [bold]")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: trainer.max_step: unknown key [bold]\n")
