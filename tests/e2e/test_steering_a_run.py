"""A running job steered from another shell, on a cluster of its own with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND_S, MARK, RUN_S, SMALL, kill_marked, start_ray
from waiting import wait_until

import trainer.demo
from trainer.checkpoint import checkpoint_step, latest_checkpoint

DEMO = Path(trainer.demo.__file__).parent

RESOURCE = "slot"
"""Custom resource that each target takes; the cluster's first node has two."""


@dataclass
class Cluster:
    """A `ray start --head` of this test's own; more nodes can join it."""

    folder: Path
    environment: dict[str, str]
    address: str = ""

    def start_node(self, *options: str) -> None:
        """`ray start …`, without the process that serves Ray's own dashboard."""
        start_ray(options, self.environment)

    def slipstream(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """A `slipstream` command in a shell on the cluster."""
        return subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            cwd=self.folder,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shell")
    session = Path(tempfile.mkdtemp(prefix="slip-ray-", dir="/tmp"))  # its sockets need a short path
    environment = {
        **os.environ,
        MARK: uuid.uuid4().hex,
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    cluster = Cluster(folder, environment)
    try:
        cluster.start_node(
            *("--head", "--port", "0", "--node-ip-address", "127.0.0.1", "--temp-dir", str(session)),
            *("--include-dashboard", "false", "--num-cpus", "2", "--resources", json.dumps({RESOURCE: 2})),
        )
        cluster.address = (session / "ray_current_cluster").read_text().strip()
        environment["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        kill_marked(environment[MARK])
        shutil.rmtree(session, ignore_errors=True)


@dataclass
class Run:
    """A `slipstream run` in another shell of the cluster; its history tells what it does without a command a look."""

    cluster: Cluster
    process: subprocess.Popen[str]
    output_dir: Path
    log: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    num_read: int = 0

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The run's history so far."""
        path = self.output_dir / "telemetry.jsonl"
        if path.exists():
            with path.open("rb") as history:
                history.seek(self.num_read)
                lines, _, _ = history.read().rpartition(b"\n")
            self.num_read += len(lines) + 1 if lines else 0
            self.history += map(json.loads, lines.splitlines())
        return [record for record in self.history if record["kind"] == kind]

    def steps(self) -> list[int]:
        """Numbers of the steps done, in the order in which they were."""
        return [record["step"] for record in self.records("step")]

    def targets(self) -> list[str]:
        """State of each target, about a second ago."""
        return [target["state"] for target in self.records("figures")[-1]["targets"]]

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = RUN_S) -> None:
        """Wait while the run lives; shows its log if the time is over."""

        def holds() -> object:
            assert self.process.poll() is None, f"the run ended:\n{self.log.read_text()}"
            return condition()

        wait_until(holds, lambda: f"{what}\n{self.history[-1]}\n{self.log.read_text()}", timeout_s)


@pytest.fixture(scope="module")
def run(cluster: Cluster) -> Iterator[Run]:
    output_dir, log = cluster.folder / "out", cluster.folder / "run.log"
    settings = [
        *SMALL, "evaluation.max_samples=0", f"target.model={DEMO / 'target'}", f"target.resources={{{RESOURCE}: 1}}",
        "target.max_replicas=4", "trainer.threads=1", "trainer.checkpoint_every=100000",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "run", str(DEMO / "recipe.yaml"), "--output-dir", "out", *settings],
            cwd=cluster.folder,
            env=cluster.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    run = Run(cluster, process, output_dir, log)
    run.wait(lambda: len(run.steps()) >= 3, "the first steps")
    yield run
    process.kill()
    process.wait()


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command failed with the code, said why in a line, and without noise."""
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_cluster_that_refuses_the_token_is_named_at_once(cluster: Cluster) -> None:
    refused(cluster.slipstream("status", RAY_AUTH_TOKEN="wrong"), 1, cluster.address, "is not the cluster's")
    refused(cluster.slipstream("pause", "demo", RAY_AUTH_TOKEN=""), 1, cluster.address, "no token is found here")


def test_cluster_that_is_not_there_is_named_at_once(cluster: Cluster) -> None:
    refused(cluster.slipstream("status", "--address", "127.0.0.1:9"), 1, "no Ray cluster answers at 127.0.0.1:9")
    refused(cluster.slipstream("status", RAY_ADDRESS="nonsense"), 1, "'nonsense' is no address of a Ray cluster")
    refused(cluster.slipstream("status", RAY_ADDRESS="http://127.0.0.1:8265"), 1, "the address of a job server")


def test_cluster_of_another_ray_is_named(cluster: Cluster) -> None:
    older = "import ray; ray.__version__ = '2.9.0'; from trainer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", older, "status"],
        cwd=cluster.folder,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    refused(done, 1, cluster.address, "Version mismatch", "2.9.0", "the cluster's own Ray and Python")


def test_run_on_a_cluster_that_refuses_it_starts_no_other(cluster: Cluster) -> None:
    done = cluster.slipstream(
        "run", str(DEMO / "recipe.yaml"), f"target.model={DEMO / 'target'}", "--output-dir", "refused",
        RAY_AUTH_TOKEN="wrong",
    )  # fmt: skip
    assert done.returncode == 1
    assert "is not the cluster's" in done.stderr


def test_unknown_run_and_wrong_scale_are_refused(cluster: Cluster, run: Run) -> None:
    refused(cluster.slipstream("pause", "llama"), 2, "there is no run 'llama' here", "running are: demo-")
    refused(cluster.slipstream("scale", "demo", "targets=0"), 2, "targets=0 must lie between 1 and", "max_replicas 4")
    refused(cluster.slipstream("scale", "demo", "targets=5"), 2, "targets=5 must lie between 1 and", "max_replicas 4")
    refused(cluster.slipstream("scale", "demo", "autoscale=on"), 2, "this run's recipe has no target.autoscale")


def test_second_driver_of_an_output_directory_is_refused(cluster: Cluster, run: Run) -> None:
    done = cluster.slipstream(
        "run", str(DEMO / "recipe.yaml"), f"target.model={DEMO / 'target'}", "--output-dir", "out"
    )
    assert done.returncode == 2
    assert "is in use by another slipstream process" in done.stderr


CUT_OFF = {"restart", "gone", "failed", "target", "capture"}
"""Events of a target or a capture that did not come to its end."""

SILENT = "has not answered for"
"""What the event of a target says that only stood still, as any process of a busy machine may."""


def test_run_is_scaled_paused_continued_and_stopped(cluster: Cluster, run: Run) -> None:
    (listed,) = json.loads(cluster.slipstream("status", "--json").stdout)["runs"]
    assert (listed["output_dir"], listed["state"], listed["attempt"]) == (str(run.output_dir), "training", 1)

    # Up: the second target has a slot, the third is pending until a node brings one.
    scaled = cluster.slipstream("scale", "demo", "targets=3", "--request-id", "up", "--json")
    assert json.loads(scaled.stdout)["message"] == "targets scaled from 1 to 3"
    run.wait(lambda: run.targets() == ["serving", "serving", "pending"], "the second target")
    run.wait(lambda: "pending" in [event["event"] for event in run.records("event")], "the missing resource")
    repeated = cluster.slipstream("scale", "demo", "targets=3", "--request-id", "up")
    assert repeated.stdout.endswith("targets scaled from 1 to 3\n")
    pending = json.loads(cluster.slipstream("status", "demo", "--json").stdout)["targets"]
    assert [target["index"] for target in pending] == [0, 1, 2], "the same request again does nothing"
    assert f"waits for 1 {RESOURCE}, of the cluster's 2 are 0 free" in pending[2]["message"]
    cluster.start_node("--address", cluster.address, "--num-cpus", "0", "--resources", json.dumps({RESOURCE: 1}))
    run.wait(lambda: run.targets() == ["serving"] * 3, "the third target")

    # Down, while all of them capture.
    assert cluster.slipstream("scale", "demo", "targets=1").returncode == 0
    run.wait(lambda: run.targets() == ["serving"], "the end of two targets")

    # Paused: what is granted is trained, then the step stands still.
    assert cluster.slipstream("pause", "out").returncode == 0
    status = json.loads(cluster.slipstream("status", "out", "--json").stdout)
    run.wait(lambda: run.steps()[-1] >= int(paused_after(run)), "the last step before the pause")
    stood_still = len(run.records("figures")) + 4  # about one a second
    run.wait(lambda: len(run.records("figures")) >= stood_still, "seconds of a pause")
    last_step = run.steps()[-1]
    assert last_step == int(paused_after(run))
    assert run.records("figures")[-1]["phase"] == "paused"
    assert status["state"] in ("pausing", "paused")
    assert cluster.slipstream("continue", "demo").returncode == 0
    run.wait(lambda: run.steps()[-1] > last_step + 2, "steps after the pause")
    before, after = run.records("step")[last_step - 1 : last_step + 1]
    assert after["step_s"] < after["time_s"] - before["time_s"] - 2, "a pause is no part of a step"

    stopped = cluster.slipstream("stop", "demo", "--wait")
    assert stopped.returncode == 0, stopped.stderr
    assert run.process.wait(COMMAND_S) == 1
    log = run.log.read_text()
    assert "asked to stop" in log
    assert "run the same command again" in log
    assert "Traceback" not in log

    # The trainer has noticed nothing of all that.
    steps = run.steps()
    assert steps == list(range(1, steps[-1] + 1))
    assert [record["attempt"] for record in run.records("run")] == [1]
    assert [record["outcome"] for record in run.records("end")] == ["stopped"]
    kinds = [event["event"] for event in run.records("event")]
    assert kinds.count("scaling") == 2
    assert kinds.count("drained") == 2
    cut_off = [event for event in run.records("event") if event["event"] in CUT_OFF and SILENT not in event["message"]]
    assert not cut_off, "no capture was cut off"
    checkpoint = latest_checkpoint(run.output_dir)
    assert checkpoint is not None
    assert checkpoint_step(checkpoint) == steps[-1], "nothing trained is lost"
    refused(cluster.slipstream("status", "demo"), 2, "there is no run 'demo' here; no run is on this cluster")


def paused_after(run: Run) -> str:
    """The step that the run's pause event names."""
    (message,) = [event["message"] for event in run.records("event") if event["event"] == "pause"]
    return message.removeprefix("paused after step ").partition(":")[0]
