"""Which tokens end a target's answer. No torch and no transformers: the coordinator asks too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.errors import TargetError


def find_stop_token_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of a target's generation_config.json (one id or a list), else its tokenizer's.

    Raises:
        TargetError: Neither names one, or a file cannot be read.
    """
    try:
        declared = _read(folder / "generation_config.json").get("eos_token_id")
        if declared is None:
            declared = _eos_of_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot tell which token ends an answer of {folder}: {error}") from error
    if declared is None:
        raise TargetError(
            f"{folder} names no end-of-text token: set eos_token_id in generation_config.json, or give stop_token_ids"
        )
    return tuple(declared) if isinstance(declared, list) else (declared,)


def _eos_of_tokenizer(folder: Path) -> int | None:
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    path = folder / "tokenizer.json"
    if text is None or not path.exists():
        return None
    try:
        found: int | None = Tokenizer.from_str(path.read_text(encoding="utf-8")).token_to_id(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
