"""SGLang's format, as its training companion writes it (specs: checkpoints, "SGLang").

Three classes read it. ``LlamaForCausalLMEagle3`` has no head norms and three captured layers, ``DFlashDraftModel``
predicts from masks alone, ``Qwen3DSparkModel`` from the anchor on and always with a Markov head. Layer ids count layer
outputs, as ours do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.checkpoint import CONFIG_NAME, WEIGHTS_NAME, CheckpointFormatError, read_tensors, read_values
from drafters.drafter import Drafter
from drafters.eagle3 import Eagle3Drafter
from drafters.export.formats import (
    TABLES,
    Tables,
    Written,
    check_any_server,
    check_block_family,
    check_one_layer,
    layer_values,
    rebuild,
    refuse,
    take_vocabulary,
    vocabulary_tensors,
)

SERVER = "SGLang"
EAGLE3_CLASS, DFLASH_CLASS, DSPARK_CLASS = "LlamaForCausalLMEagle3", "DFlashDraftModel", "Qwen3DSparkModel"
MIDLAYER = "midlayer."


def to_sglang(drafter: Drafter) -> Written:
    """A drafter as SGLang reads it.

    Raises:
        CannotExportError: None of its classes computes what this drafter does; the message says which recipe line to
            change.
    """
    check_any_server(drafter, SERVER)
    if isinstance(drafter, Eagle3Drafter):
        return _eagle3(drafter)
    check_block_family(drafter, SERVER)
    if min(_layer_ids(drafter)) < 0:
        raise refuse(SERVER, "it captures no embedding output (layer -1)", "drafter.target_layer_ids from 0 on")
    return _dflash(drafter) if drafter.algorithm == "dflash" else _dspark(drafter)


def load_sglang(folder: Path | str, tables: Tables, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a drafter in SGLang's format; on the CPU and in evaluation mode.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        tables: The target's embedding and head, which the format leaves out.
        dtype: What to compute in.

    Raises:
        CheckpointFormatError: A file is missing, broken or of another format, or the two contradict each other.
    """
    folder = Path(folder)
    values, tensors = read_values(folder / CONFIG_NAME), read_tensors(folder / WEIGHTS_NAME)
    architecture = (values.get("architectures") or [None])[0]
    readers: dict[Any, Callable[[Path, Mapping[str, Any], dict[str, Tensor], Tables], dict[str, Any]]] = {
        EAGLE3_CLASS: _read_eagle3,
        DFLASH_CLASS: _read_dflash,
        DSPARK_CLASS: _read_dspark,
    }
    if architecture not in readers or "speculators_model_type" in values:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME}: {architecture!r} is none of {', '.join(readers)}")
    try:
        settings = readers[architecture](folder / WEIGHTS_NAME, values, tensors, tables)
        num_target_layers = values["num_target_layers"]
    except (KeyError, TypeError) as error:
        raise CheckpointFormatError(f"{folder / CONFIG_NAME} is not {architecture}'s: {error!r}") from error
    return rebuild(folder / WEIGHTS_NAME, values, settings, num_target_layers, tensors, dtype)


def _eagle3(drafter: Eagle3Drafter) -> Written:
    settings = drafter.settings
    if settings.layout != "llama" or drafter.family.name != "llama":
        raise refuse(
            SERVER,
            f"its Eagle3 class has three captured layers and no norms on heads, and this drafter has "
            f"{len(_layer_ids(drafter))} layers and {drafter.family.name}'s norms",
            "drafter.layout: llama",
        )
    check_one_layer(drafter, SERVER)
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(drafter.config, name, False)]
    if biased:
        raise refuse(
            SERVER, f"its Eagle3 class has no biases, and this drafter has ({biased[0]})", "drafter.layout: llama"
        )
    vocabulary = vocabulary_tensors(drafter)
    config = _common(drafter, EAGLE3_CLASS) | {
        "draft_vocab_size": len(vocabulary["d2t"]),
        "ttt_length": settings.ttt_length,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": _layer_ids(drafter), "use_aux_hidden_state": True},
    }
    tensors = {
        name.replace("layers.0.", MIDLAYER): tensor
        for name, tensor in drafter.state_dict().items()
        if name not in TABLES
    }
    return Written(config, tensors | vocabulary)


def _dflash(drafter: Drafter) -> Written:
    if drafter.settings.sample_from_anchor:
        raise refuse(
            SERVER,
            "its DFlash class predicts from the masks alone, and this drafter's first slot from the anchor; its DSpark "
            "class, which does, always has a Markov head. vLLM takes the drafter as it is",
            "drafter.sample_from_anchor: false, or drafter.algorithm: dspark",
        )
    return Written(_common(drafter, DFLASH_CLASS) | _block(drafter), _without_tables(drafter))


def _dspark(drafter: Drafter) -> Written:
    settings = drafter.settings
    if not settings.sample_from_anchor:
        raise refuse(
            SERVER,
            "its DSpark class predicts from the anchor on, and this drafter from the masks alone",
            "drafter.sample_from_anchor: true",
        )
    if not settings.markov_rank:
        raise refuse(SERVER, "its DSpark class always has a Markov head", "drafter.markov_rank: 256")
    heads = {
        "markov_rank": settings.markov_rank,
        "markov_head_type": settings.markov_head_type,
        "enable_confidence_head": settings.enable_confidence_head,
        "confidence_head_with_markov": settings.enable_confidence_head and settings.confidence_head_with_markov,
    }
    config = _common(drafter, DSPARK_CLASS) | _block(drafter, projector_type="dspark") | heads
    return Written(config, _without_tables(drafter))


def _common(drafter: Drafter, architecture: str) -> dict[str, Any]:
    dtype = str(drafter.lm_head.weight.dtype).removeprefix("torch.")
    return layer_values(drafter.config) | {
        "architectures": [architecture],
        "model_type": drafter.family.name,
        "dtype": dtype,
        "torch_dtype": dtype,  # where older readers look
        "num_target_layers": drafter.config.num_target_layers,
    }


def _block(drafter: Drafter, **more: Any) -> dict[str, Any]:
    chosen = {"mask_token_id": drafter.settings.mask_token_id, "target_layer_ids": _layer_ids(drafter)}
    return {
        "block_size": drafter.settings.block_size,
        "sample_from_anchor": drafter.settings.sample_from_anchor,
        "dflash_config": chosen | more,
    }


def _without_tables(drafter: Drafter) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in drafter.state_dict().items() if name not in TABLES}


def _layer_ids(drafter: Drafter) -> list[int]:
    assert drafter.settings.target_layer_ids is not None, "settings are resolved"
    return list(drafter.settings.target_layer_ids)


def _read_eagle3(path: Path, values: Mapping[str, Any], tensors: dict[str, Tensor], tables: Tables) -> dict[str, Any]:
    offsets = take_vocabulary(path, tensors, tables.lm_head)
    for name in [name for name in tensors if name.startswith(MIDLAYER)]:
        tensors["layers.0." + name.removeprefix(MIDLAYER)] = tensors.pop(name)
    tensors["embed_tokens.weight"] = tables.embed_tokens
    if offsets is not None:
        tensors["d2t"] = offsets
    return {
        "algorithm": "eagle3",
        "layout": "llama",
        "num_draft_layers": values["num_hidden_layers"],
        "target_layer_ids": values["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
        "ttt_length": values["ttt_length"],
        "draft_vocab_size": values["draft_vocab_size"],
    }


def _read_dflash(path: Path, values: Mapping[str, Any], tensors: dict[str, Tensor], tables: Tables) -> dict[str, Any]:
    return _read_block(values, tensors, tables) | {"algorithm": "dflash", "sample_from_anchor": False}


def _read_dspark(path: Path, values: Mapping[str, Any], tensors: dict[str, Tensor], tables: Tables) -> dict[str, Any]:
    return _read_block(values, tensors, tables) | {
        "algorithm": "dspark",
        "sample_from_anchor": True,
        "markov_rank": values["markov_rank"],
        "markov_head_type": values["markov_head_type"],
        "enable_confidence_head": values["enable_confidence_head"],
        "confidence_head_with_markov": values["confidence_head_with_markov"],
    }


def _read_block(values: Mapping[str, Any], tensors: dict[str, Tensor], tables: Tables) -> dict[str, Any]:
    tensors.update(zip(TABLES, tables, strict=True))
    chosen = values["dflash_config"]
    return {
        "num_draft_layers": values["num_hidden_layers"],
        "block_size": values["block_size"],
        "mask_token_id": chosen["mask_token_id"],
        "target_layer_ids": chosen["target_layer_ids"],
    }
