from __future__ import annotations

from pathlib import Path

import pytest

from services.errors import CheckpointError
from services.prompts.lives import count_life


def test_lives_are_counted_from_zero_over_all_processes(tmp_path: Path):
    assert [count_life(tmp_path / "lives") for _ in range(3)] == [0, 1, 2]
    assert (tmp_path / "lives").read_text() == "3\n"


def test_file_that_holds_no_number_is_refused_by_name(tmp_path: Path):
    (tmp_path / "lives").write_text("many\n")
    with pytest.raises(CheckpointError, match=r"lives: 'many.*is no number below"):
        count_life(tmp_path / "lives")
