from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.errors import PromptError
from services.prompts.sources import load_conversations

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EXPECTED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(folder: Path, *lines: object) -> Path:
    path = folder / "chats.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def load(path: Path, *, strict: bool = False):
    return load_conversations(str(path), split="train", strict=strict)


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 7},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
    ],
)
def test_known_shapes_give_the_same_conversation(tmp_path, line):
    assert load(write(tmp_path, line)).items[0] == EXPECTED


def test_turns_are_the_users(tmp_path):
    items = load(write(tmp_path, {"turns": ["a", "c"]})).items
    assert items[0] == [{"role": "user", "content": "a"}, {"role": "user", "content": "c"}]


def test_bom_blank_lines_and_crlf_are_passed_over(tmp_path):
    path = tmp_path / "chats.jsonl"
    text = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n  \n" + text)
    conversations = load(path)
    assert list(conversations.items) == [EXPECTED, EXPECTED]
    assert conversations.rejected == []
    assert [conversations.items.origin(i) for i in (0, 1)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "not JSON: .* at column 2"),
        (b'{"messages": "\xff"}', "not UTF-8: invalid start byte at byte 14"),
        ([1], "a JSON list, not an object"),
        ({"text": "a"}, r"none of 'messages', 'conversations', 'turns' \(its keys: text\)"),
        ({"messages": []}, "'messages' must be a list with at least one turn"),
        ({"messages": ["a"]}, r"messages\[0\] is a JSON str, not an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content is a JSON NoneType, not a string"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value is a JSON int"),
        ({"turns": ["a", 2]}, r"turns\[1\] is a JSON int"),
        (b'{"turns": ["\\ud800"]}', r"turns\[0\] holds half a surrogate pair at character 0"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_malformed_line_is_counted_with_file_and_line(tmp_path, line, reason):
    path = write(tmp_path, GOOD, line, GOOD)
    conversations = load(path)
    assert len(conversations.items) == 2
    assert len(conversations.rejected) == 1
    assert conversations.rejected[0].startswith(f"{path}:2: ")
    with pytest.raises(PromptError, match=reason):
        load(path, strict=True)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(PromptError, match=r"cannot read prompts file .*gone\.jsonl: No such file"):
        load(tmp_path / "gone.jsonl")


def test_folder_is_an_error(tmp_path):
    with pytest.raises(PromptError, match="is a folder"):
        load(tmp_path)


def test_file_without_conversations_is_an_error_that_quotes_lines(tmp_path):
    with pytest.raises(PromptError, match=r"holds no conversation: 1 malformed lines, such as .*:1: not JSON"):
        load(write(tmp_path, b"nonsense"))
    with pytest.raises(PromptError, match="it is empty"):
        load(write(tmp_path, b""))


def test_utf16_file_is_named_as_such(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(PromptError, match="UTF-16: save it as UTF-8"):
        load(path)


def test_file_changed_during_a_run_is_an_error(tmp_path):
    path = write(tmp_path, GOOD, GOOD)
    items = load(path).items
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    with pytest.raises(PromptError, match=r":2: .*the file was changed"):
        items[1]


def test_digest_follows_the_content(tmp_path):
    first = load(write(tmp_path, GOOD)).digest
    assert load(write(tmp_path, GOOD)).digest == first
    assert load(write(tmp_path, GOOD, GOOD)).digest != first


def test_items_index_like_a_list(tmp_path):
    lines = [{"turns": [str(number)]} for number in range(5)]
    items = load(write(tmp_path, *lines)).items
    assert [items[number][0]["content"] for number in (3, 1)] == ["3", "1"]
    with pytest.raises(IndexError):
        items[5]


def test_library_splits_are_disjoint_by_module():
    train = load_conversations("stdlib", split="train", strict=False)
    heldout = load_conversations("stdlib", split="heldout", strict=False)
    modules = [
        {source.items.origin(i).removeprefix("stdlib:").split(".")[0] for i in range(len(source.items))}
        for source in (train, heldout)
    ]
    names = [{source.items.origin(i) for i in range(len(source.items))} for source in (train, heldout)]
    assert all(modules)
    assert not names[0] & names[1]
    assert len(train.items) > 5 * len(heldout.items)
    assert [message["role"] for message in train.items[0]] == ["user", "assistant"]
    assert train.digest != heldout.digest
