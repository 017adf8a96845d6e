from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from sample_records import plain_record, sample_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from untrained import DEMO_TARGET, save_untrained, write_turns

from evaluation.benchmark import BenchmarkSettings
from evaluation.outputs import as_json, write_outputs
from evaluation.report import Divergence
from evaluation.session import Session, TaskChoice, closing_warnings, prepare, run
from evaluation.tasks import PUBLISHED_TASKS
from evaluation.timing import PHASES
from evaluation.work import Work
from services.errors import CheckpointError, PromptError, UsageError
from trainer.eval_console import EvaluationDisplay, results_table


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    provenance = {"model": "demo", "fingerprint": None, "enable_thinking": False}
    return save_untrained(tmp_path_factory.mktemp("drafter"), provenance=provenance)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_turns(tmp_path / "prompts", gsm8k=["1+1?", "2+2?"], mbpp=["Write f.", "x" * 900, "Write g."])


def plan(checkpoint: Path, choice: TaskChoice, **changes) -> Session:
    values = {"target": str(DEMO_TARGET), "drafter": str(checkpoint)} | changes
    return prepare(BenchmarkSettings.model_validate(values), choice, lambda text: None)


class Decoding:
    """Makes records without decoding; `stop_after` so many it is interrupted."""

    def __init__(self, stop_after: int | None = None, output_hash: str = "same") -> None:
        self.starts = 0
        self.done: list[tuple[str, str, int]] = []
        self._stop_after = stop_after
        self._output_hash = output_hash

    @contextmanager
    def start(self) -> Iterator[object]:
        self.starts += 1
        yield self._decode

    def _decode(self, works: Sequence[Work], on_record) -> None:
        for work in works:
            for kind in ("speculative", "plain"):
                for sample in getattr(work, kind):
                    if len(self.done) == self._stop_after:
                        raise KeyboardInterrupt
                    if kind == "plain":
                        record = plain_record(sample.task, sample.index, 2.0, 4, self._output_hash)
                    else:
                        record = sample_record(sample.task, sample.index, [3, 1], domain=sample.domain)
                    on_record(record.model_copy(update={"prompt_hash": sample.prompt_hash}))
                    self.done.append((kind, sample.task, sample.index))


def evaluate(session: Session, folder: Path, decoding: Decoding, console: Console | None = None):
    with EvaluationDisplay(console or Console(file=open("/dev/null", "w"))) as display:
        return run(session, folder, decoding.start, piece_size=2, begin=display.begin, on_record=display.on_record)


def test_folder_of_tasks_is_evaluated_by_domain(checkpoint, prompts):
    session = plan(checkpoint, TaskChoice(folder=prompts))
    assert [(task.name, len(task.samples)) for task in session.tasks] == [("gsm8k", 2), ("mbpp", 3)]
    assert (session.algorithm, session.published, session.warnings) == ("dspark", {}, ())


def test_tasks_can_be_named_and_own_prompts_added(checkpoint, prompts):
    mine = write_turns(prompts.parent, mine=["a"]) / "mine.jsonl"
    named = plan(checkpoint, TaskChoice(names=("mbpp",), folder=prompts, prompts=(mine,), max_samples=1))
    assert [(task.name, len(task.samples)) for task in named.tasks] == [("mbpp", 1), ("mine", 1)]
    assert [task.name for task in plan(checkpoint, TaskChoice(prompts=(mine,))).tasks] == ["mine"]


def test_without_a_choice_all_published_tasks_are_downloaded(checkpoint, prompts, monkeypatch):
    fetched: list[str] = []

    def fetch(task, folder, say):
        fetched.append(task.name)
        return prompts / "gsm8k.jsonl"

    monkeypatch.setattr("evaluation.session.fetch", fetch)
    assert len(plan(checkpoint, TaskChoice()).tasks) == 9
    assert tuple(fetched) == PUBLISHED_TASKS


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"names": ("gsm9k",)}, "no task 'gsm9k'"),
        ({"names": ("alpaca",)}, r"no alpaca\.jsonl"),
        ({"names": ()}, "no task is named"),
        ({"prompts": ("mbpp.jsonl",)}, "there is a task mbpp already"),
    ],
)
def test_wrong_choice_of_tasks_is_wrong_usage(checkpoint, prompts, choice, words):
    with pytest.raises(UsageError, match=words):
        plan(checkpoint, TaskChoice(folder=prompts, **choice))


def test_folder_without_any_task_lists_the_names(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"prompts of no task.*gsm8k"):
        plan(checkpoint, TaskChoice(folder=tmp_path))


def test_missing_drafter_is_refused_before_anything_is_written(tmp_path, prompts):
    with pytest.raises(CheckpointError, match="no drafter checkpoint"):
        plan(tmp_path, TaskChoice(folder=prompts))


def test_malformed_line_of_own_prompts_is_an_error(checkpoint, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"turns": ["a"]}\n{"turn": ["b"]}\n')
    with pytest.raises(PromptError, match=r"mine\.jsonl:2"):
        plan(checkpoint, TaskChoice(prompts=(tmp_path / "mine.jsonl",)))


def test_interrupted_evaluation_is_gone_on_with(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts))
    first, second, third = Decoding(stop_after=5), Decoding(), Decoding()
    with pytest.raises(KeyboardInterrupt):
        evaluate(session, tmp_path / "out", first)
    results = evaluate(session, tmp_path / "out", second)
    assert len(first.done) == 5
    assert len(second.done) == 5
    assert not set(first.done) & set(second.done)
    assert evaluate(session, tmp_path / "out", third) == results
    assert third.starts == 0
    assert results.overall.samples == 5
    assert results.overall.accepted_length == 2.0


def test_folders_are_known_wherever_replicas_run(checkpoint, prompts, monkeypatch):
    monkeypatch.chdir(DEMO_TARGET.parent)
    session = plan(checkpoint, TaskChoice(folder=prompts), target="./target")
    assert session.settings.target == str(DEMO_TARGET.resolve())


def test_decoder_that_cannot_start_leaves_no_folder(checkpoint, prompts, tmp_path):
    @contextmanager
    def broken():
        raise CheckpointError("cut short")
        yield

    decoding = Decoding()
    decoding.start = broken  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="cut short"):
        evaluate(plan(checkpoint, TaskChoice(folder=prompts)), tmp_path / "out", decoding)
    assert not (tmp_path / "out").exists()


def test_same_command_finds_its_folder_and_others_get_their_own(checkpoint, prompts):
    folders = [
        plan(checkpoint, TaskChoice(folder=prompts, max_samples=samples), **changes).default_folder()
        for samples, changes in ((2, {}), (2, {}), (1, {}), (2, {"temperature": 0.0}))
    ]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_times_of_other_threads_are_another_evaluation_and_figures_without_times_are_not(checkpoint, prompts):
    def folders(**changes) -> list[Path]:
        plans = (plan(checkpoint, TaskChoice(folder=prompts), threads=threads, **changes) for threads in (None, 3))
        return [found.default_folder() for found in plans]

    with_times, without_times = folders(), folders(measure_speedup=False)
    assert with_times[0] != with_times[1]
    assert without_times[0] == without_times[1]


def test_drafter_that_was_trained_on_is_another_evaluation(checkpoint, prompts, tmp_path):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    before = plan(copy, TaskChoice(folder=prompts))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert plan(copy, TaskChoice(folder=prompts)).identity != before.identity


def warned(session: Session, word: str) -> bool:
    return any(word in warning for warning in session.warnings)


def test_thinking_mode_mismatch_is_warned_of_in_the_table(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts), enable_thinking=True)
    assert warned(session, "trained on non-thinking prompts and is measured on thinking ones")
    assert not warned(plan(checkpoint, TaskChoice(folder=prompts)), "thinking")
    results = evaluate(session, tmp_path / "out", Decoding())
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(session, results, closing_warnings(session, results)))
    assert "! the drafter was trained on non-thinking prompts" in console.export_text()


def test_other_targets_drafter_is_warned_of_where_it_is_allowed(prompts, tmp_path):
    checkpoint = save_untrained(tmp_path / "d", provenance={"model": "other/model", "fingerprint": "f00"})
    with pytest.raises(CheckpointError, match="other/model"):
        plan(checkpoint, TaskChoice(folder=prompts))
    assert warned(plan(checkpoint, TaskChoice(folder=prompts), allow_other_target=True), "other/model")


def test_prompts_that_are_too_long_are_counted_in_the_warnings(checkpoint, tmp_path):
    prompts = write_turns(tmp_path / "p", mbpp=["Write f.", "long words " * 900])
    session = plan(checkpoint, TaskChoice(folder=prompts))
    assert warned(session, "1 of 2 prompts of mbpp are longer than the target's context of 2048 tokens")
    assert session.tasks[0].num_skipped == 1


def test_published_row_stands_beside_and_other_settings_are_warned_of(checkpoint, prompts, tmp_path):
    target = tmp_path / "Qwen3-4B"
    shutil.copytree(DEMO_TARGET, target)
    session = plan(checkpoint, TaskChoice(folder=prompts), target=str(target), max_new_tokens=8)
    assert session.published["gsm8k"] == 6.11
    assert warned(session, "the published figures for Qwen3-4B are of temperature 1")
    assert not warned(plan(checkpoint, TaskChoice(folder=prompts), target=str(target)), "published")
    results = evaluate(session, tmp_path / "out", Decoding())
    assert results.tasks["gsm8k"].published == 6.11
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(session, results, session.warnings))
    assert "6.11" in console.export_text()


def test_greedy_output_that_differs_is_warned_of(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts), temperature=0.0)
    same = evaluate(session, tmp_path / "same", Decoding())
    assert closing_warnings(session, same) == list(session.warnings)
    other = evaluate(session, tmp_path / "other", Decoding(output_hash="different"))
    assert "greedy output differs" in closing_warnings(session, other)[-1]
    assert "5 of 5 samples: decoding is not lossless" in closing_warnings(session, other)[-1]


def test_first_divergence_that_rounding_does_not_explain_is_shown(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts), temperature=0.0, dtype="bfloat16")
    results = evaluate(session, tmp_path / "out", Decoding(output_hash="different"))
    tie, beyond = (
        Divergence(
            sample=sample, position=7, target_token=1, our_token=2, top2_gap=gap, token_gap=gap, within_rounding=gap < 1
        )
        for sample, gap in ((1, 0.0625), (2, 3.25))
    )

    def words(*divergences: Divergence) -> str:
        changes = {"divergences": divergences}
        tasks = results.tasks | {"mbpp": results.tasks["mbpp"].model_copy(update=changes)}
        found = results.model_copy(update={"tasks": tasks, "overall": results.overall.model_copy(update=changes)})
        return closing_warnings(session, found)[-1]

    assert words() == (
        "greedy output differs from the target's own in 5 of 5 samples: rounding in bfloat16 may do that, float32 tells"
    )
    assert "rounding in bfloat16 does that; sample 1 of mbpp left it at new token 7" in words(tie)
    assert "two largest logits are 0.0625 apart, a tie" in words(tie)
    assert "1 beyond what rounding in bfloat16 explains; sample 2 of mbpp" in words(tie, beyond)


def test_json_has_the_figures_that_scripts_read(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts))
    results = evaluate(session, tmp_path / "out", Decoding())
    answer = json.loads(json.dumps(as_json(session, results, ["w"], tmp_path)))
    figures = answer["tasks"]["mbpp"]
    assert figures["accepted_length"] == 2.0
    assert figures["interval"] == [2.0, 2.0]
    assert figures["accept_rate"] == [0.5, 0.5, 0.0]
    assert figures["samples"] == 3
    assert figures["speedup"] == pytest.approx((2 / 4) / (1 / 5))
    assert set(answer["domains"]) == {"math", "code"}
    assert answer["warnings"] == ["w"]
    assert answer["settings"]["seed"] == 980406


def test_csv_and_tensorboard_hold_the_same_figures(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts))
    folder = tmp_path / "out"
    results = evaluate(session, folder, Decoding())
    for _ in range(2):  # again: nothing is doubled
        write_outputs(session, results, [], folder)
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["group"], row["name"]) for row in rows] == [
        ("task", "gsm8k"), ("task", "mbpp"), ("domain", "math"), ("domain", "code"), ("all", "all"),
    ]  # fmt: skip
    assert rows[1]["accepted_length"] == "2.0"
    assert rows[1]["accept_rate@1"] == "0.5"
    assert rows[1]["published"] == ""
    assert [float(rows[1][name]) for name in PHASES] == [
        getattr(results.tasks["mbpp"].speculative, name) for name in PHASES
    ]
    assert float(rows[1]["plain_s"]) == results.tasks["mbpp"].plain.total_s
    assert json.loads((folder / "results.json").read_text())["tasks"]["mbpp"]["samples"] == 3
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("task/mbpp/accept_rate")] == [
        (0, 0.5),
        (1, 0.5),
        (2, 0),
    ]
    assert [point.value for point in events.Scalars("all/accepted_length")] == [2.0]


def test_progress_shows_accepted_length_so_far(checkpoint, prompts, tmp_path):
    session = plan(checkpoint, TaskChoice(folder=prompts))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with pytest.raises(KeyboardInterrupt):
        evaluate(session, tmp_path / "out", Decoding(stop_after=5), console)
    evaluate(session, tmp_path / "out", Decoding(), console)
    text = console.export_text()
    assert "1/10 · gsm8k τ 2.00 · all τ 2.00" in text
    assert "5 of 10 records are there" in text
