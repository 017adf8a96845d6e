"""The training benchmark at sizes where its figures can be counted by hand."""

from dataclasses import replace

import pytest
import torch

from drafters.anchors import Anchors
from evaluation.bench import train
from evaluation.bench.train import (
    CPU_SIZE,
    BenchSize,
    TrainingSteps,
    block_flops,
    eagle3_flops,
    measure_size,
    peak_bytes,
    peak_loss_bytes,
)

TINY = BenchSize("tiny", 16, 24, 4, 2, 8, 600, 2, 6, 2, 24, 12, torch.float32)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_peak_counts_what_exists_at_once_and_nothing_that_was_there_before():
    there_before = torch.ones(1000)

    def run():
        first = there_before + 1  # 4000 bytes
        second = first + 1  # 8000 bytes with the first
        del first
        return second * 2  # 8000 again, not 12000

    assert peak_bytes(run, torch.device("cpu")) == pytest.approx(8000, abs=600)


def test_peak_sees_temporaries_inside_kernels():
    rows = torch.randn(64, 1000)
    output = torch.empty(64)
    assert peak_bytes(lambda: torch.logsumexp(rows, 1, out=output), torch.device("cpu")) >= rows.nbytes


def test_every_drafter_has_both_ways_measured():
    results = measure_size(TINY, lambda _: None, rounds=2)
    assert {name: set(ways) for name, ways in results.items()} == {
        name: {"fused", "plain"} for name in ("dspark", "dflash", "eagle3")
    }
    for ways in results.values():
        for measure in ways.values():
            assert measure["step_s"] > 0
            assert measure["peak_loss_bytes"] > 0
            assert measure["tokens_per_s"] == pytest.approx(48 / measure["step_s"])
            assert measure["mfu"] is None


@pytest.mark.parametrize("algorithm", train.DRAFTERS)
def test_fused_loss_takes_at_most_a_fifth_of_the_plain_ones_memory(algorithm):
    size = replace(CPU_SIZE, hidden_size=32)  # the width of rows hardly matters, and this is quick
    num_rows = 95 if algorithm == "eagle3" else 438
    fused, plain = (peak_loss_bytes(size, algorithm, kind, num_rows) for kind in train.KINDS)
    assert fused <= plain / 5


def test_model_flops_of_a_block_step_by_hand():
    steps = TrainingSteps(TINY, "dflash")
    drafter = steps._drafter
    anchors = Anchors(torch.tensor([[13, 20], [15, 0]]), torch.tensor([[True, True], [True, False]]))
    eval_mask = torch.zeros(2, 2, 7, dtype=torch.bool)
    eval_mask[0, :, :2] = True
    target_rows = torch.tensor([[[13, 14], [14, 15]]])
    rows = torch.zeros(2, 2, 7, dtype=torch.long)
    rows[0, :, :2] = target_rows[0]
    slots, context = 3 * 7, 20 + 15
    layer = slots * (2 * 16 * 32 + 3 * 16 * 24) + (slots + context) * 2 * 16 * 16
    pairs = 7 * (13 + 20 + 15) + slots * 7
    expected = 6 * 2 * layer + 4 * (context * 16 * 5 * 16 + 4 * 16 * 600) + 2 * 3 * 16 * 600 + 12 * 2 * pairs * 32
    assert block_flops(drafter, TINY, anchors, eval_mask, rows) == expected


def test_model_flops_of_an_eagle3_step_by_hand():
    size = replace(TINY, num_samples=1, num_tokens=6, num_supervised=3)
    drafter = TrainingSteps(size, "eagle3")._drafter
    drafter.settings = drafter.settings.model_copy(update={"ttt_length": 2})
    # Two positions draft, 3 and 4 of 0…5: at step 0 they see 4 and 5 keys, at step 1 one more each.
    layer = 2 * 2 * (3 * 16 * 32 + 3 * 16 * 24) + (4 + 2) * 4 * 16 * 16
    pairs = (4 + 5) * 2 + 2 * 1
    expected = 6 * layer + 4 * (4 * 16 * 5 * 16 + 2 * 2 * 16 * 600) + 2 * 2 * 16 * 600 + 12 * pairs * 32
    assert eagle3_flops(drafter, size) == expected
