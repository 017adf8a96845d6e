"""Target and drafter in memory, ready to decode together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafters.checkpoint import load_drafter
from drafters.drafter import Drafter
from evaluation.benchmark import BenchmarkSettings
from evaluation.fitting import check_depth, check_fits
from evaluation.origin import check_origin
from services.errors import CheckpointError, TargetError
from services.models import find_model
from services.stop_tokens import find_stop_token_ids


class Models(NamedTuple):
    """A target and a drafter of it."""

    target: PreTrainedModel
    drafter: Drafter
    stop_token_ids: tuple[int, ...]


def load_models(settings: BenchmarkSettings, beside: Models | None = None) -> Models:
    """Load what settings name, and have torch use as many threads as they say.

    Args:
        settings: How to decode.
        beside: Models of the same target, which is then not loaded again.

    Raises:
        TargetError: The target cannot be loaded.
        CheckpointError: The drafter cannot, or is another target's.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    folder = find_model(settings.target, weights=True)
    check_origin(Path(settings.drafter), folder, allow_other_target=settings.allow_other_target)
    target = beside.target if beside else load_target(folder, dtype, device)
    drafter = load_drafter_of(target, settings.drafter, dtype, device)
    return Models(target, drafter, find_stop_token_ids(folder))


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
        check_depth(drafter, target, f"the drafter at {checkpoint}")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return drafter.to(device)
