"""What an optimizer holds, as whole tensors by parameter name: for any number of ranks, any ZeRO stage, any precision.

    training_state/weights.safetensors       the float32 weights that AdamW updates (the masters of a bf16 run)
    training_state/exp_avg.safetensors       first moments
    training_state/exp_avg_sq.safetensors    second moments
    training_state/state.json                steps done, updates of the optimizer, the newest losses

Why not DeepSpeed's own checkpoints: those are pickles of each rank's flat partition, which load into as many ranks at
the same stage only, and their universal form needs a conversion in between and pickles again. Whole float32 tensors
lose nothing, name what they are, and are cut anew by whoever reads them. One kind of tensor is gathered at a time, so
that rank 0 holds 4 bytes a trainable parameter on its CPU.

No state of a random generator is kept: training draws from none but those that are seeded for each use of a prompt, so
neither a resume nor a change of ranks alters what is drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from services.contracts import Record
from services.errors import CheckpointError
from services.reading import first_fault

FOLDER = "training_state"
FIGURES = "state.json"
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHTS, *MOMENTS)


class TrainingFigures(Record):
    """What is no tensor.

    Attributes:
        step: Optimizer steps done.
        updates: Of them, those that changed weights: AdamW's own count, which corrects its bias.
        last_losses: The newest losses, oldest first.
    """

    step: int = Field(ge=1)
    updates: int = Field(ge=0)
    last_losses: tuple[float, ...]


class Trainable(NamedTuple):
    """A parameter that is trained, and its name in the module."""

    name: str
    parameter: nn.Parameter


def gather(engine: Any, kind: str) -> dict[str, Tensor]:
    """All tensors of one kind, float32 on the CPU of rank 0; nothing on the others, which must call it, too."""
    whole: dict[str, Tensor] = {}
    for name, parameter in trainable(engine.module):
        tensor = _gather(engine, parameter, kind)
        if dist.get_rank() == 0:
            whole[name] = tensor.detach().float().cpu().contiguous()
    return whole


def write_tensors(checkpoint: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    """Write what rank 0 gathered of one kind.

    Raises:
        OSError: It cannot be written.
        SafetensorError: Likewise.
    """
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    save_file(tensors, _file(checkpoint / FOLDER, kind))


def write_figures(checkpoint: Path, engine: Any, *, step: int, last_losses: Sequence[float]) -> None:
    """Write what is no tensor; rank 0 alone calls it.

    Raises:
        OSError: It cannot be written.
    """
    figures = TrainingFigures(step=step, updates=_updates(engine), last_losses=tuple(last_losses))
    (checkpoint / FOLDER / FIGURES).write_text(figures.model_dump_json() + "\n", encoding="utf-8")


def read_state(engine: Any, checkpoint: Path) -> TrainingFigures:
    """Bring a fresh engine to the state in a checkpoint's folder. All ranks call it, and all read it.

    Raises:
        CheckpointError: Something is missing, cut short, or of another drafter.
    """
    folder = checkpoint / FOLDER
    figures = read_figures(checkpoint)
    _make_moments(engine, figures.updates)
    parameters = trainable(engine.module)
    for kind in KINDS:
        path = _file(folder, kind)
        with _opened(path) as tensors:
            _check_names(path, tensors.keys(), [name for name, _ in parameters])
            for name, parameter in parameters:
                _scatter(engine, parameter, kind, _read(tensors, path, name, parameter))
    return figures


def read_figures(checkpoint: Path) -> TrainingFigures:
    """What a checkpoint's state says that is no tensor.

    Raises:
        CheckpointError: It is missing or broken.
    """
    path = checkpoint / FOLDER / FIGURES
    try:
        return TrainingFigures.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        fault = first_fault(error) if isinstance(error, ValueError) else error
        raise CheckpointError(
            f"cannot read {path}: {fault}; nothing can resume from this checkpoint: point "
            "step_latest to another step_<N>, or remove it to start anew"
        ) from error


def trainable(module: nn.Module) -> list[Trainable]:
    """The parameters that are trained, in the module's order; frozen ones come from the target again."""
    return [Trainable(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _gather(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """One whole float32 tensor; with ZeRO all ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        state: Tensor = parameter if kind == WEIGHTS else engine.optimizer.state[parameter][kind]
        return state
    whole: Tensor = (
        safe_get_full_fp32_param(parameter) if kind == WEIGHTS else safe_get_full_optimizer_state(parameter, kind)
    )
    return whole


def _scatter(engine: Any, parameter: nn.Parameter, kind: str, whole: Tensor) -> None:
    """Put a whole tensor where this rank keeps its part of it, and weights into the module, too."""
    stage = engine.zero_optimization_stage()
    if kind == WEIGHTS:
        _set_weight(engine, parameter, whole)
    if stage == 0:
        if kind != WEIGHTS:
            engine.optimizer.state[parameter][kind].copy_(whole)
    elif stage < 3:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, kind)
    else:
        # The call for whole tensors reads beyond their end where ranks do not share a tensor evenly.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = _part_of_rank(whole, parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        if kind == WEIGHTS:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)


def _set_weight(engine: Any, parameter: nn.Parameter, whole: Tensor) -> None:
    """Set the weight that the forward pass reads, rounded to its dtype as the optimizer does."""
    if engine.zero_optimization_stage() < 3:
        parameter.data.copy_(whole)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(whole)


def _part_of_rank(whole: Tensor, num_elements: int) -> Tensor:
    """This rank's share of a tensor under stage 3: as many elements for every rank, zeros beyond the tensor's end."""
    start = dist.get_rank() * num_elements
    mine = whole.flatten()[start : start + num_elements]
    return torch.cat([mine, mine.new_zeros(num_elements - len(mine))])


def _make_moments(engine: Any, updates: int) -> None:
    """Give a fresh optimizer the moments that AdamW itself would make at its first step, to be filled."""
    optimizer, tensors = _adamw(engine)
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.tensor(float(updates), dtype=torch.float32, device=tensor.device),
            **{kind: torch.zeros_like(tensor) for kind in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # what DeepSpeed does after its first step


def _updates(engine: Any) -> int:
    """How often the optimizer has changed the weights: the same for all of them."""
    optimizer, tensors = _adamw(engine)
    updates = {int(optimizer.state[tensor]["step"]) for tensor in tensors}
    assert len(updates) == 1, f"parameters were updated {sorted(updates)} times: DeepSpeed updates all or none"
    return updates.pop()


def _adamw(engine: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """This rank's AdamW and the tensors it updates: parameters, or flat float32 parts of many."""
    stage = engine.zero_optimization_stage()
    optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    if stage == 3:  # DeepSpeed lends them to the optimizer for its step only
        return optimizer, list(engine.optimizer.fp32_partitioned_groups_flat)
    return optimizer, [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _file(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.safetensors"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; point step_latest to another step_<N>, or remove it to start anew"
        ) from error


def _check_names(path: Path, found: list[str], wanted: list[str]) -> None:
    if missing := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: it belongs to a drafter of other settings")
    if unknown := sorted(set(found) - set(wanted)):
        raise CheckpointError(f"{path} has {', '.join(unknown)}, which this drafter has not: its settings differ")


def _read(tensors: Any, path: Path, name: str, parameter: nn.Parameter) -> Tensor:
    whole: Tensor = tensors.get_tensor(name)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if whole.shape != shape:
        raise CheckpointError(f"{path}: {name} is {list(whole.shape)} instead of {list(shape)}")
    return whole
