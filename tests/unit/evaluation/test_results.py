from __future__ import annotations

import numpy as np
import pytest
from sample_records import plain_record, planned, sample_record

from evaluation import metrics
from evaluation.results import collect_results, summarize_samples


def test_figures_of_a_group_are_those_of_its_rounds():
    samples = [sample_record("mbpp", 0, [4, 2]), sample_record("mbpp", 1, [1])]
    figures = summarize_samples(samples, [], seed=1, greedy=False)
    assert figures.accepted_length == 7 / 3
    assert figures.interval == (1.0, 3.0)
    assert figures.accept_rate == (2 / 3, 1 / 3, 1 / 3)
    assert figures.cond_accept_rate == (2 / 3, 1 / 2, 1.0)
    assert figures.draft_tokens_per_proposal == 3.0
    assert figures.verify_rate == 7 / 12
    assert (figures.samples, figures.rounds, figures.new_tokens) == (2, 3, 9)
    assert (figures.speedup, figures.plain, figures.differing) == (None, None, None)
    assert figures.speculative.total_s == 2.0


def test_speedup_is_seconds_a_token_of_plain_decoding_over_ours():
    # ours: 2 s for 9 tokens; alone: 6 s for 12 tokens
    samples = [sample_record("mbpp", 0, [4, 2]), sample_record("mbpp", 1, [1])]
    plain = [plain_record("mbpp", 0, 5.0, 8), plain_record("mbpp", 1, 1.0, 4)]
    figures = summarize_samples(samples, plain, seed=1, greedy=False)
    assert figures.speedup == pytest.approx((6 / 12) / (2 / 9))
    assert figures.plain.num_tokens == 12


def test_speedup_counts_only_samples_that_both_sides_decoded():
    samples = [sample_record("mbpp", 0, [4, 2]), sample_record("mbpp", 1, [1])]
    figures = summarize_samples(samples, [plain_record("mbpp", 0, 7.0, 7)], seed=1, greedy=False)
    assert figures.speedup == pytest.approx(1.0 / (1 / 7))


def test_greedy_outputs_that_differ_are_counted():
    samples = [sample_record("mbpp", index, [2]) for index in range(3)]
    plain = [plain_record("mbpp", index, 1.0, 3, output_hash="same" if index else "other") for index in range(3)]
    assert summarize_samples(samples, plain, seed=1, greedy=True).differing == 1
    assert summarize_samples(samples, plain, seed=1, greedy=False).differing is None


def test_samples_without_a_round_give_no_figures_of_rounds():
    figures = summarize_samples([sample_record("mbpp", 0, [])], [], seed=1, greedy=False)
    assert (figures.accepted_length, figures.interval, figures.verify_rate) == (None, None, None)
    assert (figures.accept_rate, figures.samples) == ((), 1)


def test_results_are_by_task_by_domain_and_over_all_samples():
    tasks = [planned("gsm8k", "math", 1), planned("mbpp", "code", 1, num_skipped=2), planned("humaneval", "code", 2)]
    records = [
        sample_record("gsm8k", 0, [4]),
        sample_record("mbpp", 0, [1, 1]),
        sample_record("humaneval", 0, [3]),
        sample_record("humaneval", 1, [3, 3]),
        sample_record("humaneval", 9, [1] * 50),  # of an earlier plan: no sample of this one
    ]
    results = collect_results(
        tasks, {record.key: record for record in records}, {}, seed=1, greedy=False, published={"mbpp": 5.13}
    )
    assert {name: figures.accepted_length for name, figures in results.tasks.items()} == {
        "gsm8k": 4.0, "mbpp": 1.0, "humaneval": 3.0,
    }  # fmt: skip
    assert {name: figures.accepted_length for name, figures in results.domains.items()} == {"math": 4.0, "code": 11 / 5}
    assert results.overall.accepted_length == 15 / 6
    assert (results.tasks["mbpp"].published, results.tasks["gsm8k"].published) == (5.13, None)
    assert (results.tasks["mbpp"].skipped, results.domains["code"].skipped, results.overall.skipped) == (2, 2, 2)


def test_interval_is_the_same_however_many_are_drawn_at_once(monkeypatch):
    rounds = [[int(length)] * int(count) for length, count in np.random.default_rng(0).integers(1, 6, size=(37, 2))]
    whole = metrics.bootstrap_interval(rounds, seed=3)
    monkeypatch.setattr(metrics, "MOST_DRAWS", 37 * 11)
    assert metrics.bootstrap_interval(rounds, seed=3) == whole
