from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sample_records import sample_record
from untrained import DEMO_TARGET, save_untrained, write_turns

from evaluation.benchmark import BenchmarkSettings
from evaluation.confidence.decoding import StudyDecoder
from evaluation.confidence.study import Study, StudyPlan, check_has_head, halves, run_study
from evaluation.confidence.sweep import sweep_point
from evaluation.confidence.temperatures import TEMPERATURES_NAME, ConfidenceTemperatures
from evaluation.session import Session, TaskChoice, prepare
from services.errors import CheckpointError, OutputDirError, PromptError

PROMPTS = ["Write f.", "What is 2 + 2?", "Sort a list.", "Say hello.", "Why?"]


@dataclass
class Stages:
    """A watcher that keeps what it was told."""

    begun: list[tuple[str, int, int]] = field(default_factory=list)
    advanced: int = 0

    def begin(self, stage: str, num_done: int, num_in_all: int) -> None:
        self.begun.append((stage, num_done, num_in_all))

    def advance(self) -> None:
        self.advanced += 1


def session_of(folder: Path, *, prompts: list[str] = PROMPTS, max_new_tokens: int = 12) -> Session:
    drafter = folder / "drafter"
    if not drafter.exists():
        save_untrained(drafter, algorithm="dspark")
    settings = BenchmarkSettings(
        target=str(DEMO_TARGET),
        drafter=str(drafter),
        max_new_tokens=max_new_tokens,
        batch_size=4,
        measure_speedup=False,
    )
    tasks = write_turns(folder / "tasks", mbpp=prompts)
    return prepare(settings, TaskChoice(folder=tasks), lambda text: None)


def study_of(session: Session, folder: Path, watcher: Stages, *, save: bool = True, **plan) -> Study:
    values = {"thresholds": (0.0, 0.5), "calibrated_sweep": False, "concurrencies": (1, 3)} | plan
    return run_study(
        session,
        StudyPlan.model_validate(values),
        folder,
        lambda: StudyDecoder(session),
        watcher,
        save_to=Path(session.settings.drafter) if save else None,
        hardware="this machine",
    )


@dataclass
class Done:
    """A study that has run."""

    folder: Path
    session: Session
    watcher: Stages
    study: Study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("study")
    session, watcher = session_of(folder), Stages()
    return Done(folder, session, watcher, study_of(session, folder / "out", watcher))


def test_study_fits_on_one_half_and_judges_on_the_other(done: Done) -> None:
    study = done.study
    assert done.watcher.begun == [
        ("threshold 0", 0, 5),
        ("threshold 0.5", 0, 2),
        ("steps of 1 requests", 0, 2),
        ("steps of 3 requests", 1, 2),
    ]
    assert done.watcher.advanced == 5 + 2 + 2
    assert (study.num_samples_fitted, study.num_samples_judged) == (3, 2)
    assert [slot.position for slot in study.head] == [slot.position for slot in study.calibrated] == [0, 1, 2]
    assert study.head[0].num_rounds == study.num_rounds_judged == study.sweep[0].num_rounds
    assert len(study.temperatures) == 3
    assert [point.threshold for point in study.sweep] == [0.0, 0.5]
    assert study.sweep[0].draft_tokens_per_proposal == pytest.approx(3, abs=0.2)
    assert study.sweep[1].draft_tokens_per_proposal < study.sweep[0].draft_tokens_per_proposal
    assert [times.num_requests for times in study.step_times] == [1, 3]
    assert all(len(row.fixed) == 4 and row.scheduled > 0 for row in study.throughput)


def test_study_leaves_its_files(done: Done) -> None:
    assert Study.model_validate_json((done.folder / "out" / "confidence.json").read_text()) == done.study
    assert (done.folder / "out" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    saved = ConfidenceTemperatures.load(done.folder / "drafter")
    assert saved == ConfidenceTemperatures.load(done.folder / "out")
    assert saved.temperatures == done.study.temperatures
    assert (saved.tasks, saved.num_samples, saved.decoding_temperature) == (("mbpp",), 3, 1.0)
    assert done.study.saved_to == str(done.folder / "drafter" / TEMPERATURES_NAME)


def test_same_study_again_decodes_nothing_twice(done: Done) -> None:
    watcher = Stages()
    again = study_of(done.session, done.folder / "out", watcher)
    assert watcher.begun[:2] == [("threshold 0", 5, 5), ("threshold 0.5", 2, 2)]
    measured = {"step_times", "throughput"}
    assert again.model_dump(exclude=measured) == done.study.model_dump(exclude=measured)


def test_calibrated_sweep_has_records_of_its_own_and_no_save_leaves_the_drafter_as_it_is(
    done: Done,
) -> None:
    drafter = Path(done.session.settings.drafter)
    (drafter / TEMPERATURES_NAME).unlink()
    study = study_of(done.session, done.folder / "out", Stages(), save=False, calibrated_sweep=True, concurrencies=(1,))
    assert study.saved_to is None
    assert not (drafter / TEMPERATURES_NAME).exists()
    temperatures = {
        name: json.loads((done.folder / "out" / name / "evaluation.json").read_text())["confidence_temperatures"]
        for name in ("threshold-0.5", "threshold-0.5-calibrated")
    }
    assert temperatures == {"threshold-0.5": None, "threshold-0.5-calibrated": list(study.temperatures)}


def test_folder_of_another_study_is_refused(done: Done) -> None:
    changed = session_of(done.folder, max_new_tokens=5)
    with pytest.raises(OutputDirError, match=r"max_new_tokens was 12 and is 5"):
        study_of(changed, done.folder / "out", Stages())


def test_one_prompt_cannot_be_halved(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="there is only one prompt: give at least two"):
        halves(session_of(tmp_path, prompts=["Write f."]))


def test_halves_take_turns(tmp_path: Path) -> None:
    assert halves(session_of(tmp_path)) == ({("mbpp", 0), ("mbpp", 2), ("mbpp", 4)}, {("mbpp", 1), ("mbpp", 3)})


@pytest.mark.parametrize(
    "settings", [{"algorithm": "dspark", "enable_confidence_head": False}, {"algorithm": "dflash", "markov_rank": 0}]
)
def test_drafter_without_a_confidence_head_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = save_untrained(tmp_path / "drafter", **settings)
    with pytest.raises(CheckpointError, match=r"has no confidence head.*drafter\.enable_confidence_head: true"):
        check_has_head(folder)


def test_folder_without_a_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no drafter checkpoint"):
        check_has_head(tmp_path)


def test_drafter_with_a_confidence_head_is_taken(tmp_path: Path) -> None:
    check_has_head(save_untrained(tmp_path / "drafter", algorithm="dspark"))


def test_sweep_point_counts_rounds_drafts_and_tokens() -> None:
    first = sample_record("mbpp", 0, [3, 1], proposal_lengths=[3, 1], accepted_draft_lengths=[2, 0])
    second = sample_record("mbpp", 1, [2], proposal_lengths=[2], accepted_draft_lengths=[1])
    point = sweep_point(0.3, [first, second], seed=0)
    assert point.accepted_length == pytest.approx(6 / 3)
    assert point.acceptance == pytest.approx(3 / 6)
    assert point.draft_tokens_per_proposal == pytest.approx(6 / 3)
    assert point.verify_rate == pytest.approx(6 / (6 + 3))
    assert (point.threshold, point.num_rounds) == (0.3, 3)


def test_sweep_point_without_a_verified_draft_has_no_acceptance() -> None:
    record = sample_record("mbpp", 0, [1, 1], proposal_lengths=[0, 0], accepted_draft_lengths=[0, 0])
    point = sweep_point(0.9, [record], seed=0)
    assert point.acceptance is None
    assert point.verify_rate == 1.0
