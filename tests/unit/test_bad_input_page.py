from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?P<given>[^|]+) \| (?P<gets>[^|]+) \| (?P<tests>`test_[^|]+`) \|$")


def rows() -> list[re.Match[str]]:
    lines = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    found = [match for line in table if (match := ROW.match(line))]
    assert len(found) == len(table), "each row names what is given, what comes of it, and its tests"
    return found


def test_every_test_that_the_page_names_exists() -> None:
    existing = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    named = [name for row in rows() for name in re.findall(r"`(\w+)`", row["tests"])]
    assert len(named) > 40
    assert [name for name in named if name not in existing] == []


def test_no_row_stands_twice() -> None:
    given = [row["given"] for row in rows()]
    assert len(given) == len(set(given)) >= 20
