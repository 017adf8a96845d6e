"""Which tokens end a target's answer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from services.errors import TargetError


def find_stop_token_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of a target's generation_config.json (one id or a list), else its tokenizer's.

    Raises:
        TargetError: Neither names one, or a file cannot be read.
    """
    path = folder / "generation_config.json"
    try:
        declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if declared is None:
            declared = AutoTokenizer.from_pretrained(folder).eos_token_id
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot tell which token ends an answer of {folder}: {error}") from error
    if declared is None:
        raise TargetError(
            f"{folder} names no end-of-text token: set eos_token_id in generation_config.json, or give stop_token_ids"
        )
    return tuple(declared) if isinstance(declared, list) else (declared,)
