"""Kills random parts of a real run for a set time, and prints what was killed, what came back, and after how long.

    python infra/soak.py --minutes 15

Most kills hit one part, some hit two or three at once. A part is back when its new process is there and its work goes
on: a step for ranks, a capture for coordinator, target, shard and Redis; a dashboard when its process is there. At the
end the run is stopped in order, and its logs are audited: every use trained at most once, bytes within capacity, and
nothing left running. Exit code 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from victims import find, kill

from services.prompts.ledger import audit, lines_of
from trainer.supervision import MOST_RESTARTS, RESTART_WINDOW_S

STEERED = ("target", "shard", "redis", "supervisor", "coordinator", "rank", "dashboard")
"""What is killed; the evaluator works at both ends of a run only."""

SEVERAL = "several"

AT_ONCE = (1, 1, 1, 2, 3)
"""How many parts a kill hits, each number as likely as the others here."""

PAUSE_S = (8.0, 25.0)
"""Shortest and longest time from one recovery to the next kill."""

START_S, RECOVERY_S, STOP_S, LEFT_S = 180.0, 180.0, 150.0, 15.0
POLL_S = 0.1

RUN = (
    "demo", "--json", "--steps", "1000000", "prompts.answers=dataset", "prompts.epochs=50", "evaluation.max_samples=0",
    "trainer.checkpoint_every=25", "target.threads=1", "trainer.threads=1",
)  # fmt: skip


@dataclass
class Recovery:
    """One kill: which parts at once, when, and how long until the work of all went on."""

    parts: tuple[str, ...]
    killed_at_s: float
    took_s: float

    @property
    def name(self) -> str:
        """For the table."""
        return SEVERAL if len(self.parts) > 1 else self.parts[0]


class SoakError(Exception):
    """Something was lost, or did not come back."""


class Soak:
    """One run under fire.

    Args:
        folder: Where the run is written.
        seed: Of victims and moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._output = folder / "slipstream-demo"
        self._random = random.Random(seed)
        self._errors = (folder / "stderr.txt").open("w")
        self._run = subprocess.Popen(
            [sys.executable, "-m", "trainer", *RUN],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        self._began_s = time.monotonic()

    def fire(self, minutes: float) -> list[Recovery]:
        """Kill part after part until the time is over.

        Raises:
            SoakError: The run ended, or a part did not come back.
        """
        self._wait(lambda: self._last_step() > 0, START_S, "the first step")
        recoveries: list[Recovery] = []
        until_s = time.monotonic() + 60 * minutes
        while time.monotonic() < until_s:
            self._idle(self._random.uniform(*PAUSE_S))
            recovery = self._hit(self._choose(recoveries))
            recoveries.append(recovery)
            print(
                f"{recovery.killed_at_s:7.1f} s  {' + '.join(recovery.parts):<11} killed at step {self._last_step()}, "
                f"back after {recovery.took_s:.1f} s",
                flush=True,
            )
        return recoveries

    def stop(self) -> dict[str, object]:
        """Stop the run in order and audit what it left; what was counted.

        Raises:
            SoakError: Something was lost or left behind.
        """
        below = psutil.Process(self._run.pid).children(recursive=True)
        self._run.send_signal(signal.SIGTERM)
        try:
            self._run.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise SoakError(f"the run did not stop within {STOP_S:g} s") from error
        _, left = psutil.wait_procs(below, LEFT_S)
        if left:
            raise SoakError(f"left behind: {[process.pid for process in left]}")
        checkpoint = self._output / os.readlink(self._output / "step_latest")
        ledger = audit(
            lines_of((checkpoint / "ledger.jsonl").read_text()),
            lines_of((self._output / "captures.jsonl").read_text()),
        )
        if not ledger.balanced:
            raise SoakError(f"the ledger does not balance: {ledger.problems}")
        figures = [record for record in self._records() if record["kind"] == "figures"]
        peak, capacity = (max(record[name] for record in figures) for name in ("peak_bytes", "capacity_bytes"))
        if peak > capacity:
            raise SoakError(f"{peak} bytes were resident, the capacity is {capacity}")
        return {"steps": self._last_step(), "peak_bytes": peak, "capacity_bytes": capacity} | ledger.model_dump()

    def close(self) -> None:
        """End whatever is left of the run."""
        if self._run.poll() is None:
            os.killpg(self._run.pid, signal.SIGKILL)
            self._run.wait()
        self._errors.close()

    def _choose(self, earlier: list[Recovery]) -> tuple[str, ...]:
        """Some parts, but none that would be given up for dying too often."""
        since_s = time.monotonic() - self._began_s - RESTART_WINDOW_S
        lately = Counter(part for hit in earlier if hit.killed_at_s > since_s for part in hit.parts)
        able = [part for part in STEERED if lately[part] < MOST_RESTARTS - 1]
        parts = self._random.sample(able, self._random.choice(AT_ONCE))
        if "supervisor" in parts and "redis" in parts:
            parts.remove("redis")  # it falls with its supervisor
        return tuple(parts)

    def _hit(self, parts: tuple[str, ...]) -> Recovery:
        killed_s = time.monotonic()
        pids = {part: kill(self._run.pid, part) for part in parts}
        for part, pid in pids.items():
            if pid is None:
                raise SoakError(f"there is no {part} to kill")
            self._wait(lambda part=part, pid=pid: self._is_there(part, pid), RECOVERY_S, f"a new {part}")
        working = [part for part in parts if part != "dashboard"]
        before = {part: self._work(part) for part in working}  # what was done before the kill has long been counted
        for part in working:
            self._wait(lambda part=part: self._work(part) > before[part], RECOVERY_S, f"the work of the new {part}")
        return Recovery(parts, killed_s - self._began_s, time.monotonic() - killed_s)

    def _is_there(self, part: str, killed: int) -> bool:
        return any(process.pid != killed for process in find(self._run.pid, part))

    def _work(self, part: str) -> int:
        """A number that grows as a part works: steps of ranks, captures of all who take part in those."""
        return self._num_steps() if part == "rank" else (self._output / "captures.jsonl").stat().st_size

    def _idle(self, duration_s: float) -> None:
        until_s = time.monotonic() + duration_s
        self._wait(lambda: time.monotonic() >= until_s, duration_s + 1, "the next kill")

    def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if self._run.poll() is not None:
                raise SoakError(f"the run ended with {self._run.returncode} while waiting for {what}")
            if time.monotonic() > deadline_s:
                raise SoakError(f"{what} did not come within {timeout_s:g} s")
            time.sleep(POLL_S)

    def _records(self) -> list[dict[str, object]]:
        history = self._output / "telemetry.jsonl"
        lines = history.read_text().splitlines() if history.exists() else []
        return [json.loads(line) for line in lines]

    def _num_steps(self) -> int:
        return sum(record["kind"] == "step" for record in self._records())

    def _last_step(self) -> int:
        steps = [record["step"] for record in self._records() if record["kind"] == "step"]
        return int(str(steps[-1])) if steps else 0


def main() -> int:
    """Run the soak test from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="how long parts are killed (default: 15)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of victims and moments")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="slipstream-soak-") as folder:
        soak = Soak(Path(folder), arguments.seed)
        try:
            recoveries = soak.fire(arguments.minutes)
            counted = soak.stop()
        except SoakError as error:
            print(f"LOST: {error}\n{(Path(folder) / 'stderr.txt').read_text()[-4000:]}")
            return 1
        finally:
            soak.close()
    print(f"\n{'part':<11} kills  back after (median, worst)")
    for name in (*STEERED, SEVERAL):
        took = [recovery.took_s for recovery in recoveries if recovery.name == name]
        if took:
            print(f"{name:<11} {len(took):5}  {statistics.median(took):.1f} s, {max(took):.1f} s")
    print(f"{len(recoveries)} kills, {len(recoveries)} recoveries, nothing lost: {json.dumps(counted)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
