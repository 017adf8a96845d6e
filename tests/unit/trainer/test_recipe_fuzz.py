"""Recipes and overrides that nobody should write: each is a recipe or ends in an error that says where it is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services.errors import RecipeError
from trainer.recipe import MAX_PROBLEMS, Recipe, known_keys, known_sections, load_recipe

SMALLEST = "target: {model: Qwen/Qwen3-4B}\nprompts: {source: prompts.jsonl}\n"
KEYS = known_keys()
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONGEST_MESSAGE = (MAX_PROBLEMS + 2) * 60_000

numbers = st.one_of(st.integers(-3, 9), st.integers(-(2**70), 2**70), st.just(10**400), st.floats())
plain = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.text(max_size=20),
    st.binary(max_size=8),
    st.dates(),
    st.sampled_from(["9" * 400, "9" * 400 + ".5GiB", "1e400", "inf", "4GiB", "redis://:pw@h/0", "x" * 3000, "dspark"]),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers(), st.none(), st.booleans()), inner, max_size=4),
    ),
    max_leaves=8,
)
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=12), st.sampled_from(KEYS).map(lambda key: f"{key}_"))
SCRAPS = [
    *(
        "target:",
        "prompts:",
        "trainer:",
        "replay:",
        "model: m",
        "source: s",
        "seed: 1",
        "\n",
        "\n",
        "\n  ",
        " ",
        ": ",
        "- ",
    ),
    *("&a ", "*a", "<<: ", "[", "]", "{", "}", ", ", "? ", "| ", "> ", "'", '"', "#", "---\n", "...\n", "%YAML 1.1\n"),
    *(
        "!!int ",
        "!!float ",
        "!!map ",
        "!!set ",
        "!!omap ",
        "!!pairs ",
        "!!timestamp ",
        "!!binary ",
        "!!bool ",
        "!!null ",
    ),
    *("!!python/object/apply:os.getpid ", "!!python/name:os.system ", "!x ", "!<tag:yaml.org,2002:str> ", "!!str "),
    *(
        "2026-13-45",
        "0x",
        "0b",
        "1:99",
        ".nan",
        ".inf",
        "~",
        "yes",
        "\\0",
        "\t",
        "\r",
        "\x85",
        "\u2028",
        "\ufeff",
        "é",
        "\0",
    ),
]
scraps = st.lists(st.sampled_from(SCRAPS), max_size=25).map("".join)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def refusal(path: Path, overrides: Sequence[str] = ()) -> str | None:
    """What a recipe is refused with, in lines that a terminal can show; None where it is a recipe."""
    try:
        assert isinstance(load_recipe(path, overrides), Recipe)
        return None
    except RecipeError as error:
        message = str(error)
    first, *problems = message.split("\n")
    assert first.isprintable()
    assert str(path) in first or first.startswith("override")
    assert len(message) < LONGEST_MESSAGE
    assert len(problems) <= MAX_PROBLEMS + 1
    for line in problems:
        assert line.isprintable()
        key, colon, problem = line.partition(": ")
        assert line.startswith("  and ") or (key.startswith("  ") and colon and problem)
    return message


@EXAMPLES
@given(content=st.binary(max_size=200))
def test_bytes_are_a_recipe_or_refused(recipe_file: Path, content: bytes) -> None:
    recipe_file.write_bytes(content)
    refusal(recipe_file)
    recipe_file.write_bytes(SMALLEST.encode() + content)
    refusal(recipe_file)


@settings(EXAMPLES, max_examples=400)
@given(text=scraps)
@example(text="!!map foo")
@example(text="? !!set [a]\n: b")
@example(text="a: &a [*a]")
def test_scraps_of_yaml_are_a_recipe_or_refused(recipe_file: Path, text: str) -> None:
    for content in (text, SMALLEST + text):
        recipe_file.write_text(content, encoding="utf-8")
        refusal(recipe_file)


@settings(EXAMPLES, max_examples=300)
@given(place=st.tuples(st.sampled_from(["", *known_sections()]), keys), value=values)
def test_any_value_of_any_key_is_taken_or_the_key_is_named(
    recipe_file: Path, place: tuple[str, str], value: Any
) -> None:
    section, key = place
    tree = yaml.safe_load(SMALLEST)
    name = key.rpartition(".")[2] if section else key
    inner = tree.setdefault(section, {}) if section else tree
    inner[name] = value
    recipe_file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    refusal(recipe_file)


@settings(EXAMPLES, max_examples=400)
@given(key=st.sampled_from(KEYS), value=values)
def test_wrong_value_of_a_known_key_is_refused_by_its_name(recipe_file: Path, key: str, value: Any) -> None:
    recipe_file.write_text(SMALLEST)
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
    message = refusal(recipe_file, [override])
    if message is not None:
        section, _, name = key.rpartition(".")
        # A section that is left out as a rule may need more than this key.
        assert name in message or re.search(rf"^  {re.escape(section)}\.\w+: Field required$", message, re.MULTILINE)


@settings(EXAMPLES, max_examples=300)
@given(overrides=st.lists(st.one_of(st.builds("{}={}".format, keys, scraps), st.text(max_size=20), scraps), max_size=3))
@example(overrides=["a." * 20_000 + "b=1"])
@example(overrides=["target.model" + ".x" * 20_000 + "=1"])
@example(overrides=["a" * 200_000])
@example(overrides=["a" * 200_000 + "=1"])
@example(overrides=["trainer." + "a" * 200_000 + "=1"])
@example(overrides=["name=" + "a" * 200_000])
@example(overrides=["replay.redis=" + "a://" * 50_000])
@example(overrides=["\udcff=\udcff"])
def test_overrides_are_taken_or_refused(recipe_file: Path, overrides: list[str]) -> None:
    recipe_file.write_text(SMALLEST)
    refusal(recipe_file, overrides)


def test_recipe_cut_anywhere_is_a_recipe_or_refused(recipe_file: Path) -> None:
    whole = (Path(__file__).parents[3] / "infra" / "recipes" / "demo.yaml").read_bytes()
    kept = 0
    for length in range(0, len(whole), 7):
        recipe_file.write_bytes(whole[:length])
        kept += refusal(recipe_file) is None
    recipe_file.write_bytes(whole)
    assert refusal(recipe_file) is None
    assert kept, "the sections that come first are a recipe without the last ones"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.learning_rate=.inf", "trainer.learning_rate: Input should be a finite number (given inf)"),
        ("trainer.wait_s=.inf", "trainer.wait_s: Input should be a finite number (given inf)"),
        ("trainer.num_gpus=.inf", "trainer.num_gpus: Input should be a finite number (given inf)"),
        ("trainer.num_gpus=.nan", "trainer.num_gpus: Input should be a finite number (given nan)"),
        ("drafter.loss_decay_gamma=.inf", "drafter.loss_decay_gamma: Input should be a finite number"),
        ("evaluation.temperature=.nan", "evaluation.temperature: Input should be a finite number"),
        ("prompts.temperature=.inf", "prompts.temperature: Input should be a finite number"),
        ("target.batch_wait_ms=.inf", "target.batch_wait_ms: Input should be a finite number"),
        ("replay.lease_s=.inf", "replay.lease_s: Input should be a finite number"),
        ("replay.capacity='" + "9" * 400 + ".5GiB'", "replay.capacity: longer than a number of bytes with its unit"),
        ("replay.capacity=9PiB", "replay.capacity: Input should be less than or equal to 9007199254740992"),
        ("replay.chunk='" + "9" * 400 + ".5GiB'", "replay.chunk: longer than a number of bytes with its unit"),
        (f"name={'a' * 5000}/", "name: String should match pattern"),
        ("trainer.seed=0x" + "f" * 5000, "the number <5002 characters> has more than 64 bits"),
        (r'output_dir="a\0b"', "holds a NUL character"),
    ],
    ids=lambda value: value[:40],
)
def test_value_that_no_run_can_have_is_refused_before_it_starts(recipe_file: Path, override: str, says: str) -> None:
    recipe_file.write_text(SMALLEST)
    message = refusal(recipe_file, [override])
    assert message is not None
    assert says in message
    assert len(message) < 2500


def test_file_without_end_is_refused_without_reading_on(recipe_file: Path) -> None:
    message = refusal(Path("/dev/zero"))
    assert message is not None
    assert "more than 256 KiB: that is no recipe" in message


def test_only_the_first_of_many_problems_are_named(recipe_file: Path) -> None:
    recipe_file.write_text(SMALLEST + "".join(f"key_{number}: 1\n" for number in range(500)))
    message = refusal(recipe_file)
    assert message is not None
    assert message.endswith("\n  and 480 more")
