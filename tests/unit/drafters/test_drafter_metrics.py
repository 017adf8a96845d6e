import pytest
import torch

from drafters.metrics import MetricSums, add_acceptance, add_confidence, add_coverage, keep_local, sample_rejections

# one sample, two blocks of three slots; the second block ends after its first slot
MASK = torch.tensor([[[1, 1, 1], [1, 0, 0]]]).bool()
ACCEPTANCE = torch.tensor([[[0.5, 0.8, 0.5], [0.3, 0.0, 0.0]]])
ONE = torch.ones(1)


def test_means_divide_reduced_sums_by_reduced_counts_in_one_call():
    calls = []

    def reduce(values):
        calls.append(values.tolist())
        return values + torch.tensor([1.0, 2.0, 0.0, 0.0])

    sums = MetricSums()
    sums.add("a", torch.tensor(3.0), 2)
    sums.add("nothing", torch.tensor(0.0), 0)
    assert sums.means(reduce) == {"a": 1.0, "nothing": 0.0}
    assert calls == [[3.0, 2.0, 0.0, 0.0]]


def test_acceptance_by_slot_and_expected_length():
    sums = MetricSums()
    add_acceptance(sums, ACCEPTANCE, MASK, ONE)
    means = sums.means(keep_local)
    assert means["accept_rate@0"] == pytest.approx(0.4)
    assert means["accept_rate@1"] == pytest.approx(0.8)
    assert means["accept_rate@2"] == pytest.approx(0.5)
    # 1 + 0.5 + 0.5·0.8 + 0.5·0.8·0.5 = 2.1 and 1 + 0.3
    assert means["tau_probabilistic"] == pytest.approx((2.1 + 1.3) / 2)


def test_samples_of_weight_zero_count_nowhere():
    acceptance, mask = ACCEPTANCE.repeat(2, 1, 1), MASK.repeat(2, 1, 1)
    acceptance[1] = 0.9
    sums, alone = MetricSums(), MetricSums()
    add_acceptance(sums, acceptance, mask, torch.tensor([1.0, 0.0]))
    add_acceptance(alone, ACCEPTANCE, MASK, ONE)
    assert sums.means(keep_local) == alone.means(keep_local)


def test_confidence_errors_are_weighted_by_the_loss_weights():
    sums = MetricSums()
    confidence = torch.tensor([[[0.7, 0.5, 0.5], [0.1, 0.0, 0.0]]])
    weights = torch.tensor([[[1.0, 0.5, 0.5], [1.0, 0.0, 0.0]]])
    add_confidence(sums, confidence, ACCEPTANCE, weights)
    means = sums.means(keep_local)
    assert means["confidence_abs_error"] == pytest.approx((0.2 + 0.5 * 0.3 + 0 + 0.2) / 3)
    assert means["confidence_bias"] == pytest.approx((0.2 - 0.5 * 0.3 + 0 - 0.2) / 3, abs=1e-6)
    # survival: 0.7, 0.35, 0.175 and 0.1 against 0.5, 0.4, 0.2 and 0.3
    assert means["confidence_cumprod_bias"] == pytest.approx((0.2 - 0.5 * 0.05 - 0.5 * 0.025 - 0.2) / 3, rel=1e-5)


def test_coverage_counts_candidates_anchors_and_supervised_slots():
    sums = MetricSums()
    candidates, tokens = torch.tensor([3]), torch.tensor([5])
    add_coverage(sums, candidates, tokens, torch.tensor([[True, True]]), MASK, ONE, num_anchors=4)
    assert sums.means(keep_local) == pytest.approx(
        {
            "valid_anchors_abs": 3.0,
            "valid_anchors_ratio": 0.6,
            "sampled_anchors_abs": 2.0,
            "sampled_anchors_ratio": 0.5,
            "block_supervised_tokens_abs": 2.0,
            "block_supervised_tokens_ratio": 2 / 3,
        }
    )


def test_rejection_of_a_sample_is_one_less_the_mean_acceptance_of_its_rows():
    acceptance, samples = torch.tensor([0.5, 0.75, 0.1]), torch.tensor([0, 0, 2])
    rejections = sample_rejections(acceptance, samples, 3)
    assert rejections.dtype == torch.float32
    assert rejections.tolist() == [pytest.approx(0.375), pytest.approx(float("nan"), nan_ok=True), pytest.approx(0.9)]
