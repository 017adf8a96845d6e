"""The training loop on a real DeepSpeed engine, with one rank and with two."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from drafters.config import DrafterConfig
from drafters.registry import find_algorithm
from services.contracts import CaptureJob, LastRows, Sample, SampleLease, StepLease, StepReport
from trainer.recipe import Recipe

NUM_LAYERS, HIDDEN, VOCAB = 6, 16, 48
DRAFTERS: dict[str, dict[str, Any]] = {
    "dspark": {
        "num_draft_layers": 1,
        "block_size": 3,
        "num_anchors": 4,
        "target_layer_ids": (0, 1),
        "mask_token_id": VOCAB - 1,
        "markov_rank": 4,
    },
    "dflash": {
        "algorithm": "dflash",
        "num_draft_layers": 1,
        "block_size": 3,
        "num_anchors": 4,
        "target_layer_ids": (0, 1),
        "mask_token_id": VOCAB - 1,
    },
    "eagle3": {"algorithm": "eagle3", "target_layer_ids": (0, 1, 2, 3, 4), "ttt_length": 3},
}
DEADLINE_S = 120.0
COMPILERS = {"g++", "gcc", "c++", "cc", "cc1plus", "ninja", "nvcc", "ld", "clang"}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_recipe(target_folder: Path, output_dir: Path, drafter: str = "dspark", **trainer: Any) -> Recipe:
    settings = {
        "world_size": 1,
        "num_gpus": 0,
        "threads": 1,
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "checkpoint_every": 3,
        "max_steps": 6,
    }
    return Recipe.model_validate(
        {
            "output_dir": str(output_dir),
            "target": {"model": str(target_folder), "dtype": "float32", "num_gpus": 0},
            "prompts": {"source": "stdlib"},
            "drafter": DRAFTERS[drafter],
            "trainer": settings | trainer,
        }
    )


class CountingCoordinator:
    """Grants `max_steps` steps in plan order: of each micro-batch of all ranks, a consecutive piece to each rank."""

    def __init__(self, recipe: Recipe, log: Path | None = None) -> None:
        self._trainer = recipe.trainer
        self._log = log

    def step_lease(self, step: int) -> StepLease:
        trainer = self._trainer
        assert trainer.max_steps is not None
        if step > trainer.max_steps:
            return StepLease(step=step, num_micro_batches=0)
        first = (step - 1) * trainer.global_batch_size
        size, ranks = trainer.micro_batch_size, trainer.world_size
        captures = tuple(
            tuple(
                tuple(range(first + (index * ranks + rank) * size, first + (index * ranks + rank + 1) * size))
                for index in range(trainer.accumulation)
            )
            for rank in range(ranks)
        )
        return StepLease(step=step, num_micro_batches=trainer.accumulation, captures=captures)

    def report(self, report: StepReport) -> None:
        if self._log:
            with self._log.open("a") as log:
                log.write(report.model_dump_json() + "\n")

    def ledger_at(self, step: int) -> str:
        return json.dumps({"step": step}) + "\n"

    def saved(self, step: int) -> None:
        pass


def synthetic_sample(capture: int, drafter: DrafterConfig) -> Any:
    """Features and tokens that depend on the capture's number alone."""
    from services.replay.reader import CapturedSample

    generator = torch.Generator().manual_seed(capture)
    length = 9 + capture % 4
    loss_mask = torch.tensor([0] * 3 + [1] * (length - 3))
    rows = LastRows(find_algorithm(drafter.algorithm).last_rows).select(loss_mask.tolist())
    job = CaptureJob(
        capture=capture, prompt=capture, epoch=0, input_ids=(0,) * length, loss_mask=(0,) * length, last_rows=()
    )
    sample = Sample(job=job, chunks=(), num_bytes=0, target="")
    return CapturedSample(
        lease=SampleLease(lease_id=str(capture), use=capture, k=0, sample=sample),
        input_ids=torch.randint(0, VOCAB - 1, (length,), generator=generator),
        loss_mask=loss_mask,
        context=torch.randn(length, context_width(drafter), generator=generator),
        last_rows=torch.tensor(rows),
        last=torch.randn(len(rows), HIDDEN, generator=generator),
    )


def context_width(drafter: DrafterConfig) -> int:
    assert drafter.target_layer_ids is not None
    return len(drafter.target_layer_ids) * HIDDEN


def train_rank(rank: int, recipe: Recipe, resume_from: str | None, ports: Any, results: Any) -> None:
    """One rank in a process of its own, with everything real but the buffer."""
    try:
        results.put((rank, _train_rank(rank, recipe, resume_from, ports)))
    except BaseException as error:
        results.put((rank, repr(error)))
        raise


def _train_rank(rank: int, recipe: Recipe, resume_from: str | None, ports: Any) -> Any:
    from trainer.checkpoint import checkpoint_step
    from trainer.collate import collate
    from trainer.distributed import (
        DTYPES,
        build_engine,
        connect_store,
        library_output_to,
        open_store,
        process_group,
        training_device,
    )
    from trainer.figures import RunFigures
    from trainer.loop import TrainingLoop
    from trainer.prefetch import Prefetcher
    from trainer.saving import CheckpointWriter, restore
    from trainer.training import load_libraries, new_drafter

    config, output_dir = recipe.trainer, recipe.output_dir
    load_libraries(config)
    if rank == 0:
        store = open_store("127.0.0.1", config.world_size)
        for _ in range(config.world_size - 1):
            ports.put(f"127.0.0.1:{store.port}")
    else:
        store = connect_store(ports.get(), config.world_size)
    device, done_steps = training_device(config), checkpoint_step(Path(resume_from)) if resume_from else 0

    def load(captures: Sequence[int] | None, cancelled: Any) -> Any:
        assert captures is not None
        samples = [synthetic_sample(capture, recipe.drafter) for capture in captures]
        micro_batch = collate(
            samples,
            list(captures),
            context_width=context_width(recipe.drafter),
            hidden_size=HIDDEN,
        )
        return micro_batch.to(device, DTYPES[config.precision])

    coordinator = CountingCoordinator(recipe, output_dir / f"reports_{rank}.jsonl")
    checkpoints = CheckpointWriter(output_dir, recipe, rank, ["slipstream", "test"])
    acked: list[int] = []
    with (
        library_output_to(output_dir / "logs" / f"rank_{rank}.log"),
        process_group(store, rank, config, device),
        Prefetcher(coordinator, load, depth=2, first_step=done_steps + 1, rank=rank) as batches,
    ):
        drafter = new_drafter(recipe).to(DTYPES[config.precision])
        if rank == 0 and not resume_from:
            checkpoints.write_untrained(drafter)
        engine = build_engine(drafter, config)
        last_losses = restore(engine, Path(resume_from)) if resume_from else []
        result = TrainingLoop(
            engine=engine,
            batches=batches,
            ack=lambda micro_batch: acked.extend(lease.use for lease in micro_batch.leases),
            coordinator=coordinator,
            checkpoints=checkpoints,
            emit=lambda kind, **fields: None,
            config=config,
            rank=rank,
            generation=1,
            total_steps=config.max_steps or 0,
            done_steps=done_steps,
            figures=RunFigures(last_losses),
        ).run()
    return result.model_dump() | {"acked": acked}


def train_group(recipe: Recipe, resume_from: Path | None = None, watch: Callable[[int], None] | None = None) -> Any:
    """Train with all ranks; returns their results by rank."""
    context = multiprocessing.get_context("spawn")
    ports, results = context.Queue(), context.Queue()
    resume = str(resume_from) if resume_from else None
    ranks = range(recipe.trainer.world_size)
    processes = [context.Process(target=train_rank, args=(rank, recipe, resume, ports, results)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        deadline_s, outcome = time.monotonic() + DEADLINE_S, {}
        while len(outcome) < len(processes):
            assert time.monotonic() < deadline_s, f"training took more than {DEADLINE_S:g} s"
            if watch:
                watch(os.getpid())
            if not results.empty():
                rank, result = results.get()
                outcome[rank] = result
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill() if process.is_alive() and len(outcome) < len(processes) else process.join(20)
    failures = {rank: result for rank, result in outcome.items() if isinstance(result, str)}
    assert not failures, failures
    return [outcome[rank] for rank in ranks]


def losses_of(output_dir: Path, rank: int = 0) -> dict[int, float]:
    reports = [StepReport.model_validate_json(line) for line in (output_dir / f"reports_{rank}.jsonl").open()]
    return {report.step: report.metrics["loss"] for report in reports}


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("drafter", "world_size", "zero_stage", "precision"),
    [
        ("dspark", 1, 0, "bf16"),
        ("dspark", 2, 0, "fp32"),
        ("dspark", 2, 3, "fp32"),
        ("eagle3", 1, 0, "bf16"),
        ("eagle3", 2, 3, "fp32"),
    ],
)
def test_resume_is_bit_equal_for_ranks_stages_and_precisions(
    target_folder: Path, tmp_path: Path, drafter: str, world_size: int, zero_stage: int, precision: str
) -> None:
    settings = {"drafter": drafter, "world_size": world_size, "zero_stage": zero_stage, "precision": precision}
    whole = make_recipe(target_folder, tmp_path / "whole", **settings)
    [result, *_] = train_group(whole)
    assert result["steps"] == 6
    losses = losses_of(whole.output_dir)
    assert losses[6] < losses[1]

    resumed_run = make_recipe(target_folder, tmp_path / "resumed", **settings)
    [result, *_] = train_group(resumed_run, whole.output_dir / "step_3")
    assert (result["first_step"], result["steps"]) == (4, 6)
    assert result["final_loss"] == pytest.approx(sum(losses.values()) / 6)
    assert losses_of(resumed_run.output_dir) == {step: losses[step] for step in (4, 5, 6)}
    expected, resumed = weights_of(whole.output_dir / "step_6"), weights_of(resumed_run.output_dir / "step_6")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_two_ranks_train_what_one_rank_trains(target_folder: Path, tmp_path: Path, drafter: str) -> None:
    # One micro-batch of 8 rows, or two ranks with 4 rows each: the same samples, the same global denominators.
    one = make_recipe(target_folder, tmp_path / "one", drafter, micro_batch_size=8)
    two = make_recipe(target_folder, tmp_path / "two", drafter, micro_batch_size=4, world_size=2)
    train_group(one)
    results = train_group(two)
    for step, loss in losses_of(one.output_dir).items():
        assert losses_of(two.output_dir)[step] == pytest.approx(loss, rel=1e-4)
    assert sorted(results[0]["acked"] + results[1]["acked"]) == list(range(48))
    ours, theirs = weights_of(one.output_dir / "step_6"), weights_of(two.output_dir / "step_6")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


def test_bf16_with_the_fused_loss_follows_float32_with_the_plain_one(target_folder: Path, tmp_path: Path) -> None:
    """200 steps with fp32 masters: the loss stays within 1 % of the exact curve, in means of 20 steps."""
    long = {"max_steps": 200, "checkpoint_every": 200, "micro_batch_size": 8}
    exact = make_recipe(target_folder, tmp_path / "exact", **long)
    exact = exact.model_copy(update={"drafter": exact.drafter.model_copy(update={"loss": "plain"})})
    quick = make_recipe(target_folder, tmp_path / "quick", precision="bf16", **long)
    assert quick.drafter.loss == "fused"
    curves = []
    for recipe in (exact, quick):
        train_group(recipe)
        curves.append(torch.tensor(list(losses_of(recipe.output_dir).values())).view(10, 20).mean(1))
    assert curves[0][-1] < 0.97 * curves[0][0]
    assert not torch.equal(*curves)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.01, atol=0)


def test_micro_batches_of_eagle3_average_to_one_large_one(target_folder: Path, tmp_path: Path) -> None:
    """Each sample counts by its own length, whatever it is padded to; DSpark's micro-batches weigh by their slots."""
    large = make_recipe(target_folder, tmp_path / "large", "eagle3", micro_batch_size=8)
    small = make_recipe(target_folder, tmp_path / "small", "eagle3", micro_batch_size=2)
    for recipe in (large, small):
        train_group(recipe)
    ours, theirs = weights_of(small.output_dir / "step_6"), weights_of(large.output_dir / "step_6")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


def test_run_leaves_whole_checkpoints_and_starts_no_compiler(target_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(target_folder, tmp_path / "run", max_steps=4, checkpoint_every=1, keep_checkpoints=2)
    seen: set[str] = set()

    def watch(parent: int) -> None:
        for process in psutil.Process(parent).children(recursive=True):
            try:
                seen.add(process.name())
            except psutil.NoSuchProcess:
                continue

    train_group(recipe, watch=watch)
    assert seen
    assert not seen & COMPILERS
    output = recipe.output_dir
    assert {path.name for path in output.iterdir() if "step" in path.name} == {
        "step_0",
        "step_3",
        "step_4",
        "step_latest",
    }
    assert os.readlink(output / "step_latest") == "step_4"
    checkpoint = output / "step_latest"
    assert {path.name for path in (checkpoint / "training_state").iterdir()} == {
        "weights.safetensors",
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "state.json",
    }
    assert json.loads((checkpoint / "ledger.jsonl").read_text()) == {"step": 4}
    assert yaml.safe_load((checkpoint / "recipe.yaml").read_text()) == recipe.model_dump(mode="json")
    provenance = json.loads((checkpoint / "provenance.json").read_text())
    assert provenance["command"] == ["slipstream", "test"]
    assert provenance["packages"]["torch"] == torch.__version__
    start, end = weights_of(output / "step_0"), weights_of(checkpoint)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == start.keys() - {"embed_tokens.weight", "lm_head.weight"}
