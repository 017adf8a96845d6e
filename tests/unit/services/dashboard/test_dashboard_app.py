"""The web application on a real server and a real file; only the run's driver is made up."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from records import Record, event, figures, run, step
from waiting import wait_until

from services.dashboard import feed as feed_module
from services.dashboard.access import Access
from services.dashboard.controls import Scale, Steer
from services.dashboard.feed import Feed
from services.dashboard.server import Server, listen, published
from services.errors import SlipstreamError, UsageError
from services.security import make_certificate

TIMEOUT_S = 120
TOKEN = {"Authorization": "Bearer secret"}


class Driver:
    """Takes requests as a run's driver would."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Scale | Steer]] = []
        self.error: SlipstreamError | None = None

    def act(self, run_id: str, action: Scale | Steer) -> str:
        if self.error:
            raise self.error
        self.taken.append((run_id, action))
        return f"{action.action} it is"


class Dashboard:
    """One dashboard under test, in a thread of its own."""

    def __init__(self, output_dir: Path, **access: Any) -> None:
        self.path = output_dir / "telemetry.jsonl"
        self.driver = Driver()
        self.access = Access(token="secret", **access)
        self.listener = listen(self.access, 0)
        self.port = self.listener.getsockname()[1]
        self.feed = Feed(output_dir, follows_driver=True, clock=lambda: 100.0)
        self.server = Server(self.feed, self.access, self.driver)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.listener])), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()

    def write(self, *records: Record) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        with contextlib.closing(self.connect()) as connection:
            text = json.dumps(body) if body is not None else None
            connection.request(method, path, text, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            data = answer.read()
            is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
            return answer.status, json.loads(data) if is_json else data, dict(answer.getheaders())

    def get(self, path: str, **headers: str) -> Any:
        return self.ask("GET", path, **headers)[1]

    def control(self, body: Any, **headers: str) -> tuple[int, Any]:
        return self.ask("POST", "/api/control", body, **headers)[:2]


class Stream:
    """A page's end of the stream of events."""

    def __init__(self, dashboard: Dashboard, **headers: str) -> None:
        self.connection = dashboard.connect()
        self.connection.request("GET", "/api/events", headers=headers)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.getheader("Content-Type", "").startswith("text/event-stream")

    def next(self) -> dict[str, str]:
        """The next event's fields; empty at the end of the stream."""
        fields: dict[str, str] = {}
        while line := self.answer.readline().decode():
            if line == "\n":
                return fields
            name, _, value = line.rstrip("\n").partition(": ")
            fields[name] = value
        return fields

    def steps(self, count: int) -> list[int]:
        """The steps of the next updates, until there are so many."""
        found: list[int] = []
        while len(found) < count:
            update = self.next()
            self.last_id = update["id"]
            found += json.loads(update["data"])["series"].get("loss", {"step": []})["step"]
        return found

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Dashboard]:
    running = Dashboard(tmp_path)
    running.write(run(0.0), figures(1.0), step(1, 2.0), step(2, 3.0), event(3.5, "restart"))
    wait_until(lambda: running.get("/api/history")["status"]["step"] == 2, "the first records")
    yield running
    running.close()


def test_picture_holds_status_series_and_events(dashboard: Dashboard) -> None:
    status, picture, headers = dashboard.ask("GET", "/api/history")
    assert status == 200
    assert headers["cache-control"] == "no-store"
    assert picture["status"]["state"] == "running"
    assert picture["series"]["loss"]["step"] == [1, 2]
    assert [found["event"] for found in picture["events"]] == ["restart"]
    assert picture["id"].endswith(f"-{dashboard.path.stat().st_size}")


def test_part_of_the_picture_can_be_asked_for(dashboard: Dashboard) -> None:
    assert dashboard.get("/api/history?axis=elapsed_s&low=2.5&high=9")["series"]["loss"]["step"] == [2]
    status, answer, _ = dashboard.ask("GET", "/api/history?axis=weather")
    assert status == 422
    assert "axis" in answer["detail"]


def test_new_records_come_as_updates(dashboard: Dashboard) -> None:
    stream = Stream(dashboard)
    first = json.loads(stream.next()["data"])
    assert first["series"] == {}
    assert first["status"]["step"] == 2
    dashboard.write(step(3, 4.0), step(4, 5.0))
    assert stream.steps(2) == [3, 4]
    stream.close()


def test_reader_that_comes_back_gets_what_it_missed_and_nothing_twice(dashboard: Dashboard) -> None:
    picture = dashboard.get("/api/history")
    dashboard.write(step(3, 4.0))
    stream = Stream(dashboard, **{"Last-Event-ID": picture["id"]})
    assert stream.steps(1) == [3]
    stream.close()
    dashboard.write(step(4, 5.0), step(5, 6.0))
    again = Stream(dashboard, **{"Last-Event-ID": stream.last_id})
    assert again.steps(2) == [4, 5]
    again.close()


def test_ids_stay_good_when_the_dashboard_is_started_again(dashboard: Dashboard) -> None:
    place = dashboard.get("/api/history")["id"]
    dashboard.write(step(3, 4.0))
    other = Dashboard(dashboard.path.parent)
    wait_until(lambda: other.get("/api/history")["status"]["step"] == 3, "the whole curve")
    stream = Stream(other, **{"Last-Event-ID": place})
    assert stream.steps(1) == [3]
    stream.close()
    other.close()


@pytest.mark.parametrize("last_id", ["0-5", "nonsense", "-", "{file}-999999", "{file}-x"])
def test_reader_of_another_history_is_told_to_read_again(dashboard: Dashboard, last_id: str) -> None:
    file = dashboard.get("/api/history")["id"].partition("-")[0]
    stream = Stream(dashboard, **{"Last-Event-ID": last_id.format(file=file)})
    assert stream.next()["event"] == "reset"
    assert stream.next() == {}, "and the stream ends"
    stream.close()


def test_reader_of_what_a_resumed_attempt_trains_again_is_told_to_read_again(dashboard: Dashboard) -> None:
    stream = Stream(dashboard)
    stream.next()
    dashboard.write(run(10.0, attempt=2, resumed_from_step=1), step(2, 12.0))
    while (name := stream.next()["event"]) == "update":  # a page hears every few seconds how the run stands
        pass
    assert name == "reset"
    stream.close()
    assert dashboard.get("/api/history")["series"]["loss"]["step"] == [1, 2]


def test_quiet_stream_still_says_how_the_run_stands(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "HEARTBEAT_S", 0.05)
    stream = Stream(dashboard)
    for _ in range(3):
        assert json.loads(stream.next()["data"])["status"]["state"] == "running"
    stream.close()


def test_browser_that_goes_away_frees_its_stream(dashboard: Dashboard) -> None:
    streams = [Stream(dashboard) for _ in range(3)]
    for stream in streams:
        stream.next()
    assert dashboard.get("/api/health") == {"streams": 3}
    for stream in streams:
        stream.close()
    wait_until(lambda: dashboard.get("/api/health") == {"streams": 0}, "streams of closed pages")


def test_end_of_the_dashboard_ends_its_streams_with_what_came_last(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path)
    dashboard.write(run(0.0), step(1, 1.0))
    wait_until(lambda: dashboard.get("/api/history")["status"]["step"] == 1, "the first records")
    stream = Stream(dashboard)
    stream.next()
    dashboard.close()
    while update := stream.next():
        assert update["event"] == "update"
    stream.close()


@pytest.mark.parametrize(
    ("headers", "words"),
    [({}, "needs the dashboard's token"), ({"Authorization": "Bearer wrong"}, "token is wrong")],
)
def test_control_without_the_token_is_refused_and_says_why(
    dashboard: Dashboard, headers: dict[str, str], words: str
) -> None:
    for method, path, body in (
        ("POST", "/api/control", {"action": "stop", "request_id": "1"}),
        ("GET", "/api/token", None),
    ):
        status, answer, sent = dashboard.ask(method, path, body, **headers)
        assert status == 401
        assert words in answer["detail"]
        assert sent["www-authenticate"] == "Bearer"
    assert dashboard.driver.taken == []


def test_actions_reach_the_driver_with_their_request_id(dashboard: Dashboard) -> None:
    assert dashboard.ask("GET", "/api/token", **TOKEN)[0] == 204
    scale = {"action": "scale", "targets": 3, "request_id": "a"}
    assert dashboard.control(scale, **TOKEN) == (200, {"message": "scale it is"})
    assert dashboard.control({"action": "pause", "request_id": "b"}, **TOKEN)[0] == 200
    assert dashboard.driver.taken == [
        ("demo-1", Scale(action="scale", targets=3, request_id="a")),
        ("demo-1", Steer(action="pause", request_id="b")),
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"action": "scale", "targets": -1, "request_id": "a"}, "targets"),
        ({"action": "scale", "targets": 10**6, "request_id": "a"}, "4096"),
        ({"action": "scale", "request_id": "a"}, "targets"),
        ({"action": "explode", "request_id": "a"}, "action"),
        ({"action": "pause"}, "request_id"),
        ({"action": "pause", "request_id": "a", "force": True}, "force"),
        ([], ""),
    ],
)
def test_actions_that_make_no_sense_are_refused_by_name(dashboard: Dashboard, body: Any, words: str) -> None:
    status, answer = dashboard.control(body, **TOKEN)
    assert status == 422
    assert words in answer["detail"]
    assert dashboard.driver.taken == []


def test_what_the_driver_refuses_is_said_in_its_words(dashboard: Dashboard) -> None:
    dashboard.driver.error = UsageError("targets=9 is above target.max_replicas 4")
    assert dashboard.control({"action": "scale", "targets": 9, "request_id": "a"}, **TOKEN) == (
        422,
        {"detail": "targets=9 is above target.max_replicas 4"},
    )
    dashboard.driver.error = SlipstreamError("the run trains no more")
    assert dashboard.control({"action": "pause", "request_id": "a"}, **TOKEN)[0] == 409


def test_run_that_has_ended_cannot_be_steered(dashboard: Dashboard) -> None:
    dashboard.write({"kind": "end", "time_s": 9.0, "outcome": "stopped", "message": "stopped"})
    wait_until(lambda: dashboard.get("/api/history")["status"]["state"] == "stopped", "the end")
    status, answer = dashboard.control({"action": "pause", "request_id": "a"}, **TOKEN)
    assert status == 409
    assert "nothing to steer" in answer["detail"]


def test_page_and_its_parts_are_served_and_nothing_comes_from_elsewhere(dashboard: Dashboard) -> None:
    status, page, headers = dashboard.ask("GET", "/")
    assert status == 200
    assert "script-src 'self';" in headers["content-security-policy"]
    text = page.decode()
    assert "http://" not in text
    assert "https://" not in text
    parts = [part.partition('"')[0] for mark in ('src="', 'href="') for part in text.split(mark)[1:]]
    parts = [part for part in parts if not part.startswith("#")]
    assert {"static/app.js", "static/style.css", "bokeh/bokeh.min.js"} <= set(parts)
    for part in parts:
        assert dashboard.ask("GET", f"/{part}")[0] == 200, part


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/bokeh/../../../__init__.py", "/docs"])
def test_nothing_else_is_served(dashboard: Dashboard, path: str) -> None:
    assert dashboard.ask("GET", path)[0] == 404


def test_page_of_another_name_cannot_read_through_this_machine(dashboard: Dashboard) -> None:
    assert dashboard.ask("GET", "/api/history", Host="evil.example")[0] == 400
    assert dashboard.ask("GET", "/api/history", Host=f"localhost:{dashboard.port}")[0] == 200


def test_reading_beyond_this_machine_needs_the_token(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path, host="0.0.0.0", insecure=True)
    for path in ("/api/history", "/api/events", "/api/health"):
        status, answer, _ = dashboard.ask("GET", path)
        assert status == 401
        assert "token" in answer["detail"]
    assert dashboard.ask("GET", "/api/history", **TOKEN)[0] == 200
    assert dashboard.ask("GET", "/")[0] == 200, "the page itself holds no secret and asks for the token"
    dashboard.close()


def test_page_beyond_this_machine_is_refused_without_tls(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"'0\.0\.0\.0' is not on the loopback interface, and without TLS .*--insecure"
    ):
        listen(Access("0.0.0.0"), 0)


def test_page_is_served_over_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(["127.0.0.1"])
    (tmp_path / "certificate.pem").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)
    dashboard = Dashboard(tmp_path, host="0.0.0.0", certificate=tmp_path / "certificate.pem", key=tmp_path / "key.pem")
    assert published(dashboard.access, dashboard.listener).url.startswith("https://")
    context = ssl.create_default_context(cadata=certificate.decode())
    connection = http.client.HTTPSConnection("127.0.0.1", dashboard.port, timeout=TIMEOUT_S, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/api/history", headers=TOKEN)
        assert connection.getresponse().status == 200
    dashboard.close()


def test_large_request_is_refused_before_it_is_read(dashboard: Dashboard) -> None:
    status, answer, _ = dashboard.ask("POST", "/api/control", {"action": "x" * 20_000})
    assert status == 413
    assert "16384 bytes" in answer["detail"]
    with contextlib.closing(dashboard.connect()) as connection:
        connection.request("POST", "/api/control", iter([b"{"]), encode_chunked=True)
        assert connection.getresponse().status == 413


def test_taken_port_is_named_with_the_way_out(dashboard: Dashboard) -> None:
    with pytest.raises(SlipstreamError, match=rf"127\.0\.0\.1 port {dashboard.port}.*--port 0"):
        listen(dashboard.access, dashboard.port)
