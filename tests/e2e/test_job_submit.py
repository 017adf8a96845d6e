"""A run as a Ray job on a cluster with token authentication: submitted, streamed, stopped, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import COMMAND_S, MARK, RUN_S, SMALL, kill_marked, marked, start_ray, steps_done
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import wait_until

from trainer.checkpoint import checkpoint_step, latest_checkpoint
from trainer.ray_job import STOP_WAIT_S, STOP_WAIT_VARIABLE

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RECIPE = "infra/recipes/demo.yaml"

PROMETHEUS = yaml.safe_load((ROOT / "infra" / "prometheus.yml").read_text())

IDLE = re.compile(r"ray::IDLE|/ray/(_private|autoscaler|core|dashboard)/|ray-dashboard-")
"""Command lines of Ray's own processes, of which some come up later, and of workers that work for nobody (yet)."""

STEPS_BEFORE_STOP = 7
MORE_STEPS = 5


@dataclass
class Cluster:
    """A `ray start --head` of this test's own.

    Attributes:
        url: Its job server.
        home: Home directory of its processes.
        environment: Of who may use it: the token is in it.
        mark: Value of `MARK` in all its processes.
        session: Its temporary folder.
        own_pids: The processes of the cluster itself.
    """

    url: str
    home: Path
    environment: dict[str, str]
    mark: str
    session: Path
    own_pids: set[int] = field(default_factory=set)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A command of a user of the cluster, in the checkout."""
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, timeout_s: float = COMMAND_S, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        process = self.start(*command, **environment)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, output, errors

    def ray_job(self, *arguments: str, **options: Any) -> tuple[int, str, str]:
        """`ray job …`."""
        verb, *rest = arguments
        return self.run(str(BIN / "ray"), "job", verb, "--address", self.url, *rest, **options)

    def submit(self, *arguments: str, **options: Any) -> tuple[int, str, str]:
        """`slipstream submit …`."""
        return self.run(str(BIN / "slipstream"), "submit", RECIPE, "--address", self.url, *arguments, **options)

    def metric(self, name: str, run_id: str) -> float | None:
        """A metric of a run where Prometheus would find it: Ray writes a file with the addresses to scrape."""
        places = self.session / Path(PROMETHEUS["scrape_configs"][0]["file_sd_configs"][0]["files"][0]).name
        if not places.exists():
            return None
        for group in json.loads(places.read_text()):
            for target in group["targets"]:
                try:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                        text = answer.read().decode()
                except OSError:  # it is busy: whoever scrapes it comes again
                    continue
                if found := re.search(rf'^{name}{{[^}}]*run="{run_id}"[^}}]*}} (\S+)$', text, re.M):
                    return float(found[1])
        return None

    def left_behind(self) -> list[str]:
        """Command lines of living processes that jobs have started here; idle workers are Ray's to keep."""
        lines = marked(self.mark)
        return [f"{pid} {line}" for pid, line in lines.items() if pid not in self.own_pids and not IDLE.search(line)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    session = Path(tempfile.mkdtemp(prefix="slip-ray-", dir="/tmp"))  # its sockets need a short path
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        MARK: mark,
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_metrics_report_interval_ms": "500",
    }
    try:
        said = start_ray(
            [
                *("--head", "--port", "0", "--node-ip-address", "127.0.0.1", "--num-cpus", "4"),
                *("--dashboard-port", "0", "--dashboard-agent-listen-port", "0", "--temp-dir", str(session)),
            ],
            environment,
        )
        address = re.search(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'", said)
        assert address, said
        cluster = Cluster(address[1], home, environment, mark, session)
        cluster.own_pids = set(marked(mark))
        yield cluster
    finally:
        kill_marked(mark)
        shutil.rmtree(session, ignore_errors=True)


def test_job_is_stopped_in_order_and_the_next_one_goes_on_with_the_run(cluster: Cluster) -> None:
    output_dir = cluster.home / "slipstream-demo"  # where a job's relative output_dir is

    watching = cluster.start(
        *(str(BIN / "slipstream"), "submit", RECIPE, "--address", cluster.url, "--name", "first"),
        *(*SMALL, "trainer.checkpoint_every=500"),
    )
    try:
        wait_until(
            lambda: steps_done(output_dir) >= STEPS_BEFORE_STOP or watching.poll() is not None,
            lambda: cluster.ray_job("logs", "first")[1],
            RUN_S,
        )
        assert watching.poll() is None, watching.communicate()
        run_id = json.loads((output_dir / "run.json").read_text())["run_id"]
        wait_until(
            lambda: (cluster.metric("ray_slipstream_step", run_id) or 0) >= STEPS_BEFORE_STOP,
            lambda: f"ray_slipstream_step is {cluster.metric('ray_slipstream_step', run_id)}",
        )
        assert cluster.ray_job("stop", "first")[0] == 0
        log, errors = watching.communicate(timeout=COMMAND_S)
    finally:
        watching.kill()
    assert watching.returncode == 1, errors
    assert "job first stopped" in log
    assert f"output_dir is {output_dir}" in log
    assert "stopping after this step" in log
    wait_until(lambda: not cluster.left_behind(), lambda: f"left behind: {cluster.left_behind()}")
    checkpoint = latest_checkpoint(output_dir)
    assert checkpoint is not None
    stopped_at = checkpoint_step(checkpoint)
    assert stopped_at >= STEPS_BEFORE_STOP
    assert stopped_at == steps_done(output_dir), "the last step before the stop is in the checkpoint"

    patient = json.dumps({"env_vars": {STOP_WAIT_VARIABLE: str(STOP_WAIT_S)}})
    streaming = cluster.start(
        *(str(BIN / "ray"), "job", "submit", "--address", cluster.url, "--working-dir", ".", "--submission-id", "next"),
        *("--runtime-env-json", patient, "--", "slipstream", "run", RECIPE),
        *(*SMALL, f"trainer.max_steps={stopped_at + MORE_STEPS}"),
    )
    assert streaming.stdout is not None
    try:
        lines = iter(streaming.stdout.readline, "")
        assert any("starting Redis and Ray" in line for line in lines)
        assert streaming.poll() is None, "the log is there while the job runs"
        rest, errors = streaming.communicate(timeout=RUN_S)
    finally:
        streaming.kill()
    assert streaming.returncode == 0, rest + errors
    assert f"resumed from {checkpoint}" in rest
    assert f"step_{stopped_at + MORE_STEPS}" in rest
    assert "succeeded" in rest
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["resumed_from_step"] == stopped_at
    assert summary["steps"] == stopped_at + MORE_STEPS
    assert summary["ledger"]["balanced"]
    wait_until(lambda: not cluster.left_behind(), lambda: f"left behind: {cluster.left_behind()}")
    check_views(output_dir, run_id, stopped_at + MORE_STEPS)


def check_views(output_dir: Path, run_id: str, last_step: int) -> None:
    """TensorBoard's files show every step once, and each part of the run has logged."""
    events = EventAccumulator(str(output_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, last_step + 1))
    assert {"train/accept_rate/0", "eval/accepted_length", "buffer/resident_bytes"} <= set(events.Tags()["scalars"])
    logs = {file.stem: list(map(json.loads, file.open())) for file in (output_dir / "logs").glob("*.jsonl")}
    assert logs.keys() == {"driver", "coordinator", "shard", "target-0", "trainer-0", "evaluator"}
    for name, lines in logs.items():
        role, _, rank = name.partition("-")
        assert {(line["run"], line["role"], line["rank"]) for line in lines} <= {
            (run_id, role, int(rank) if rank else None)
        }
    written = [line["step"] for line in logs["trainer-0"] if "is written" in line["message"]]
    assert written[-1] == last_step
    assert [line["message"] for line in logs["driver"] if "attempt" in line["message"]][-1].startswith("attempt 2 of")


def test_interrupted_submission_leaves_its_job_running(cluster: Cluster) -> None:
    process = cluster.start(
        *(str(BIN / "slipstream"), "submit", RECIPE, "--address", cluster.url, "--name", "left"),
        *("--output-dir", str(cluster.home / "left")),
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("Running entrypoint" in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=COMMAND_S)
    finally:
        process.kill()
    assert process.returncode == 1
    command = f"ray job stop --address {cluster.url} left"
    assert f"job left runs on; stop it with: {command}" in errors
    assert "RUNNING" in "".join(cluster.ray_job("status", "left")[1:])
    code, output, errors = cluster.run(*(str(BIN / "ray"), *command.split()[1:]))
    assert code == 0, output + errors
    wait_until(lambda: not cluster.left_behind(), lambda: f"left behind: {cluster.left_behind()}")


def test_job_with_a_wrong_setting_fails_and_says_why(cluster: Cluster) -> None:
    entrypoint = ("slipstream", "run", RECIPE, "trainer.max_step=5")
    code, log, _ = cluster.ray_job("submit", "--working-dir", ".", "--submission-id", "wrong", "--", *entrypoint)
    assert code == 1
    assert "did you mean trainer.max_steps" in log
    assert "FAILED" in "".join(cluster.ray_job("list")[1:])


def test_submission_ends_with_the_status_of_its_job(cluster: Cluster) -> None:
    code, output, errors = cluster.submit("target.model=/no/such/model", "--json", "--name", "broken")
    assert code == 1
    assert json.loads(output) == {"job_id": "broken", "address": cluster.url, "status": "FAILED", "summary": None}
    assert "/no/such/model" in errors  # the job's log


def test_wrong_recipe_is_refused_before_anything_is_uploaded(cluster: Cluster) -> None:
    code, _, errors = cluster.submit("trainer.max_step=5")
    assert code == 2
    assert "did you mean trainer.max_steps" in errors
    assert "uploading" not in errors


@pytest.mark.parametrize(
    "credentials",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "wrong" * 8},
    ],
    ids=["without a token", "with a wrong token"],
)
def test_cluster_refuses_a_job(cluster: Cluster, credentials: dict[str, str]) -> None:
    code, _, errors = cluster.submit(**credentials)
    assert code == 1
    assert "refuses the token" in errors
    assert "RAY_AUTH_TOKEN_PATH" in errors
    assert "Traceback" not in errors
    code, output, errors = cluster.ray_job("submit", "--", "slipstream", "--help", **credentials)
    assert code != 0
    assert "uthenticat" in output + errors


def test_address_without_a_cluster_is_named(cluster: Cluster) -> None:
    code, _, errors = cluster.run(str(BIN / "slipstream"), "submit", RECIPE, "--address", "http://127.0.0.1:9")
    assert code == 1
    assert "http://127.0.0.1:9" in errors
    assert "ray start --head" in errors
    assert "Traceback" not in errors
