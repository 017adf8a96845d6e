from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.replay.config import ReplayConfig


def test_patience_follows_the_lease_unless_it_is_set() -> None:
    assert ReplayConfig().patience_s == (100.0, 30.0)
    assert ReplayConfig(lease_s=30.0).patience_s == (10.0, 3.0)
    assert ReplayConfig(first_chunk_s=299.0, progress_s=1.0).patience_s == (299.0, 1.0)


@pytest.mark.parametrize("name", ["first_chunk_s", "progress_s"])
def test_patience_that_outlasts_the_lease_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} 40 must be below lease_s 40: a target that hangs"):
        ReplayConfig.model_validate({"lease_s": 40.0, name: 40.0})
