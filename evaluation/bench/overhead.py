"""What watching a run costs its training: step time with the driver and the dashboard at work, and with both held.

One run of the demo, with a browser's event stream connected to its dashboard. In turns, for seconds at a time, the
driver (which reads telemetry, keeps the history, writes TensorBoard, Prometheus and log files and draws the terminal)
and the dashboard are held with SIGSTOP and let go on. Ranks, targets, buffer and coordinator never notice: they need
neither to train. Steps carry their own times, so each is counted where it ran. Neighbouring turns are compared, in the
order with, without, without, with, so that slow drifts cancel.

What a rank itself does for telemetry goes on in both; it is measured apart, against a Redis of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.bench.hardware import describe_hardware
from services.errors import DeadlineError, SlipstreamError
from services.replay.connect import connect
from services.replay.embedded import EmbeddedRedis
from services.telemetry import TelemetryWriter

TURN_S = 4.0
"""How long one turn is measured: dozens of the demo's steps, and less than any deadline that the driver keeps."""

SETTLE_S = 1.0
"""Time after each switch that counts for neither: the driver catches up."""

WARM_STEPS = 50
"""Steps before the first turn."""

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 90.0
POLL_S = 0.1

FEWEST_PAIRS = 4
BOOTSTRAPS = 2_000

EMITTED = 2_000
BATCH = 500
"""Records of the measurement of `emit`, and how many may wait to be sent: fewer than the writer's queue holds."""

SEND_DEADLINE_S = 30.0

RUN = ("evaluation.max_samples=0", "trainer.checkpoint_every=100000", "trainer.max_steps=null")
"""Nothing but training, for as long as it is measured."""


class Turn(NamedTuple):
    """A stretch of wall-clock time."""

    begin_s: float
    end_s: float
    is_watched: bool
    """Whether driver and dashboard were at work."""


@dataclass(frozen=True)
class Overhead:
    """Result of the benchmark.

    Attributes:
        ratio: Seconds a trained token, watched over unwatched: the median over pairs of neighbouring turns.
        interval: Its 95 % bootstrap interval.
        watched_step_s: Median step time while watched.
        unwatched_step_s: Median step time while driver and dashboard were held.
        num_pairs: Pairs of turns compared.
        num_steps: Steps counted in them.
        emit_s: Processor time that a rank spends on the telemetry of one step, its sending thread included.
        num_events: Events that the connected page has received.
    """

    ratio: float
    interval: tuple[float, float]
    watched_step_s: float
    unwatched_step_s: float
    num_pairs: int
    num_steps: int
    emit_s: float
    num_events: int

    @property
    def emit_fraction(self) -> float:
        """Part of a step that its telemetry takes in the rank."""
        return self.emit_s / self.unwatched_step_s

    def as_json(self) -> dict[str, Any]:
        """One object for scripts."""
        return {**vars(self), "emit_fraction": self.emit_fraction, "hardware": describe_hardware()}


def measure_overhead(overrides: Sequence[str], say: Callable[[str], None], *, num_pairs: int) -> Overhead:
    """Run the demo and hold its driver and dashboard in turns.

    Args:
        overrides: `section.key=value` settings of the run.
        say: Where progress goes.
        num_pairs: Pairs of turns, each about ten seconds.

    Raises:
        SlipstreamError: The run failed, has no dashboard, or was too slow to count its steps.
    """
    say("what a rank itself does for telemetry")
    emit_s = measure_emit()
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder:
        output_dir = Path(folder) / "run"
        with _demo(output_dir, overrides) as driver:
            say("starting the run")
            _wait_for_steps(driver, output_dir)
            page = json.loads((output_dir / "dashboard.json").read_text())
            with _Browser(page["url"], page["token"]) as browser:
                turns = list(_take_turns((driver.pid, page["pid"]), num_pairs, say))
        steps = _read_steps(output_dir)
        return compare(steps, turns, emit_s=emit_s, num_events=browser.num_events)


def compare(steps: Sequence[dict[str, Any]], turns: Sequence[Turn], *, emit_s: float, num_events: int) -> Overhead:
    """Compare neighbouring turns, two by two.

    Args:
        steps: `step` records of telemetry: `time_s` at their end, `step_s`, `tokens`.
        turns: An even number, one watched and one unwatched in each pair.
        emit_s: Goes into the result, as `num_events` does.
        num_events: Of the page.

    Raises:
        SlipstreamError: Too few pairs have whole steps in both turns.
    """
    ratios: list[float] = []
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair in zip(turns[::2], turns[1::2], strict=True):
        found = {turn.is_watched: [step for step in steps if _is_in(step, turn)] for turn in pair}
        if not (found[True] and found[False]):
            continue
        ratios.append(_seconds_a_token(found[True]) / _seconds_a_token(found[False]))
        for is_watched, inside in found.items():
            times[is_watched] += [step["step_s"] for step in inside]
    if len(ratios) < FEWEST_PAIRS:
        raise SlipstreamError(
            f"only {len(ratios)} of {len(turns) // 2} pairs of turns have whole steps in both, {FEWEST_PAIRS} are "
            f"needed: steps take too long for turns of {TURN_S:g} s here; give more --pairs, or a smaller "
            "trainer.global_batch_size"
        )
    return Overhead(
        ratio=statistics.median(ratios),
        interval=_interval(ratios),
        watched_step_s=statistics.median(times[True]),
        unwatched_step_s=statistics.median(times[False]),
        num_pairs=len(ratios),
        num_steps=len(times[True]) + len(times[False]),
        emit_s=emit_s,
        num_events=num_events,
    )


def measure_emit() -> float:
    """Processor seconds of one `emit` of a step's record, until it is in a real Redis."""
    metrics = {f"metric_{number}": number / 7 for number in range(16)}
    assert EMITTED % BATCH == 0
    with (
        tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder,
        EmbeddedRedis.start(Path(folder), capacity_bytes=1024**2) as redis,
        contextlib.closing(connect(redis.url)) as client,
    ):
        telemetry = TelemetryWriter(client, "bench")
        began_s = time.process_time()
        for batch in range(EMITTED // BATCH):
            for step in range(BATCH):
                telemetry.emit("step", step=step, metrics=metrics, learning_rate=1e-3, tokens=1000, step_s=0.1)
            sent = (batch + 1) * BATCH
            _wait(lambda sent=sent: client.xlen("bench:telemetry") >= sent, "telemetry", SEND_DEADLINE_S)  # type: ignore[misc]
        telemetry.close()
        used_s = time.process_time() - began_s
        if telemetry.num_dropped:
            raise SlipstreamError(f"{telemetry.num_dropped} of {EMITTED} records were dropped")
    return used_s / EMITTED


class _Browser:
    """A page's connection to the event stream of a dashboard: reads and counts what comes."""

    def __init__(self, url: str, token: str) -> None:
        address = url.partition("#")[0].rstrip("/") + "/api/events"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        self._answer = urllib.request.urlopen(request, timeout=30)
        self._thread = threading.Thread(target=self._read, name="browser", daemon=True)
        self.num_events = 0

    def __enter__(self) -> _Browser:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.num_events:
            raise SlipstreamError("the dashboard sent no event to the connected page")

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the dashboard ends with the run
            for line in self._answer:
                self.num_events += line.startswith(b"data:")


@contextlib.contextmanager
def _demo(output_dir: Path, overrides: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A run of the demo; stopped in order at the end."""
    command = [sys.executable, "-m", "trainer", "demo", "--output-dir", str(output_dir), *RUN, *overrides]
    with (output_dir.parent / "demo.log").open("w+") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield driver
            if driver.poll() is not None:
                log.seek(0)
                raise SlipstreamError(f"{shlex.join(command)} ended with {driver.returncode}:\n{log.read()[-2000:]}")
        finally:
            driver.send_signal(signal.SIGTERM)
            try:
                driver.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()


def _wait_for_steps(driver: subprocess.Popen[bytes], output_dir: Path) -> None:
    def is_warm() -> bool:
        return driver.poll() is not None or (
            (output_dir / "dashboard.json").exists() and len(_read_steps(output_dir)) >= WARM_STEPS
        )

    _wait(is_warm, f"{WARM_STEPS} steps and a dashboard", START_DEADLINE_S)
    if driver.poll() is not None:
        log = (output_dir.parent / "demo.log").read_text()
        raise SlipstreamError(
            f"the demo ended with exit code {driver.returncode} before it was measured:\n{log[-2000:]}"
        )


def _take_turns(pids: Sequence[int], num_pairs: int, say: Callable[[str], None]) -> Iterator[Turn]:
    """Hold the processes and let them go on, with, without, without, with, …"""
    try:
        for pair in range(num_pairs):
            say(f"turns {2 * pair + 1} and {2 * pair + 2} of {2 * num_pairs}")
            for is_watched in (True, False) if pair % 2 == 0 else (False, True):
                for pid in pids:
                    os.kill(pid, signal.SIGCONT if is_watched else signal.SIGSTOP)
                time.sleep(SETTLE_S)
                begin_s = time.time()
                time.sleep(TURN_S)
                yield Turn(begin_s, time.time(), is_watched)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _read_steps(output_dir: Path) -> list[dict[str, Any]]:
    history = output_dir / "telemetry.jsonl"
    if not history.exists():
        return []
    records = [json.loads(line) for line in history.read_text().splitlines() if line.endswith("}")]
    return [record for record in records if record["kind"] == "step"]


def _is_in(step: dict[str, Any], turn: Turn) -> bool:
    return bool(step["time_s"] - step["step_s"] >= turn.begin_s and step["time_s"] <= turn.end_s)


def _seconds_a_token(steps: Sequence[dict[str, Any]]) -> float:
    """Steps differ in their tokens, so turns are compared by time a token."""
    return float(sum(step["step_s"] for step in steps) / sum(step["tokens"] for step in steps))


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    choose = random.Random(0)
    medians = sorted(statistics.median(choose.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAPS))
    return medians[round(0.025 * (BOOTSTRAPS - 1))], medians[round(0.975 * (BOOTSTRAPS - 1))]


def _wait(condition: Callable[[], bool], what: str, deadline_s: float) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            raise DeadlineError(f"no {what} within {deadline_s:g} s")
        time.sleep(POLL_S)
