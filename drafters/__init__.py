"""Drafters: models that guess what a frozen target will say next. Tensors in, losses and drafts out.

Public names load on first use, so that the driver can ask the registry and read settings without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drafters.batch import FeatureBatch
    from drafters.build import build_drafter
    from drafters.checkpoint import load_drafter, save_drafter
    from drafters.config import DrafterConfig
    from drafters.drafter import Drafter, Proposal, TrainingOutput
    from drafters.target_weights import copy_target_embeddings, copy_target_layers

__all__ = [
    "Drafter",
    "DrafterConfig",
    "FeatureBatch",
    "Proposal",
    "TrainingOutput",
    "build_drafter",
    "copy_target_embeddings",
    "copy_target_layers",
    "load_drafter",
    "save_drafter",
]

_HOMES = {
    "Drafter": "drafters.drafter",
    "DrafterConfig": "drafters.config",
    "FeatureBatch": "drafters.batch",
    "Proposal": "drafters.drafter",
    "TrainingOutput": "drafters.drafter",
    "build_drafter": "drafters.build",
    "copy_target_embeddings": "drafters.target_weights",
    "copy_target_layers": "drafters.target_weights",
    "load_drafter": "drafters.checkpoint",
    "save_drafter": "drafters.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
