"""Real speculative decoding of a drafter, and what it measures.

Public names load on first use, so that settings and reports can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.batch_decoder import BatchDecoder
    from evaluation.config import EvaluationConfig
    from evaluation.decode import SpeculativeOutput, greedy_generate, plain_generate, speculative_generate
    from evaluation.evaluator import Evaluator
    from evaluation.report import Divergence, Report

_HOMES = {
    "BatchDecoder": "batch_decoder",
    "Divergence": "report",
    "EvaluationConfig": "config",
    "Evaluator": "evaluator",
    "Report": "report",
    "SpeculativeOutput": "decode",
    "greedy_generate": "decode",
    "plain_generate": "decode",
    "speculative_generate": "decode",
}

__all__ = [
    "BatchDecoder",
    "Divergence",
    "EvaluationConfig",
    "Evaluator",
    "Report",
    "SpeculativeOutput",
    "greedy_generate",
    "plain_generate",
    "speculative_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
