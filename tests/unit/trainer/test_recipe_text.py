from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from trainer.recipe_text import (
    LONGEST_SHOWN,
    MAX_DEPTH,
    MAX_TEXT_BYTES,
    MAX_VALUES,
    TextError,
    brief,
    one_line,
    parse_yaml,
)

BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
BILLION_KEYS = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def test_plain_values_anchors_and_merges_are_read() -> None:
    text = "a: &a {n: 1, x: .5}\nb: {<<: *a, n: 2}\nc: [true, null, text, 2026-01-02]\n"
    assert parse_yaml(text) == {
        "a": {"n": 1, "x": 0.5},
        "b": {"n": 2, "x": 0.5},
        "c": [True, None, "text", datetime.date(2026, 1, 2)],
    }
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 2026-13-45", "line 1, column 4: '2026-13-45' is no timestamp"),
        ("a: !!int foo", "'foo' is no int"),
        ("a: !!int ''", "'' is no int"),
        ("a: !!float ''", "'' is no float"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!timestamp noon", "'noon' is no timestamp"),
        ("a: !!map foo", "a scalar is no mapping"),
        ("a: !!set [b]", "a sequence is no mapping"),
        ("a:\n  b: 1\n  b: 2", "line 3, column 3: 'b' is given twice"),
        ("a: " + "9" * 5000, "<5000 characters> is no int"),
        ("a: 0x" + "f" * 5000, "the number <5002 characters> has more than 64 bits"),
        ("a: 9223372036854775808", "the number '9223372036854775808' has more than 64 bits"),
        (r'a: "b\0"', r"'b\x00' holds a NUL character"),
        (r'"\ud800": 1', r"'\ud800' holds half a surrogate pair"),
        ("a: &a [*a]", "line 1, column 4: it holds itself"),
        ("&a {a: *a}", "line 1, column 1: it holds itself"),
        (BILLION, f"it stands for more than {MAX_VALUES} values"),
        (BILLION_KEYS, f"it stands for more than {MAX_VALUES} values"),
        ("[" * 50_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("a: *nowhere", "found undefined alias"),
        ("[1, 2", "expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "mapping values are not allowed here"),
        ("\x07", "special characters are not allowed"),
        ("a" * (MAX_TEXT_BYTES + 1), f"longer than {MAX_TEXT_BYTES} characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_text_that_is_no_plain_values_is_refused_on_one_line(text: str, says: str) -> None:
    with pytest.raises(TextError) as caught:
        parse_yaml(text)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("tag", ["apply:pathlib.Path.touch", "new:pathlib.Path", "apply:os.mkdir"])
def test_no_tag_makes_an_object(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    with pytest.raises(TextError, match="could not determine a constructor for the tag"):
        parse_yaml(f"a: !!python/object/{tag} [{made}]")
    assert not made.exists()


def test_value_in_a_message_is_short_and_shows_no_password() -> None:
    url = "redis://me:secret@cache:6379/0"
    assert brief({"a": [url]}) == "{'a': ['redis://me:***@cache:6379/0']}"
    assert "secret" not in brief("x" * LONGEST_SHOWN + url)
    assert brief("x" * (LONGEST_SHOWN + 1)) == f"<{LONGEST_SHOWN + 1} characters>"
    assert len(brief([["x" * LONGEST_SHOWN] * 5] * 5000)) < 10 * 5 * 1100 * 2
    assert one_line(f"a\n\x07 b of {url}") == r"a \x07 b of redis://me:***@cache:6379/0"
    assert one_line("x" * 200, longest=100) == "<200 characters>"
