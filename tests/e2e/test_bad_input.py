"""Wrong input ends with a clear error, at once, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command

import trainer.demo

Start = Callable[..., Command]

DEMO = Path(trainer.demo.__file__).parent


def fails(command: Command, code: int, *words: str) -> None:
    """The command exits with the code, names what is wrong, shows no traceback and leaves no process."""
    assert command.result()[0] == code, command.errors
    for word in words:
        assert word in command.errors
    assert "Traceback" not in command.errors
    command.assert_nothing_left()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_step=5", ("trainer.max_step", "did you mean trainer.max_steps")),
        ("trainer.world_size=3", ("global_batch_size 4", "world_size 3")),
        ("drafter.target_layer_ids=[1,2,3,4,7]", ("target_layer_ids [1, 2, 3, 4, 7]", "8 layers")),
        ("drafter.target_layer_ids=[3,1]", ("ascend",)),
        ("drafter.mask_token_id=512", ("mask_token_id 512", "512")),
        ("prompts.max_length=100000", ("max_length 100000", "12288")),
        ("replay.capacity=1MiB", ("replay.capacity", "cannot hold the micro-batches in flight")),
        ("prompts.source=nowhere.jsonl", ("nowhere.jsonl",)),
    ],
)
def test_wrong_setting_is_named(slipstream: Start, override: str, words: tuple[str, ...]) -> None:
    expected = 1 if override.startswith("prompts.source") else 2
    fails(slipstream("demo", override), expected, *words)


def test_shared_memory_that_is_too_small_ends_the_run_before_it_starts(slipstream: Start) -> None:
    fails(slipstream("demo", "replay.tier=shm", "replay.capacity=4PiB"), 1, "/dev/shm", "--shm-size", "replay.capacity")


def test_missing_recipe_is_named(slipstream: Start) -> None:
    fails(slipstream("run", "no-such.yaml"), 2, "no-such.yaml")


def test_output_dir_of_another_run_is_refused(slipstream: Start, tmp_path: Path) -> None:
    output = tmp_path / "slipstream-demo"
    output.mkdir()
    (output / "thesis.txt").write_text("do not touch")
    fails(slipstream("demo"), 2, "slipstream-demo", "--output-dir")
    assert (output / "thesis.txt").read_text() == "do not touch"


def test_redis_that_does_not_answer_is_named(slipstream: Start) -> None:
    fails(slipstream("demo", "replay.redis=redis://:secret@127.0.0.1:9/0"), 1, "127.0.0.1:9")


def test_actor_that_cannot_be_placed_names_the_resource(slipstream: Start) -> None:
    fails(slipstream("demo", "trainer.num_gpus=3"), 1, "TrainerRank", "3 GPU")


def test_target_that_fails_to_load_is_explained(slipstream: Start, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO / "target", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    fails(slipstream("demo", f"target.model={broken}"), 1, "broken")


def test_broken_prompt_lines_are_counted_or_fatal_when_strict(slipstream: Start, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    talk = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    prompts.write_text(json.dumps(talk) + "\n{not json\n")
    fails(slipstream("demo", f"prompts.source={prompts}", "prompts.strict=true"), 1, "prompts.jsonl:2")
