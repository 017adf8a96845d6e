"""Trainer ranks as Ray actors on a real stream: target over gRPC, shard, embedded Redis, coordinator, DeepSpeed."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from waiting import wait_until

from services.contracts import LastRows, TableSignature
from services.models import read_shape
from services.prompts.coordinator import Coordinator, CoordinatorSettings, LedgerSummary
from services.replay.config import ReplayConfig
from services.replay.connect import connect
from services.replay.embedded import EmbeddedRedis
from services.replay.registry import TargetRegistry
from services.replay.shard import ReplayShard
from services.replay.table import RedisTable
from services.target.engine import TransformersEngine
from services.target.server import serve
from services.telemetry import TelemetryReader
from trainer.checkpoint import latest_checkpoint
from trainer.figures import TrainResult
from trainer.rank import TrainerRank
from trainer.recipe import Recipe

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(1800)]

VOCAB, HIDDEN, LAYER_IDS = 300, 16, (0, 1)
CAPACITY_BYTES = 256 * 1024
NUM_PROMPTS = 21
PUBLISH_S = 0.5
DEADLINE_S = 400.0
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target with a tokenizer of bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocab = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), CAPACITY_BYTES) as embedded:
        yield embedded.url


@pytest.fixture(scope="module")
def target_address(target_folder: Path) -> Iterator[str]:
    recipe = make_recipe(target_folder, Path("unused"))
    server = serve(TransformersEngine(recipe.target), recipe.target)
    yield server.address
    server.stop()


def make_recipe(target_folder: Path, output_dir: Path, **trainer: Any) -> Recipe:
    settings = {
        "num_gpus": 0,
        "threads": 1,
        "precision": "fp32",
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "checkpoint_every": 2,
        "wait_s": 300,
    }
    return Recipe.model_validate(
        {
            "output_dir": str(output_dir),
            "target": {
                "model": str(target_folder),
                "dtype": "float32",
                "num_gpus": 0,
                "threads": 1,
                "max_batch_samples": 1,
            },
            "prompts": {"source": str(output_dir / "prompts.jsonl"), "max_length": 128, "system_prompt": None},
            "replay": {"capacity": CAPACITY_BYTES, "wire_dtype": "fp32", "pulls": 4},
            "drafter": {
                "num_draft_layers": 1,
                "block_size": 3,
                "num_anchors": 4,
                "target_layer_ids": LAYER_IDS,
                "mask_token_id": VOCAB - 1,
                "markov_rank": 4,
            },
            "trainer": settings | trainer,
        }
    )


def write_prompts(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = ({"role": "user", "content": f"q{i}"} for i in range(NUM_PROMPTS))
    path.write_text(
        "".join(
            json.dumps({"messages": [turn, {"role": "assistant", "content": f"{i:02d}" * 10}]}) + "\n"
            for i, turn in enumerate(turns)
        )
    )


def train(
    recipe: Recipe, redis_url: str, target_address: str, *, attempt: int, max_steps: int | None = None
) -> tuple[list[TrainResult], LedgerSummary, list[dict[str, Any]]]:
    """One attempt of a run, as the driver would make it; returns the ranks' results, the ledger and the telemetry."""
    import ray

    trainer, output_dir = recipe.trainer, recipe.output_dir
    prefix = f"test:{output_dir.name}:{attempt}"
    resume = latest_checkpoint(output_dir)
    signature = TableSignature(
        fingerprint=read_shape(Path(recipe.target.model)).fingerprint,
        layer_ids=LAYER_IDS,
        hidden_size=HIDDEN,
        dtype="fp32",
    )
    client = connect(redis_url)
    table = RedisTable(client, prefix)
    table.create(CAPACITY_BYTES, signature, recipe.replay.reuse)
    table.set_generation(attempt)
    settings = CoordinatorSettings(
        reuse=recipe.replay.reuse,
        last_rows=LastRows.BETWEEN,
        world_size=trainer.world_size,
        micro_batch_size=trainer.layout.samples_per_pass,
        accumulation=trainer.layout.num_passes,
        max_steps=max_steps or trainer.max_steps,
        deterministic=trainer.deterministic,
        tail=trainer.tail,
        signature=signature,
        lookahead_captures=8,
        capture_log=str(output_dir / "captures.jsonl"),
        answers=str(output_dir / "answers.jsonl"),
        lives=str(output_dir / "lives"),
        ledger=str(resume / "ledger.jsonl") if resume else None,
        generation=attempt,
    )
    coordinator = (
        ray.remote(Coordinator)
        .options(num_cpus=0, max_concurrency=8)
        .remote(recipe.prompts, recipe.target.model, redis_url, prefix, settings)
    )
    ranks = [
        ray.remote(TrainerRank)
        .options(num_cpus=0)
        .remote(
            rank,
            recipe,
            [redis_url],
            prefix,
            signature,
            coordinator,
            str(output_dir),
            str(resume) if resume else None,
            attempt,
        )
        for rank in range(trainer.world_size)
    ]
    shard = ReplayShard(redis_url, prefix, recipe.replay, signature)
    pulling = threading.Thread(target=shard.run)
    pulling.start()
    try:
        store = ray.get(ranks[0].open_store.remote(), timeout=DEADLINE_S)
        training = [rank.train.remote(store) for rank in ranks]
        deadline_s = time.monotonic() + DEADLINE_S
        while len(ray.wait(training, num_returns=len(training), timeout=PUBLISH_S)[0]) < len(training):
            assert time.monotonic() < deadline_s, f"training took more than {DEADLINE_S:g} s"
            TargetRegistry(client, prefix).publish([target_address], time.time())
        results = ray.get(training)
        assert table.info().num_leased == 0
        assert table.info().peak_bytes <= CAPACITY_BYTES
        ledger = ray.get(coordinator.finish.remote(), timeout=DEADLINE_S)
        return results, ledger, told_up_to(results[0].steps, TelemetryReader(client, prefix))
    finally:
        shard.stop()
        pulling.join(DEADLINE_S)
        for actor in (*ranks, coordinator):
            ray.kill(actor)


def told_up_to(step: int, reader: TelemetryReader) -> list[dict[str, Any]]:
    """The telemetry, once the last step's record is there: a rank that ends does not wait for it."""
    telemetry: list[dict[str, Any]] = []

    def has_come() -> bool:
        telemetry.extend(reader.read())
        return any(record["kind"] == "step" and record["step"] == step for record in telemetry)

    wait_until(has_come, f"the record of step {step}")
    return telemetry


@pytest.mark.parametrize("world_size", [1, 2])
def test_stream_is_trained_to_the_padded_end_and_ledger_balances(
    target_folder: Path, tmp_path: Path, redis_url: str, target_address: str, world_size: int
) -> None:
    # 21 prompts in steps of 4: the sixth step has one sample, so with two ranks one of them trains padding only.
    recipe = make_recipe(target_folder, tmp_path / f"padded{world_size}", world_size=world_size)
    write_prompts(Path(recipe.prompts.source))
    results, ledger, telemetry = train(recipe, redis_url, target_address, attempt=1)
    assert {result.steps for result in results} == {6}
    assert all(result.final_loss is not None and result.final_loss > 0 for result in results)
    assert all(0 <= result.wait_fraction <= 1 for result in results)
    assert (ledger.planned, ledger.trained, ledger.captured, ledger.balanced) == (21, 21, 21, True)
    steps = [record for record in telemetry if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["samples"] for record in steps] == [4, 4, 4, 4, 4, 1]
    assert sum(record["tokens"] for record in steps) == results[0].tokens
    assert latest_checkpoint(recipe.output_dir) == recipe.output_dir / "step_6"


def test_rate_limited_and_prioritized_stream_trains_every_use_once(
    target_folder: Path, tmp_path: Path, redis_url: str, target_address: str
) -> None:
    # Two uses each of 21 prompts: ten steps of 4, and a tail of 2 that only the seal lets go, below min_size as it is.
    recipe = make_recipe(target_folder, tmp_path / "prioritized", world_size=2)
    limits = {"reuse": 2, "min_size": 5, "error_buffer": 6, "selector": "prioritized", "importance_exponent": 1.0}
    replay = ReplayConfig.model_validate(recipe.replay.model_dump() | limits)
    recipe = recipe.model_copy(update={"replay": replay})
    write_prompts(Path(recipe.prompts.source))
    results, ledger, telemetry = train(recipe, redis_url, target_address, attempt=1)
    assert {result.steps for result in results} == {11}
    assert (ledger.planned, ledger.trained, ledger.captured, ledger.balanced) == (42, 42, 21, True)
    steps = [record for record in telemetry if record["kind"] == "step"]
    assert [record["samples"] for record in steps] == [4] * 10 + [2]


def test_deterministic_run_repeats_its_losses_through_a_resume(
    target_folder: Path, tmp_path: Path, redis_url: str, target_address: str
) -> None:
    def losses(telemetry: list[dict[str, Any]]) -> dict[int, float]:
        return {record["step"]: record["metrics"]["loss"] for record in telemetry if record["kind"] == "step"}

    recipe = make_recipe(target_folder, tmp_path / "whole", deterministic=True, max_steps=4)
    write_prompts(Path(recipe.prompts.source))
    _, _, telemetry = train(recipe, redis_url, target_address, attempt=1)
    whole = losses(telemetry)

    recipe = make_recipe(target_folder, tmp_path / "parted", deterministic=True, max_steps=4)
    write_prompts(Path(recipe.prompts.source))
    _, _, telemetry = train(recipe, redis_url, target_address, attempt=1, max_steps=2)
    parted = losses(telemetry)
    shutil.copytree(recipe.output_dir, tmp_path / "spread", symlinks=True)
    _, ledger, telemetry = train(recipe, redis_url, target_address, attempt=2)
    assert parted | losses(telemetry) == whole
    assert (ledger.trained, ledger.not_reached, ledger.balanced) == (16, 5, True)

    recipe = make_recipe(target_folder, tmp_path / "spread", deterministic=True, max_steps=4, world_size=2)
    _, ledger, telemetry = train(recipe, redis_url, target_address, attempt=2)
    assert parted | losses(telemetry) == pytest.approx(whole, abs=1e-5)
    assert (ledger.trained, ledger.not_reached, ledger.balanced) == (16, 5, True)
