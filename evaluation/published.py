"""Published accepted lengths, to set beside a user's own: Table 1 of the DSpark paper. No torch.

Measured at temperature 1, without thinking, 2048 new tokens; docs/evaluation.md has the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

COLUMNS = (
    "gsm8k", "math500", "aime25", "mbpp", "humaneval", "livecodebench", "mt-bench", "alpaca", "arena-hard-v2",
)  # fmt: skip

_ROWS: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("Qwen3-4B", "eagle3"): (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
    ("Qwen3-4B", "dflash"): (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    ("Qwen3-4B", "dspark"): (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    ("Qwen3-8B", "eagle3"): (5.30, 4.77, 3.91, 3.96, 4.33, 4.17, 2.66, 2.54, 2.54),
    ("Qwen3-8B", "dflash"): (5.33, 4.91, 4.07, 4.36, 4.64, 4.39, 3.11, 2.98, 2.81),
    ("Qwen3-8B", "dspark"): (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21),
    ("Qwen3-14B", "eagle3"): (5.24, 4.60, 3.71, 3.81, 4.14, 4.01, 2.62, 2.47, 2.48),
    ("Qwen3-14B", "dflash"): (5.41, 4.84, 3.98, 4.44, 4.59, 4.33, 3.10, 2.94, 2.72),
    ("Qwen3-14B", "dspark"): (6.21, 5.74, 4.94, 5.26, 5.43, 5.02, 3.70, 3.58, 3.13),
    ("Gemma-4-12B", "eagle3"): (5.87, 5.46, 4.83, 4.72, 5.37, 4.16, 3.19, 3.06, 2.72),
    ("Gemma-4-12B", "dflash"): (5.45, 5.04, 4.22, 4.39, 4.95, 3.70, 2.98, 2.84, 2.59),
    ("Gemma-4-12B", "dspark"): (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92),
}

_NAMES = {
    "qwen3-4b": "Qwen3-4B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-14b": "Qwen3-14B",
    "gemma-4-12b": "Gemma-4-12B",
    "gemma-4-12b-it": "Gemma-4-12B",
}


def published_target(target: str) -> str | None:
    """The published target that a folder or hub name is; None for every other, fine-tuned ones included.

    Args:
        target: As the user named it; a folder of the hub's cache is known by the name that it has there.
    """
    path = target.lower().rstrip("/")
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/[^/]+$", path)
    return _NAMES.get(cached[1] if cached else path.rpartition("/")[2])


def published_row(target: str, algorithm: str) -> dict[str, float]:
    """Published τ by task; empty where there is none for this target and kind of drafter."""
    row = _ROWS.get((published_target(target) or "", algorithm), ())
    return dict(zip(COLUMNS, row, strict=True)) if row else {}
