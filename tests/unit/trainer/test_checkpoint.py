import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.errors import CheckpointError
from trainer.checkpoint import (
    LOCK,
    best_checkpoint,
    checkpoint_step,
    latest_checkpoint,
    mark_best,
    prune,
    publish,
    start_partial,
)


def write(output_dir: Path, step: int, content: str = "weights", *, latest: bool = True) -> Path:
    partial = start_partial(output_dir, step)
    (partial / "training_state").mkdir()
    (partial / "training_state" / "state").write_text(content)
    return publish(output_dir, step, latest=latest)


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()} - {LOCK}


def test_new_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def test_published_checkpoint_is_the_latest(tmp_path: Path) -> None:
    write(tmp_path, 3)
    assert write(tmp_path, 10) == tmp_path / "step_10"
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"
    assert os.readlink(tmp_path / "step_latest") == "step_10"
    assert names(tmp_path) == {"step_3", "step_10", "step_latest"}


def test_untrained_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    write(tmp_path, 0, latest=False)
    assert latest_checkpoint(tmp_path) is None


def test_half_written_checkpoint_is_never_picked_up(tmp_path: Path) -> None:
    write(tmp_path, 3)
    partial = start_partial(tmp_path, 6)
    (partial / "model.safetensors").write_text("half")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_3"
    assert not (tmp_path / "step_6").exists()


def test_interrupted_attempt_leaves_nothing_in_the_next_one(tmp_path: Path) -> None:
    (start_partial(tmp_path, 6) / "stale").write_text("half")
    assert not (write(tmp_path, 6) / "stale").exists()


def test_checkpoint_published_before_a_kill_is_replaced(tmp_path: Path) -> None:
    # Killed between the rename and the move of step_latest: the run resumes from step 3 and comes to step 6 again.
    write(tmp_path, 3)
    write(tmp_path, 6, "first", latest=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_3"
    write(tmp_path, 6, "second")
    assert (tmp_path / "step_6" / "training_state" / "state").read_text() == "second"
    assert latest_checkpoint(tmp_path) == tmp_path / "step_6"
    assert names(tmp_path) == {"step_3", "step_6", "step_latest"}


def test_prune_keeps_the_newest_and_the_untrained(tmp_path: Path) -> None:
    write(tmp_path, 0, latest=False)
    for step in (2, 4, 10, 12):
        write(tmp_path, step)
    assert prune(tmp_path, 2) == [tmp_path / "step_2", tmp_path / "step_4"]
    assert names(tmp_path) == {"step_0", "step_10", "step_12", "step_latest"}


def test_prune_keeps_what_step_latest_points_to(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 6, latest=False)
    assert prune(tmp_path, 1) == []
    assert latest_checkpoint(tmp_path) == tmp_path / "step_3"


def test_prune_removes_what_killed_attempts_left(tmp_path: Path) -> None:
    write(tmp_path, 3)
    start_partial(tmp_path, 2)
    (tmp_path / ".replaced_step_3").mkdir()
    (tmp_path / ".lock").touch()
    prune(tmp_path, 1)
    assert names(tmp_path) == {"step_3", "step_latest", ".lock"}


def test_what_killed_attempts_left_is_gone_before_the_next_checkpoint_needs_the_room(tmp_path: Path) -> None:
    write(tmp_path, 3)
    start_partial(tmp_path, 2)
    (tmp_path / ".replaced_step_3").mkdir()
    start_partial(tmp_path, 6)
    assert names(tmp_path) == {"step_3", "step_latest", ".step_6"}


def test_replaced_checkpoint_comes_back_if_the_other_did_not_take_its_place(tmp_path: Path) -> None:
    # Killed between the two renames of a checkpoint that takes the place of the latest one.
    write(tmp_path, 3)
    (tmp_path / "step_3").rename(tmp_path / ".replaced_step_3")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_3"
    (tmp_path / "step_3").rename(tmp_path / ".replaced_step_3")
    write(tmp_path, 6)
    assert names(tmp_path) == {"step_3", "step_6", "step_latest"}


def test_best_is_the_longest_accepted_length_of_those_still_there(tmp_path: Path) -> None:
    assert mark_best(tmp_path, {}) is None
    assert best_checkpoint(tmp_path) is None
    write(tmp_path, 0, latest=False)
    for step in (3, 6, 9):
        write(tmp_path, step)
    measured = {"step_0": 9.0, "step_2": 9.0, "step_3": 2.5, "step_6": 2.75, "step_9": 2.75}
    assert mark_best(tmp_path, measured) == best_checkpoint(tmp_path) == tmp_path / "step_9"
    assert os.readlink(tmp_path / "step_best") == "step_9"
    assert mark_best(tmp_path, measured | {"step_3": 3.0}) == best_checkpoint(tmp_path) == tmp_path / "step_3"
    assert mark_best(tmp_path, {"step_0": 9.0}) is None
    assert best_checkpoint(tmp_path) == tmp_path / "step_3"


def test_prune_keeps_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    mark_best(tmp_path, {"step_2": 2.5, "step_4": 2.0})
    assert prune(tmp_path, 1) == [tmp_path / "step_4"]
    assert names(tmp_path) == {"step_2", "step_6", "step_latest", "step_best"}
    write(tmp_path, 8)
    mark_best(tmp_path, {"step_2": 2.5, "step_8": 3.0})
    assert prune(tmp_path, 1) == [tmp_path / "step_2", tmp_path / "step_6"]
    assert names(tmp_path) == {"step_8", "step_latest", "step_best"}


def test_best_is_unknown_once_another_checkpoint_took_its_place(tmp_path: Path) -> None:
    write(tmp_path, 3)
    mark_best(tmp_path, {"step_3": 2.5})
    write(tmp_path, 3, "trained again")
    assert best_checkpoint(tmp_path) is None


def test_dangling_step_latest_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "step_latest").symlink_to("step_9")
    with pytest.raises(CheckpointError, match="points to step_9, which is not there: point it to"):
        latest_checkpoint(tmp_path)


def test_checkpoint_step_reads_the_folder_name() -> None:
    assert checkpoint_step(Path("runs/step_120")) == 120
    with pytest.raises(CheckpointError, match="must be step_<number>"):
        checkpoint_step(Path("runs/step_latest"))


@pytest.mark.parametrize("module", ["trainer.checkpoint", "trainer.rank", "trainer.schedule"])
def test_driver_side_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'deepspeed'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
