from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from services.errors import CheckpointError
from trainer.saving import restore
from trainer.training_state import KINDS, gather, write_figures, write_tensors


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_engine(module: nn.Module) -> Any:
    """What the state needs of a DeepSpeed engine without ZeRO."""
    optimizer = torch.optim.AdamW([parameter for parameter in module.parameters() if parameter.requires_grad])
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, global_steps=0)


def make_module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[1].bias.requires_grad_(False)
    return module


def train(engine: Any) -> torch.Tensor:
    loss: torch.Tensor = engine.module(torch.ones(4, 3)).square().sum()
    loss.backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return loss.detach()


@pytest.fixture
def engine() -> Any:
    engine = make_engine(make_module())
    for _ in range(3):
        train(engine)
    return engine


@pytest.fixture
def checkpoint(tmp_path: Path, engine: Any) -> Path:
    """What three steps of the engine left."""
    folder = tmp_path / "step_3"
    folder.mkdir()
    for kind in KINDS:
        write_tensors(folder, kind, gather(engine, kind))
    write_figures(folder, engine, step=3, last_losses=[0.5, 0.25])
    return folder


def test_state_goes_on_exactly_where_it_was_left(checkpoint: Path, engine: Any) -> None:
    resumed = make_engine(make_module())
    assert restore(resumed, checkpoint) == [0.5, 0.25]
    assert resumed.global_steps == 3
    for _ in range(3):
        assert torch.equal(train(resumed), train(engine))
    assert all(map(torch.equal, resumed.module.parameters(), engine.module.parameters()))


def test_frozen_parameters_are_not_in_the_state(checkpoint: Path, engine: Any) -> None:
    assert gather(engine, "exp_avg").keys() == {"0.weight", "0.bias", "1.weight"}
    changed = make_module()
    nn.init.ones_(changed[1].bias)
    restore(make_engine(changed), checkpoint)
    assert changed[1].bias.tolist() == [1.0, 1.0]


def test_state_of_another_drafter_is_refused_by_name(checkpoint: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"weights.safetensors lacks 2.bias, 2.weight: it belongs to a drafter of"
    ):
        restore(make_engine(nn.Sequential(*make_module(), nn.Linear(2, 2))), checkpoint)
    with pytest.raises(CheckpointError, match=r"weights.safetensors has 1.weight, which this drafter has not"):
        restore(make_engine(make_module()[:1]), checkpoint)
    with pytest.raises(CheckpointError, match=r"0.weight is \[2, 3\] instead of \[2, 4\]"):
        restore(make_engine(nn.Sequential(nn.Linear(4, 2), make_module()[1])), checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_state_cut_short_is_refused_with_the_way_out(checkpoint: Path, kind: str) -> None:
    path = checkpoint / "training_state" / f"{kind}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"cannot read .*{kind}.safetensors: .*; point step_latest to another"):
        restore(make_engine(make_module()), checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{kind}.safetensors"):
        restore(make_engine(make_module()), checkpoint)


@pytest.mark.parametrize("text", ["", '{"step": 3, "updates": 3', '{"step": 3}', '{"step": 3, "updates": -1}'])
def test_broken_figures_are_refused_with_the_way_out(checkpoint: Path, text: str) -> None:
    (checkpoint / "training_state" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot read .*state.json: .*point step_latest to another step_<N>"):
        restore(make_engine(make_module()), checkpoint)


def test_state_of_another_step_is_refused(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("step_4"))
    with pytest.raises(CheckpointError, match="holds the state after 3 steps, not what its name says"):
        restore(make_engine(make_module()), renamed)


def test_checkpoint_without_a_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step_0").mkdir()
    with pytest.raises(CheckpointError, match=r"state.json: .*No such file.*; nothing can resume from this checkpoint"):
        restore(make_engine(make_module()), tmp_path / "step_0")
