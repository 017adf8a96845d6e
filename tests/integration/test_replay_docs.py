"""The examples of docs/replay-service.md, run as they stand there."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_serving import SIGNATURE, TOKENS, features, serving

from services.contracts import CaptureJob
from services.replay.embedded import EmbeddedRedis

PAGE = Path(__file__).parents[2] / "docs" / "replay-service.md"
MOST_LINES = 24


def example(name: str) -> str:
    """The block of the page that begins with ```python NAME."""
    (block,) = re.findall(rf"^```python {name}\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert block.count("\n") <= MOST_LINES
    return str(block)


def test_examples_of_the_page_stream_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [features(number) for number in range(4)]
    samples = [(range(TOKENS), [0, 0, 0, 1, 1, 1], [3, 4], *pair) for pair in tensors]
    trained: list[tuple[CaptureJob, torch.Tensor]] = []
    with EmbeddedRedis.start(tmp_path, 1024**2) as embedded, serving(embedded) as served:
        names: dict[str, Any] = {"address": served.address, "samples": samples, "time": time}
        exec(example("producer"), dict(names))
        exec(example("producer"), dict(names))
        again = served.table.info()
        consumer = example("consumer").replace("wait_s=5", "wait_s=0.1")
        exec(consumer, {**names, "train": lambda job, context: trained.append((job, context))})
        served.assert_at_rest()
    assert again.inserts == 4
    assert capsys.readouterr().out.splitlines() == [
        *(f"{number} inserted" for number in range(4)),
        *(f"{number} was there already" for number in range(4)),
    ]
    assert [job.capture for job, _ in trained] == [0, 1, 2, 3]
    for (job, context), (expected, _) in zip(trained, tensors, strict=True):
        assert torch.equal(context, expected)
        assert context.shape == (job.num_tokens, len(SIGNATURE.layer_ids) * SIGNATURE.hidden_size)
