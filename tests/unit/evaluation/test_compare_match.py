from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from sample_records import plain_record, sample_record
from untrained import DEMO_TARGET, save_untrained, write_turns

from evaluation.benchmark import BenchmarkSettings
from evaluation.compare.entrants import Match, prepare_match
from evaluation.compare.match import PLAIN, Decoded, run_match
from evaluation.session import Decode, TaskChoice
from services.errors import CheckpointError, OutputDirError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drafters")
    return [save_untrained(folder / f"d{rank}", markov_rank=rank) for rank in (2, 3, 4)]


def plan(drafters: Sequence[Path], folder: Path, **changes) -> Match:
    prompts = write_turns(folder / "prompts", gsm8k=["a", "b", "c"], mbpp=["d"])

    def settings_of(drafter: str) -> BenchmarkSettings:
        return BenchmarkSettings.model_validate({"target": str(DEMO_TARGET), "drafter": drafter} | changes)

    return prepare_match(drafters, settings_of, TaskChoice(folder=prompts), lambda text: None)


class Decoding:
    """Makes records without decoding; after `stop_after` of them it is interrupted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.starts = 0
        self.done: list[tuple[str, str, int]] = []
        self._stop_after = stop_after

    @contextmanager
    def start(self, settings: Sequence[BenchmarkSettings]) -> Iterator[Sequence[Decode]]:
        self.starts += 1
        yield [self._with(Path(one.drafter).name) for one in settings]

    def _with(self, name: str) -> Decode:
        def decode(works, on_record) -> None:
            for work in works:
                for sample in (*work.speculative, *work.plain):
                    if len(self.done) == self._stop_after:
                        raise KeyboardInterrupt
                    if work.plain:
                        record = plain_record(sample.task, sample.index, 2.0, 4)
                    else:
                        record = sample_record(sample.task, sample.index, [3, 1], domain=sample.domain)
                    self.done.append((PLAIN if work.plain else name, sample.task, sample.index))
                    on_record(record.model_copy(update={"prompt_hash": sample.prompt_hash}))

        return decode


def run(match: Match, folder: Path, decoding: Decoding, piece_size: int = 2) -> tuple[Decoded, list]:
    heard: list = []
    decoded = run_match(
        match,
        folder,
        decoding.start,
        piece_size=piece_size,
        begin=lambda done, in_all: heard.append((done, in_all)),
        on_record=lambda label, record: heard.append((label, record.key)),
    )
    return decoded, heard


def test_drafters_and_target_take_turns_piece_by_piece(checkpoints, tmp_path):
    decoding = Decoding()
    decoded, heard = run(plan(checkpoints[:2], tmp_path), tmp_path / "out", decoding)
    assert decoding.done == [
        ("d2", "gsm8k", 0), ("d2", "gsm8k", 1), ("d3", "gsm8k", 0), ("d3", "gsm8k", 1), (PLAIN, "gsm8k", 0),
        (PLAIN, "gsm8k", 1),
        ("d3", "gsm8k", 2), (PLAIN, "gsm8k", 2), ("d2", "gsm8k", 2),
        (PLAIN, "mbpp", 0), ("d2", "mbpp", 0), ("d3", "mbpp", 0),
    ]  # fmt: skip
    assert heard[0] == (0, 12)
    assert heard[1] == ("d2", ("gsm8k", 0))
    assert [list(samples) for samples in decoded.samples] == [list(decoded.plain)] * 2
    assert len(decoded.plain) == 4


def test_interrupted_comparison_is_gone_on_with(checkpoints, tmp_path):
    match, folder = plan(checkpoints[:2], tmp_path), tmp_path / "out"
    first, second, third = Decoding(stop_after=5), Decoding(), Decoding()
    with pytest.raises(KeyboardInterrupt):
        run(match, folder, first)
    decoded, heard = run(match, folder, second)
    assert heard[0] == (5, 12)
    assert len(first.done) + len(second.done) == 12
    assert not set(first.done) & set(second.done)
    assert run(match, folder, third) == (decoded, [(12, 12)])
    assert third.starts == 0


def test_drafter_that_joins_later_alone_is_decoded(checkpoints, tmp_path):
    run(plan(checkpoints[:2], tmp_path), tmp_path / "out", Decoding())
    more = Decoding()
    decoded, _ = run(plan([checkpoints[2], *checkpoints[:2]], tmp_path), tmp_path / "out", more)
    assert {name for name, _, _ in more.done} == {"d4"}
    assert len(decoded.samples) == 3


def test_speedup_can_be_left_out(checkpoints, tmp_path):
    decoding = Decoding()
    decoded, heard = run(plan(checkpoints[:2], tmp_path, measure_speedup=False), tmp_path / "out", decoding)
    assert {name for name, _, _ in decoding.done} == {"d2", "d3"}
    assert (decoded.plain, heard[0]) == ({}, (0, 8))


def test_folder_of_other_settings_is_refused(checkpoints, tmp_path):
    run(plan(checkpoints[:2], tmp_path), tmp_path / "out", Decoding())
    with pytest.raises(OutputDirError, match=r"temperature was 1\.0 and is 0\.0"):
        run(plan(checkpoints[:2], tmp_path, temperature=0.0), tmp_path / "out", Decoding())


def test_folder_with_other_things_is_left_as_it_is(checkpoints, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(OutputDirError, match=r"no comparison \(thesis\.tex\)"):
        run(plan(checkpoints[:2], tmp_path), folder, Decoding())
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputDirError, match="is a file"):
        run(plan(checkpoints[:2], tmp_path), folder / "thesis.tex", Decoding())


def test_drafters_that_cannot_be_loaded_leave_no_folder(checkpoints, tmp_path):
    @contextmanager
    def broken(settings):
        raise CheckpointError("cut short")
        yield

    decoding = Decoding()
    decoding.start = broken  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="cut short"):
        run(plan(checkpoints[:2], tmp_path), tmp_path / "out", decoding)
    assert not (tmp_path / "out").exists()


def test_same_drafters_and_settings_find_their_folder_again(checkpoints, tmp_path):
    folders = [
        plan(drafters, tmp_path, **changes).default_folder()
        for drafters, changes in (
            (checkpoints[:2], {}),
            (checkpoints[:2], {}),
            (checkpoints[1:], {}),
            (checkpoints[:2], {"temperature": 0.0}),
        )
    ]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
