from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from services.errors import RecipeError
from services.replay.rate_limiter import RateLimiter
from services.replay.selectors import Selector, SelectorKind
from trainer.recipe import Recipe, TrainerConfig, build_recipe, known_keys, load_recipe

SMALLEST = "target: {model: Qwen/Qwen3-4B}\nprompts: {source: prompts.jsonl}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST)
    return path


def explain(path: Path, *overrides: str) -> str:
    """The message that a recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_are_the_references_when_only_target_and_prompts_are_given(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.target.model == "Qwen/Qwen3-4B"
    drafter, trainer = recipe.drafter, recipe.trainer
    assert (drafter.block_size, drafter.num_draft_layers, drafter.markov_rank, drafter.num_anchors) == (7, 5, 256, 512)
    assert (trainer.global_batch_size, trainer.learning_rate, trainer.warmup_fraction) == (512, 6e-4, 0.04)
    assert (trainer.gradient_clip, trainer.weight_decay) == (1.0, 0.0)
    assert recipe.prompts.min_loss_tokens == 14


def test_overrides_win_over_the_file(recipe_file: Path) -> None:
    recipe_file.write_text(SMALLEST + "trainer: {learning_rate: 1e-3, zero_stage: 2}\n")
    recipe = load_recipe(
        recipe_file,
        ["trainer.learning_rate=2e-4", "drafter.target_layer_ids=[1, 3]", "name=again", "prompts.strict=true"],
    )
    assert recipe.trainer.learning_rate == 2e-4
    assert recipe.trainer.zero_stage == 2
    assert recipe.drafter.target_layer_ids == (1, 3)
    assert recipe.name == "again"
    assert recipe.prompts.strict is True


def test_later_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["trainer.seed=1", "trainer.seed=2"]).trainer.seed == 2


def test_empty_override_is_null(recipe_file: Path) -> None:
    recipe_file.write_text(SMALLEST + "trainer: {max_steps: 5}\n")
    assert load_recipe(recipe_file, ["trainer.max_steps="]).trainer.max_steps is None


def test_override_value_may_hold_equals_signs(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["replay.redis=redis://cache:6379/0?client_name=a"])
    assert recipe.replay.redis == "redis://cache:6379/0?client_name=a"


@pytest.mark.parametrize("override", ["trainer.seed", "=3", "trainer.=3", ".seed=3", ""])
def test_override_is_refused_without_key_and_value(recipe_file: Path, override: str) -> None:
    assert f"override {override!r} must look like section.key=value" in explain(recipe_file, override)


def test_override_is_refused_below_a_value(recipe_file: Path) -> None:
    assert "model is a value, not a section" in explain(recipe_file, "target.model.name=x")


def test_override_is_refused_when_its_value_is_no_yaml(recipe_file: Path) -> None:
    message = explain(recipe_file, "drafter.target_layer_ids=[1, 2")
    assert "'drafter.target_layer_ids=[1, 2'" in message
    assert "not YAML" in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.lerning_rate", "trainer.learning_rate"),
        ("trainer.num_anchors", "drafter.num_anchors"),
        ("prompts.reuse", "replay.reuse"),
        ("block_size", "drafter.block_size"),
        ("drafter.block", "drafter.block_size"),
        ("trainr", "trainer"),
    ],
)
def test_unknown_key_names_the_nearest(recipe_file: Path, key: str, nearest: str) -> None:
    assert f"  {key}: unknown key; did you mean {nearest}?" in explain(recipe_file, f"{key}=1").splitlines()


def test_unknown_key_names_every_section_that_has_it(recipe_file: Path) -> None:
    message = explain(recipe_file, "drafter.num_gpus=1")
    assert "did you mean target.num_gpus or trainer.num_gpus or evaluation.num_gpus?" in message


def test_unknown_key_lists_what_is_known_when_nothing_is_near(recipe_file: Path) -> None:
    assert "known here: redis, shards, capacity" in explain(recipe_file, "replay.zzz=1")
    assert "known here: name, output_dir, target, drafter, prompts, replay, trainer, evaluation" in explain(
        recipe_file, "zzz.yyy=1"
    )


def test_unknown_key_in_the_file_is_refused_like_one_in_an_override(recipe_file: Path) -> None:
    recipe_file.write_text(SMALLEST + "trainer: {lr: 1}\n")
    assert "trainer.lr: unknown key" in explain(recipe_file)


def test_every_problem_is_named_at_once(recipe_file: Path) -> None:
    message = explain(recipe_file, "trainer.lerning_rate=1", "target.engine=vllm", "drafter.block_size=0")
    assert str(recipe_file) in message
    assert "target.engine: Input should be 'transformers' (given 'vllm')" in message
    assert "drafter.block_size: Input should be greater than or equal to 1 (given 0)" in message
    assert "did you mean trainer.learning_rate?" in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["replay.reuse=2", "target.max_batch_samples=1"], "needs replay.reuse: 1, not 2"),
        ([], "needs target.max_batch_samples: 1, not 64"),
    ],
)
def test_deterministic_run_is_refused_with_the_line_to_change(
    recipe_file: Path, overrides: list[str], says: str
) -> None:
    assert says in explain(recipe_file, "trainer.deterministic=true", *overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["replay.samples_per_insert=1"], "samples_per_insert 1 does nothing without error_buffer"),
        (["replay.reuse=2", "replay.samples_per_insert=3", "replay.error_buffer=9"], "is more than reuse 2"),
        (["replay.reuse=4", "replay.error_buffer=3"], "error_buffer 3 is below samples_per_insert 4"),
        (["replay.selector=prioritized"], "selector prioritized needs reuse of 2 or more"),
        (["replay.selector=newest"], "'fifo', 'uniform' or 'prioritized'"),
        (
            ["replay.error_buffer=2", "trainer.micro_batch_size=4"],
            "trainer.micro_batch_size 4 is more than the 3 uses that replay.error_buffer 2 and replay.min_size 1",
        ),
    ],
)
def test_rate_limiter_or_selector_that_cannot_work_is_refused(
    recipe_file: Path, overrides: list[str], says: str
) -> None:
    assert says in explain(recipe_file, "trainer.global_batch_size=12", "replay.reuse=1", *overrides)


@pytest.mark.parametrize(
    "override", ["replay.selector=uniform", "replay.min_size=2", "replay.error_buffer=64"], ids=lambda text: text
)
def test_deterministic_run_leaves_nothing_to_choose(recipe_file: Path, override: str) -> None:
    overrides = ["trainer.deterministic=true", "replay.reuse=1", "target.max_batch_samples=1", override]
    assert "names the samples of each step in plan order" in explain(recipe_file, *overrides)


def test_limits_and_selector_come_from_the_recipe(recipe_file: Path) -> None:
    overrides = ["replay.reuse=2", "replay.min_size=10", "replay.error_buffer=16", "replay.selector=prioritized"]
    replay = load_recipe(recipe_file, [*overrides, "replay.importance_exponent=1"]).replay
    assert replay.rate_limiter == RateLimiter(10, 2, 4, 36)
    assert replay.sampling == Selector(SelectorKind.PRIORITIZED, 0.6, 1.0)
    assert load_recipe(recipe_file, ["replay.reuse=3"]).replay.rate_limiter == RateLimiter(samples_per_insert=3)


def test_deterministic_run_is_accepted_with_one_use_and_one_sample_a_pass(recipe_file: Path) -> None:
    overrides = ["trainer.deterministic=true", "replay.reuse=1", "target.max_batch_samples=1"]
    assert load_recipe(recipe_file, overrides).trainer.deterministic


def test_prompts_that_no_forward_pass_can_hold_are_refused(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["prompts.max_length=2048", "target.max_batch_tokens=2048"])
    message = explain(recipe_file, "prompts.max_length=2049", "target.max_batch_tokens=2048")
    assert "prompts.max_length 2049 is above target.max_batch_tokens 2048" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.learning_rate=fast", "trainer.learning_rate"),
        ("trainer.world_size=1.5", "trainer.world_size"),
        ("trainer.zero_stage=4", "trainer.zero_stage"),
        ("drafter.target_layer_ids=7", "drafter.target_layer_ids"),
        ("name=../elsewhere", "name"),
        ("evaluation.confidence_threshold=1.2", "evaluation.confidence_threshold"),
        ("prompts.source=[a]", "prompts.source"),
    ],
)
def test_wrong_value_names_key_and_value(recipe_file: Path, override: str, key: str) -> None:
    given = yaml.safe_load(override.partition("=")[2])
    line = next(line for line in explain(recipe_file, override).splitlines() if line.startswith(f"  {key}:"))
    assert f"(given {given!r})" in line


def test_value_in_place_of_a_section_is_refused(recipe_file: Path) -> None:
    assert "  trainer: must be a section of settings (given 3)" in explain(recipe_file, "trainer=3")


def test_missing_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("target: {engine: transformers}\n")
    message = explain(path)
    assert "  target.model: Field required" in message
    assert "  prompts: Field required" in message


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4GiB", 4 * 1024**3), ("4GB", 4_000_000_000), ("1.5MiB", 3 * 512 * 1024), ("1048576", 1024**2)],
)
def test_capacity_takes_byte_sizes(recipe_file: Path, text: str, num_bytes: int) -> None:
    assert load_recipe(recipe_file, [f"replay.capacity={text}"]).replay.capacity == num_bytes


@pytest.mark.parametrize(
    "override", ["replay.capacity=0", "replay.capacity=-4", "replay.capacity=4 gigs", "replay.chunk=5MiB"]
)
def test_byte_size_is_refused_out_of_bounds_or_without_a_known_unit(recipe_file: Path, override: str) -> None:
    assert f"  {override.partition('=')[0]}:" in explain(recipe_file, override)


def test_global_batch_is_refused_when_ranks_cannot_share_it(recipe_file: Path) -> None:
    message = explain(recipe_file, "trainer.global_batch_size=10", "trainer.world_size=4")
    assert "global_batch_size 10 is not a multiple of world_size 4" in message


def test_global_batch_stays_whatever_the_number_of_ranks() -> None:
    for world_size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        layout = TrainerConfig(global_batch_size=48, world_size=world_size, micro_batch_size=4).layout
        assert world_size * layout.samples_per_pass * layout.num_passes == 48


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    assert explain(tmp_path / "absent.yaml") == f"cannot read recipe {tmp_path}/absent.yaml: No such file or directory"
    assert explain(tmp_path) == f"cannot read recipe {tmp_path}: Is a directory"


def test_missing_recipe_names_the_nearest_beside_it(tmp_path: Path) -> None:
    for name in ("dspark_qwen3_4b.yaml", "dspark_qwen3_14b.yaml", "notes.txt"):
        (tmp_path / name).touch()
    assert explain(tmp_path / "dspark_qwen_4b.yaml").endswith(f"; did you mean {tmp_path}/dspark_qwen3_4b.yaml?")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "and is empty"),
        (b"- a\n- b\n", "and is a list"),
        (b"just words", "and is a str"),
        (b"target: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"trainer: {seed: 1}\ntrainer: {seed: 2}\n", "'trainer' is given twice"),
        (b"trainer:\n  seed: 1\n  seed: 2\n", "'seed' is given twice"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    message = explain(path)
    assert str(path) in message
    assert problem in message


def test_section_with_every_line_commented_out_keeps_the_defaults(recipe_file: Path) -> None:
    recipe_file.write_text(SMALLEST + "trainer:\n  # seed: 1\n")
    assert load_recipe(recipe_file, ["trainer.zero_stage=1"]).trainer == TrainerConfig(zero_stage=1)


def test_paths_beside_the_recipe_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("target: {model: ./target}\nprompts: {source: ./prompts.jsonl, heldout: heldout.jsonl}\n")
    monkeypatch.chdir(tmp_path.parent)
    recipe = load_recipe(Path(tmp_path.name) / "recipe.yaml")
    assert recipe.target.model == str(tmp_path / "target")
    assert recipe.prompts.source == str(tmp_path / "prompts.jsonl")
    assert recipe.prompts.heldout == "heldout.jsonl"


def test_path_given_as_override_stays_relative_to_the_working_directory(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["prompts.source=./mine.jsonl"]).prompts.source == "./mine.jsonl"


def test_saved_recipe_reads_back_the_same(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["replay.capacity=6GiB", "drafter.target_layer_ids=[1, 3]", "output_dir=a/b"])
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(recipe_file) == recipe


def test_recipe_cannot_be_changed_after_it_is_read(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).trainer.seed = 1  # type: ignore[misc]


def test_identity_ignores_how_a_run_is_spread_but_not_what_is_trained() -> None:
    def identity(**trainer: object) -> dict[str, object]:
        tree = {"target": {"model": "m"}, "prompts": {"source": "stdlib"}, "trainer": trainer}
        return build_recipe(tree, "test").identity()

    other_ranks = {"world_size": 2, "micro_batch_size": 4, "zero_stage": 2, "precision": "fp32", "num_gpus": 0}
    assert identity(**other_ranks, checkpoint_every=7) == identity()
    assert identity(global_batch_size=8) != identity()
    assert identity(seed=7) != identity()


def test_known_keys_are_sections_and_their_settings() -> None:
    keys = known_keys()
    assert {"name", "target", "target.model", "trainer.learning_rate", "evaluation.seed"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert {key.partition(".")[0] for key in keys} == set(Recipe.model_fields)


def test_autoscaling_is_off_until_its_most_is_given(recipe_file: Path) -> None:
    assert load_recipe(recipe_file).target.autoscale is None
    autoscale = load_recipe(recipe_file, ["target.autoscale.max=4"]).target.autoscale
    assert autoscale is not None
    assert (autoscale.min, autoscale.max) == (1, 4)
    assert "target.autoscale.max: Field required" in explain(recipe_file, "target.autoscale.min=2")
    assert "did you mean target.autoscale.window_s?" in explain(recipe_file, "target.autoscale={max: 2, window: 9}")


@pytest.mark.parametrize(
    ("autoscale", "says"),
    [
        ("{min: 3, max: 2}", "min 3 is above max 2"),
        ("{min: 0, max: 2}", "target.autoscale.min: Input should be greater than or equal to 1"),
        ("{min: 2, max: 4}", "replicas 1, with which the run starts, must lie between autoscale.min 2 and"),
        ("{max: 65}", "autoscale.max 65 is above max_replicas 64"),
        ("{max: 2, wait_high: 0.1, wait_low: 0.1}", "wait_low 0.1 must be below wait_high 0.1"),
        ("4", "target.autoscale: must be a section of settings"),
    ],
)
def test_bounds_that_no_run_can_keep_are_refused(recipe_file: Path, autoscale: str, says: str) -> None:
    assert says in explain(recipe_file, f"target.autoscale={autoscale}")


def test_another_algorithm_keeps_the_settings_it_has_too(recipe_file: Path) -> None:
    recipe_file.write_text(
        SMALLEST + "drafter: {num_anchors: 32, markov_rank: 64, target_layer_ids: [0, 1, 2, 3, 4]}\n"
    )
    eagle3 = load_recipe(recipe_file, ["drafter.algorithm=eagle3", "drafter.ttt_length=3"]).drafter
    assert (eagle3.algorithm, eagle3.target_layer_ids, eagle3.ttt_length) == ("eagle3", (0, 1, 2, 3, 4), 3)
    dflash = load_recipe(recipe_file, options={"drafter.algorithm": "dflash"}).drafter
    assert (dflash.num_anchors, dflash.markov_rank) == (32, 0)


def test_setting_that_another_algorithm_lacks_is_refused_when_it_is_asked_for(recipe_file: Path) -> None:
    recipe_file.write_text(SMALLEST + "drafter: {num_anchors: 32}\n")
    assert "num_anchors" in explain(recipe_file, "drafter.algorithm=eagle3", "drafter.num_anchors=16")
    recipe_file.write_text(SMALLEST + "drafter: {algorithm: eagle3, num_anchors: 32}\n")
    assert "num_anchors" in explain(recipe_file)
    assert "num_anchors" in explain(recipe_file, "drafter.algorithm=eagle3")


@pytest.mark.parametrize("override", ["replay={u}", "trainer.threads={u}", "replay.redis={{a: {u}", "{u}"])
def test_error_about_a_url_shows_no_password(tmp_path: Path, override: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("target: {model: m}\nprompts: {source: stdlib}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, [override.format(u="redis://me:secret@host:1/0")])
    assert "secret" not in str(refused.value)
    assert "redis://me:***@host" in str(refused.value)


def test_evaluator_that_the_targets_gpu_has_no_room_for_is_refused(recipe_file: Path) -> None:
    said = explain(recipe_file, "evaluation.num_gpus=0.3", "target.num_gpus=0.8")
    assert "evaluation.num_gpus 0.3, on the target's GPU, of which target.num_gpus 0.8 leaves 0.2" in said
    for override in ("target.num_gpus=0.7", "target.num_gpus=0", "evaluation.placement=off"):
        load_recipe(recipe_file, ["evaluation.num_gpus=0.3", override])
