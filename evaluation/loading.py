"""Target and drafter in memory, ready to decode together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafters.checkpoint import load_drafter
from drafters.drafter import Drafter
from evaluation.fitting import check_fits
from services.errors import CheckpointError, TargetError


def load_target(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The target of a model folder, in evaluation mode.

    Raises:
        TargetError: It cannot be loaded.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TargetError(f"cannot load the target at {folder} for evaluation: {error}") from error
    nn.Module.to(model, device)  # transformers wraps its own `to` in a type that mypy cannot call
    return model.eval()


def load_drafter_of(target: PreTrainedModel, checkpoint: str, dtype: torch.dtype, device: torch.device) -> Drafter:
    """The drafter of a checkpoint folder.

    Raises:
        CheckpointError: The folder holds no drafter, or one of another target.
    """
    try:
        drafter = load_drafter(checkpoint, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the drafter at {checkpoint}: {error}") from error
    try:
        check_fits(drafter, target, f"the drafter at {checkpoint}")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return drafter.to(device)
