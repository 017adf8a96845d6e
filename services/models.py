"""Where a target's files are and what its config says, without importing torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from services.errors import TargetError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
INDEX_FILE = "model.safetensors.index.json"


class ModelShape(NamedTuple):
    """The numbers of a decoder-only model that drafters and tables depend on."""

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_tokens: int
    fingerprint: str


def find_model(name: str, *, weights: bool) -> Path:
    """The local folder of a model: the folder itself, or a hub name's files, downloaded if need be.

    Args:
        name: Folder, or hub name such as ``Qwen/Qwen3-4B``.
        weights: Whether the weights are wanted too; config, tokenizer and the weights' index always are.

    Raises:
        TargetError: There is no such folder, and the hub does not have it or does not answer.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # only a hub name pays for this import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", INDEX_FILE, *TOKENIZER_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TargetError(
            f"target {name!r} is neither a folder here nor a model the hub gives: {error}. "
            "Give target.model a local Hugging Face folder or a hub name."
        ) from error


def read_shape(folder: Path) -> ModelShape:
    """Read ``config.json`` of a model folder; a nested text config is what counts.

    Raises:
        TargetError: The config is missing, no JSON, or lacks a number.
    """
    config = text_values(folder)
    try:
        return ModelShape(
            model_type=config["model_type"],
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            max_tokens=config.get("max_position_embeddings", 0),
            fingerprint=_fingerprint(folder),
        )
    except KeyError as error:
        raise TargetError(f"{folder / 'config.json'} has no {error}: is it a decoder-only language model?") from error


def text_values(folder: Path) -> dict[str, Any]:
    """The values of a model folder's text config: of ``config.json``, or of the text config nested in it.

    Raises:
        TargetError: The config is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        outer: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot read {path}: {error}") from error
    if not isinstance(outer, dict):
        raise TargetError(f"cannot read {path}: it is a JSON {type(outer).__name__}, not an object")
    inherited = {name: outer[name] for name in ("model_type", "tie_word_embeddings") if name in outer}
    return inherited | (outer.get("text_config") or outer)


def _fingerprint(folder: Path) -> str:
    """Hash of the config and, where weights are in several files, of their index.

    Not of the weights themselves: whoever has no need of them must find the same fingerprint without downloading them.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    index = folder / INDEX_FILE
    if index.exists():
        digest.update(index.read_bytes())
    return digest.hexdigest()[:32]
