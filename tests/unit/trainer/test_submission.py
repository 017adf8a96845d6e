"""What `slipstream submit` checks and translates; tests/e2e/test_job_submit.py submits for real."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from services.errors import ClusterError, RecipeError, UsageError
from trainer import submission as submission_module
from trainer.submission import ADDRESS_VARIABLES, Submission, check_recipe, connect, job_environment, last_json_line

RECIPE = "target: {model: somewhere}\nprompts: {source: train.jsonl}\n"

Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a web server that answers everything alike; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                """Silence."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_recipe_is_named_by_its_place_in_the_working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path / "recipes")
    assert check_recipe(Path("one.yaml"), [], Path("..")) == Path("recipes/one.yaml")
    assert check_recipe(Path("../recipes/one.yaml"), ["trainer.max_steps=3"], tmp_path) == Path("recipes/one.yaml")


def test_recipe_outside_the_working_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE)
    (tmp_path / "upload").mkdir()
    with pytest.raises(RecipeError, match=r"is outside --working-dir .*/upload"):
        check_recipe(tmp_path / "one.yaml", [], tmp_path / "upload")


def test_working_dir_that_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE)
    with pytest.raises(UsageError, match="nowhere is no folder"):
        check_recipe(tmp_path / "one.yaml", [], tmp_path / "nowhere")


def test_wrong_recipe_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"did you mean trainer\.max_steps"):
        check_recipe(tmp_path / "one.yaml", ["trainer.max_step=3"], tmp_path)


def test_password_on_the_command_line_of_a_job_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE)
    with pytest.raises(UsageError, match="SLIPSTREAM_REDIS_PASSWORD") as refused:
        check_recipe(tmp_path / "one.yaml", ["replay.redis=redis://:secret@host"], tmp_path)
    assert "secret" not in str(refused.value)
    check_recipe(tmp_path / "one.yaml", ["replay.redis=redis://me@host"], tmp_path)


def test_cluster_of_another_ray_is_refused(serve: Serve) -> None:
    address = serve(200, json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": "x", "session_name": "y"}))
    with pytest.raises(ClusterError, match=f"runs Ray 2.9.3, here is Ray {ray.__version__}: install ray==2.9.3 here"):
        connect(address)


def test_address_wins_over_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    address = serve(200, json.dumps({"version": "4", "ray_version": ray.__version__}))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert connect(address).get_address() == address


@pytest.mark.parametrize(("status", "body"), [(404, "not here"), (200, "a page"), (500, "broken")])
def test_server_that_is_no_ray_is_named(serve: Serve, status: int, body: str) -> None:
    address = serve(status, body)
    with pytest.raises(ClusterError, match=f"no Ray job server at {address}"):
        connect(address)


def test_address_without_a_server_is_named() -> None:
    with pytest.raises(ClusterError, match=r"no Ray job server at http://127\.0\.0\.1:9: .*ray start --head"):
        connect("http://127.0.0.1:9")


def test_job_finds_this_python_first_and_has_time_to_stop() -> None:
    environment = job_environment()
    assert environment["PATH"].endswith(":${PATH}")  # Ray puts the node's own there
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "270"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ('training\n{"run_id": "demo-1"}\n', {"run_id": "demo-1"}),
        ("training\nerror: no\n", None),
        ("{not JSON", None),
        ("", None),
    ],
)
def test_summary_is_the_last_line_of_a_log(log: str, expected: object) -> None:
    assert last_json_line(log) == expected


class SilentServer:
    """A job client whose first stream breaks off without a word, and whose second one has the whole log."""

    def __init__(self) -> None:
        self.num_streams = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.num_streams += 1
        yield "one "
        if self.num_streams == 1:
            await asyncio.Event().wait()
        yield "two"

    def get_job_status(self, job_id: str) -> str:
        return "RUNNING" if self.num_streams == 1 else "SUCCEEDED"


def test_log_goes_on_where_a_stream_that_fell_silent_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission_module, "TAIL_S", 0.05)
    monkeypatch.setattr(submission_module, "POLL_S", 0.0)
    shown: list[str] = []
    Submission(SilentServer(), "job").follow(shown.append)  # type: ignore[arg-type]
    assert shown == ["one ", "two"]
