from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evaluation.task_sources import fetch, find_in_folder, load_turns
from evaluation.tasks import MATH_SUFFIX, TASKS, HubDataset, JsonFiles
from services.errors import PromptError, UsageError


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server and the folder that it serves."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def write_rows(path: Path, *rows: object) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def read_turns(path: Path) -> list[list[str]]:
    return [json.loads(line)["turns"] for line in path.read_text().splitlines()]


def ignore(text: str) -> None:
    pass


def test_dataset_becomes_a_file_of_turns_and_is_downloaded_once(tmp_path):
    pytest.importorskip("datasets")
    source = tmp_path / "gsm8k"
    source.mkdir()
    write_rows(source / "test.jsonl", {"question": "1+1?", "answer": "2"}, {"question": "é?", "answer": "3"})
    task = replace(TASKS["gsm8k"], source=HubDataset(str(source), "test"))
    said: list[str] = []
    path = fetch(task, tmp_path / "cache", said.append)
    assert read_turns(path) == [[f"1+1?{MATH_SUFFIX}"], [f"é?{MATH_SUFFIX}"]]
    assert len(said) == 1
    assert "gsm8k" in said[0]
    (source / "test.jsonl").unlink()
    assert fetch(task, tmp_path / "cache", said.append) == path
    assert len(said) == 1


def test_missing_dataset_names_it_and_the_way_out(tmp_path):
    pytest.importorskip("datasets")
    task = replace(TASKS["gsm8k"], source=HubDataset(str(tmp_path / "nowhere"), "test"))
    with pytest.raises(PromptError, match=r"cannot download .*nowhere.*--tasks-dir"):
        fetch(task, tmp_path / "cache", ignore)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PromptError, match=r"slipstream-distill\[datasets\].*--tasks-dir"):
        fetch(TASKS["gsm8k"], tmp_path, ignore)


def test_files_on_the_web_are_read_in_their_order(tmp_path, web):
    url, folder = web
    write_rows(folder / "1.jsonl", {"prompt": "a", "uid": 1}, {"prompt": "b"})
    write_rows(folder / "2.jsonl", {"prompt": "c"})
    task = replace(TASKS["arena-hard-v2"], source=JsonFiles((f"{url}/1.jsonl", f"{url}/2.jsonl")))
    assert read_turns(fetch(task, tmp_path / "cache", ignore)) == [["a"], ["b"], ["c"]]


def test_download_that_fails_half_way_leaves_no_file(tmp_path, web):
    url, folder = web
    write_rows(folder / "1.jsonl", {"prompt": "a"})
    task = replace(TASKS["arena-hard-v2"], source=JsonFiles((f"{url}/1.jsonl", f"{url}/gone.jsonl")))
    with pytest.raises(PromptError, match=r"cannot download .*gone\.jsonl.*404"):
        fetch(task, tmp_path / "cache", ignore)
    assert list((tmp_path / "cache").iterdir()) == []


def test_row_without_its_field_is_named(tmp_path, web):
    url, folder = web
    write_rows(folder / "1.jsonl", {"prompt": "a"}, {"question": "b"})
    task = replace(TASKS["arena-hard-v2"], source=JsonFiles((f"{url}/1.jsonl",)))
    with pytest.raises(PromptError, match=r"row 1 of .*arena-hard-v2.*'prompt'.*it has question"):
        fetch(task, tmp_path / "cache", ignore)


def test_task_that_is_not_in_the_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no alpaca\.jsonl in .*--tasks"):
        find_in_folder(TASKS["alpaca"], tmp_path)


def test_only_first_user_turns_are_loaded(tmp_path):
    path = tmp_path / "p.jsonl"
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    write_rows(path, {"turns": ["a", "b"]}, chat)
    assert load_turns(path)[1] == [{"role": "user", "content": "a"}, {"role": "user", "content": "u"}]


def test_malformed_line_of_a_task_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"turns": ["a"]}\n{not json\n{"turns": "b"}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl:2: not JSON.*2 such lines"):
        load_turns(path)


def test_line_without_a_user_turn_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "p.jsonl"
    write_rows(path, {"turns": ["a"]}, {"messages": [{"role": "assistant", "content": "b"}]})
    with pytest.raises(PromptError, match=r"p\.jsonl:2: no user turn"):
        load_turns(path)


def test_empty_task_is_an_error(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n")
    with pytest.raises(PromptError, match=r"p\.jsonl holds no conversation: it is empty"):
        load_turns(path)
