"""Conversations made from the functions of the running Python's own standard library.

They need no download, everybody has them, and every machine has slightly different ones: what the demo's target
was trained on and what the demo's drafter is trained on are held apart from what is evaluated by module name.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 10
"""One module in this many is held out, chosen by a hash of its name, so that the choice is the same everywhere."""

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data"}
)
"""Folders that are not the library's own voice: tests, generated tables, vendored packages."""

MIN_LINES = 6
MAX_CHARACTERS = 1400
GIVEN_FRACTION = 0.3
"""The part of a function's lines that the user's turn gives; a docstring is always given whole."""


class LibraryFunction(NamedTuple):
    """One function of the standard library, cut into what is given and what is to be completed."""

    module: str
    qualified_name: str
    given: str
    rest: str

    @property
    def name(self) -> str:
        """Module and qualified name."""
        return f"{self.module}.{self.qualified_name}"

    @property
    def split(self) -> Split:
        """The part that the function's whole module belongs to."""
        return split_of(self.module)

    def conversation(self) -> list[dict[str, str]]:
        """The function as a chat: the user gives its beginning, the assistant completes it."""
        return [{"role": "user", "content": self.given}, {"role": "assistant", "content": self.rest}]


def split_of(module: str) -> Split:
    """The part that a module belongs to, the same on every machine."""
    digest = hashlib.sha256(module.encode()).digest()
    return "heldout" if digest[0] % HELDOUT_ONE_IN == 0 else "train"


def library_functions(root: Path | None = None, *, split: Split | None = None) -> Iterator[LibraryFunction]:
    """Yield the functions and methods of the standard library in a fixed order.

    Args:
        root: Folder to read; the running Python's own standard library by default.
        split: Only the modules of this part; None is both.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        module = ".".join(relative.with_suffix("").parts)
        if split not in (None, split_of(module)):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files are deliberately broken or in other encodings
            continue
        yield from _functions_of(tree, source.splitlines(), module)


def _functions_of(tree: ast.Module, lines: list[str], module: str) -> Iterator[LibraryFunction]:
    scopes: list[tuple[str, ast.AST]] = [("", tree)]
    while scopes:
        prefix, scope = scopes.pop()
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                cut = _cut(node, lines)
                if cut is not None:
                    yield LibraryFunction(module, f"{prefix}{node.name}", *cut)


def _cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    last = node.end_lineno or node.lineno
    given_until = max(first + round(GIVEN_FRACTION * (last - first)), _end_of_header(node))
    if last - first < MIN_LINES or last - given_until < 2:
        return None
    text = textwrap.dedent("\n".join(lines[first:last]))
    if len(text) > MAX_CHARACTERS:
        return None
    lines_of_text = text.split("\n")
    rest = "\n".join(lines_of_text[given_until - first :])
    # The indentation goes to the given part: a tokenizer may not split it off the newline before it.
    completion = rest.lstrip()
    return text[: len(text) - len(completion)], completion


def _end_of_header(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The last line of the signature, or of the docstring where there is one (1-based, inclusive)."""
    body = node.body[0]
    has_docstring = (
        isinstance(body, ast.Expr) and isinstance(body.value, ast.Constant) and isinstance(body.value.value, str)
    )
    return (body.end_lineno or body.lineno) if has_docstring else body.lineno - 1
