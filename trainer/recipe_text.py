"""The text of a recipe as plain values, and values as text for messages. Whatever the text is, both take little time.

YAML can do much that no recipe needs: make objects, refer to itself, say in a few lines what fills the memory. Here a
text gives mappings, lists, texts, dates and numbers of 64 bits, each written out at most `MAX_VALUES` times, or an
error of one line that says where it is wrong.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from typing import Any

import yaml

from services.replay.urls import safe_url

MAX_TEXT_BYTES = 256 * 1024
"""Of a recipe; the longest that we ship has 3 KiB. The pure-Python reader takes some seconds for this much."""

MAX_VALUES = 10_000
"""Values of a recipe, with what an alias stands for counted at each place: a recipe has about a hundred."""

MAX_DEPTH = 32
"""Of nested values; a recipe has three levels, and Python's stack has room for some hundreds."""

LONGEST_SHOWN = 1_000
"""Characters of a text that a message repeats."""

LONGEST_KEY = 100
"""Characters of a key that a message repeats."""

INT_BOUND = 2**63
"""Numbers lie in [-INT_BOUND, INT_BOUND): what the libraries that get them can hold."""


class TextError(ValueError):
    """A text is no YAML of plain values; the message is one line."""


def parse_yaml(text: str) -> Any:
    """The values of a text.

    Raises:
        TextError: It is too long, no YAML, or holds something else than plain values.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise TextError(f"longer than {MAX_TEXT_BYTES} characters")
    try:
        loader = _PlainLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise TextError(f"{place}{one_line(', '.join(filter(None, (error.context, error.problem))))}") from error
    except yaml.YAMLError as error:
        raise TextError(one_line(str(error))) from error


class _PlainLoader(yaml.SafeLoader):
    """YAML as plain values; a key given twice is an error, where the plain loader keeps the last one without a word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {MAX_DEPTH} levels deep", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # The library's constructors take for granted that a value is what its tag says.
            raise _wrong(node, f"{brief(node.value)} is no {node.tag.rpartition(':')[2]}") from error
        if isinstance(value, int) and not -INT_BOUND <= value < INT_BOUND:
            raise _wrong(node, f"the number {brief(node.value)} has more than 64 bits")
        if isinstance(value, str) and (fault := _fault(value)):
            raise _wrong(node, f"{brief(value)} holds {fault}")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong(node, f"a {node.id} is no mapping")
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise _wrong(key_node, f"{brief(key_node.value)} is given twice")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _wrong(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _fault(text: str) -> str | None:
    """What no file name and no message may hold."""
    if "\0" in text:
        return "a NUL character"
    return "half a surrogate pair" if any("\ud800" <= character <= "\udfff" for character in text) else None


def _check_size(root: yaml.Node) -> None:
    """Raise if a node holds itself, or aliases make too many values of few."""
    sizes: dict[int, int] = {}
    under_way: set[int] = set()

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in under_way:
            raise _wrong(node, "it holds itself")
        under_way.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        if total > MAX_VALUES:
            raise _wrong(node, f"it stands for more than {MAX_VALUES} values")
        under_way.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root)


class _Brief(reprlib.Repr):
    """`repr` in little space, without the passwords of URLs."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxdict = 12
        self.maxother = LONGEST_SHOWN

    def repr_str(self, x: str, level: int) -> str:
        # A text is never cut: half of a URL no longer shows where its password ends.
        return repr(safe_url(x)) if len(x) <= LONGEST_SHOWN else f"<{len(x)} characters>"


def brief(value: Any) -> str:
    """A value for a message: its `repr` as far as that is short, without passwords."""
    return _Brief().repr(value)


def one_line(text: str, longest: int = LONGEST_SHOWN) -> str:
    """A text for a message: on one line, printable, not too long, without passwords."""
    if len(text) > longest:
        return f"<{len(text)} characters>"
    text = " ".join(safe_url(text).split())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
