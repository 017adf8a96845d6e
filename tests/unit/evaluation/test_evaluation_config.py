from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from evaluation.config import EvaluationConfig


@pytest.mark.parametrize(
    ("given", "placement", "num_gpus"),
    [
        ({}, "share_target", 0.0),
        ({"num_gpus": 2}, "gpu", 2.0),
        ({"num_gpus": 0.25}, "share_target", 0.25),
        ({"placement": "gpu"}, "gpu", 1.0),
        ({"placement": "off"}, "off", 0.0),
        ({"placement": False}, "off", 0.0),
        ({"placement": "off", "num_gpus": 0.5}, "off", 0.5),
    ],
)
def test_placement_and_gpus_follow_each_other(given: dict[str, Any], placement: str, num_gpus: float) -> None:
    config = EvaluationConfig.model_validate(given)
    assert (config.placement, config.num_gpus) == (placement, num_gpus)
    assert EvaluationConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"placement": "gpu", "num_gpus": 0.5}, "placement gpu takes whole GPUs, not 0.5"),
        ({"placement": "gpu", "num_gpus": 0}, "placement gpu takes whole GPUs, not 0"),
        ({"placement": "share_target", "num_gpus": 1}, "share_target takes a part of the target's GPU, not 1"),
        ({"placement": "cpu"}, "Input should be 'gpu', 'share_target' or 'off'"),
        ({"num_gpus": "many"}, "valid number"),
    ],
)
def test_gpus_that_do_not_fit_the_placement_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EvaluationConfig.model_validate(given)


def test_during_training_few_prompts_are_decoded_by_one_thread_on_the_targets_cpus() -> None:
    shared = EvaluationConfig(max_samples=48, during_samples=16, threads=8)
    assert (shared.num_during, shared.threads_during, shared.is_low_priority) == (16, 1, True)
    own = EvaluationConfig(max_samples=8, during_samples=16, threads=8, placement="gpu")
    assert (own.num_during, own.threads_during, own.is_low_priority) == (8, 8, False)
    assert (shared.dtype, own.dtype) == ("float32", "bfloat16")
    assert EvaluationConfig(max_samples=8).num_during == 8
