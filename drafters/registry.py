"""Which drafters and which target families there are. Torch-free: the driver asks it before anything heavy loads.

A new algorithm is one module with a `Drafter` and one row in `ALGORITHMS`; a new family is one module in
`drafters.families` and one row in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from drafters.drafter import Drafter
    from drafters.families.family import Family

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Algorithm:
    """One drafter algorithm.

    Attributes:
        home: Module and class, as ``module:class``.
        architecture: What follows the family's prefix in a checkpoint's ``architectures``.
        last_rows: Rows of the target's last hidden state that the loss reads: ``between`` two supervised tokens, or
            ``after`` one.
    """

    home: str
    architecture: str
    last_rows: Literal["between", "after"]

    def load(self) -> type[Drafter]:
        """Import the class."""
        drafter: type[Drafter] = _import(self.home)
        return drafter


ALGORITHMS: Mapping[str, Algorithm] = {
    "dspark": Algorithm("drafters.dspark:DSparkDrafter", "DSparkModel", "between"),
}

FAMILIES: Mapping[str, str] = {
    "qwen3": "drafters.families.qwen3:QWEN3",
}
"""Target model type → module and object of its `Family`."""


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    return _find(ALGORITHMS, name, "algorithm")


def check_family(model_type: str) -> None:
    """Check that targets of a model type can be drafted for, without importing anything.

    Raises:
        ValueError: There is no such family; the message lists those there are.
    """
    _find(FAMILIES, model_type, "family for target model type")


def find_family(model_type: str) -> Family:
    """Import the family of a target's model type.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    family: Family = _import(_find(FAMILIES, model_type, "family for target model type"))
    return family


def algorithm_of_architecture(architecture: str, model_type: str) -> str:
    """Name of the algorithm that wrote a checkpoint with this ``architectures`` entry.

    Raises:
        ValueError: Neither a known algorithm nor a known family matches.
    """
    prefix = find_family(model_type).architecture_prefix
    known = {f"{prefix}{algorithm.architecture}": name for name, algorithm in ALGORITHMS.items()}
    return _find(known, architecture, f"{model_type} drafter architecture")


def _find(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; there is: {', '.join(sorted(table))}")
    return table[name]


def _import(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)
