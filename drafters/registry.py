"""Which drafters and which target families there are. Torch-free: the driver asks it before anything heavy loads.

A new algorithm is one module with a `Drafter` and one row in `ALGORITHMS`; a new family is one module in
`drafters.families` and one row in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from drafters.families.dense import dense_values

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
    "dflash": Algorithm("drafters.dflash:DFlashDrafter", "DSparkModel", "between"),
    "eagle3": Algorithm("drafters.eagle3:Eagle3Drafter", "Eagle3Model", "after"),
}

FAMILIES: Mapping[str, str] = {
    "gemma4_text": "drafters.families.gemma4:GEMMA4",
    "gemma4_unified_text": "drafters.families.gemma4:GEMMA4",
    "llama": "drafters.families.llama:LLAMA",
    "qwen2": "drafters.families.llama:QWEN2",
    "qwen2_moe": "drafters.families.llama:QWEN2",
    "qwen3": "drafters.families.qwen3:QWEN3",
    "qwen3_moe": "drafters.families.qwen3:QWEN3",
}
"""Model type of a target's text config → module and object of its `Family`."""

GENERIC_FAMILY = FAMILIES["llama"]
"""Family of all other model types."""


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    return _find(ALGORITHMS, name, "algorithm")


def check_target(text_values: Mapping[str, Any]) -> None:
    """Check that a target can be drafted for, by its text config alone and without importing torch.

    Args:
        text_values: The JSON of the target's text config.

    Raises:
        ValueError: Its model type is of no family here, and its config is not that of a Llama-like decoder.
    """
    if text_values.get("model_type") not in FAMILIES:
        dense_values(text_values)


def find_family(model_type: str) -> Family:
    """Import the family of a target's model type; the generic one for types that have no row."""
    family: Family = _import(FAMILIES.get(model_type, GENERIC_FAMILY))
    return family


def algorithm_of_architecture(architecture: str, model_type: str, *, has_heads: bool) -> str:
    """Name of the algorithm that wrote a checkpoint with this ``architectures`` entry.

    Args:
        architecture: The entry.
        model_type: Of the checkpoint's config.
        has_heads: Whether the checkpoint has a Markov or a confidence head; DFlash is DSpark without both.

    Raises:
        ValueError: Neither a known algorithm nor a known family matches.
    """
    prefix = find_family(model_type).architecture_prefix
    known = {f"{prefix}{ALGORITHMS[name].architecture}": name for name in ("dflash", "dspark", "eagle3")}
    name = _find(known, architecture, f"{model_type} drafter architecture")
    return "dflash" if name == "dspark" and not has_heads else name


def _find(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; there is: {', '.join(sorted(table))}")
    return table[name]


def _import(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)
