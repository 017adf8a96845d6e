import dataclasses

import pytest
import torch
from one_sequence import OneSequence

from drafters import FeatureBatch
from drafters.anchors import Anchors, PackedBlocks
from drafters.backbone import SCATTERED_OVER

SEEDS = [21, 22, 23, 24]
KINDS = ["vanilla", "gated", "rnn"]


def gradients(drafter):
    return {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.requires_grad}


def train(drafter, batch, **options):
    drafter.zero_grad(set_to_none=True)
    out = drafter.training_forward(batch, **options)
    out.loss.backward()
    return out, gradients(drafter)


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def rows_of(batch, rows):
    tensors = [field.name for field in dataclasses.fields(batch) if field.name != "sample_lengths"]
    return FeatureBatch(**{name: getattr(batch, name)[rows] for name in tensors})


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_do_not_depend_on_return_logits(make_drafter, make_batch, kind):
    drafter, batch = make_drafter(markov_head_type=kind), make_batch(20, 14)
    plain, plain_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2], return_logits=True)
    selected, selected_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2])
    assert selected.draft_logits is None
    assert selected.metrics == pytest.approx(plain.metrics, rel=1e-5)
    torch.testing.assert_close(selected.loss, plain.loss)
    assert_same_gradients(selected_gradients, plain_gradients)


def test_forward_is_training_forward(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20)
    assert drafter(batch, anchor_seeds=[1]).loss == drafter.training_forward(batch, anchor_seeds=[1]).loss


def test_only_needed_rows_of_the_last_hidden_state_are_read(make_drafter, make_batch):
    drafter, batch = make_drafter(num_anchors=100), make_batch(20, 14)
    batch.loss_mask[0, 9:12] = False
    expected, expected_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2])
    needed = drafter.needed_rows(batch.loss_mask)
    assert needed.sum() < needed.numel()
    last = torch.where(needed[..., None], batch.target_last_hidden_states, torch.nan)
    out, out_gradients = train(
        drafter, dataclasses.replace(batch, target_last_hidden_states=last), anchor_seeds=SEEDS[:2]
    )
    assert torch.equal(out.loss, expected.loss)
    assert out.metrics == expected.metrics
    assert_same_gradients(out_gradients, expected_gradients)


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_no_numbers_are_refused_with_their_place(make_drafter, make_batch, algorithm, wrong):
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(12, 9)
    for name, token in (("target_hidden_states", 2), ("target_last_hidden_states", 6)):
        features = getattr(batch, name).clone()
        features[1, token, 3] = wrong
        with pytest.raises(
            ValueError, match=f"{name} has NaN or infinite values at 1 of 24 tokens, token {token} of sample 1"
        ):
            drafter.training_forward(dataclasses.replace(batch, **{name: features}))


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_features_of_another_width_are_refused_with_both_widths(make_drafter, make_batch, algorithm):
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(12)
    for name, message in (
        ("target_hidden_states", r"is 47 wide, but this drafter reads 48: 16 of each of the layers \[0, 2, 4\]"),
        ("target_last_hidden_states", "is 15 wide, but this drafter reads 16: the target's hidden size"),
    ):
        narrow = dataclasses.replace(batch, **{name: getattr(batch, name)[..., 1:]})
        with pytest.raises(ValueError, match=f"{name} {message}"):
            drafter.training_forward(narrow)


def test_anchors_of_another_batch_are_refused(make_drafter, make_batch):
    anchors = Anchors(torch.tensor([[8], [14]]), torch.ones(2, 1, dtype=torch.bool))
    batch = packed(make_batch(20, 14), (20, 14))
    with pytest.raises(ValueError, match="anchor 14 of sample 1 is none of its 14 positions"):
        make_drafter().training_forward(batch, anchors=anchors)


def test_last_row_of_a_packed_sample_may_hold_anything(make_drafter, make_batch):
    """Its last token and the next sample's first one are supervised, but neither predicts the other."""
    drafter, lengths = make_drafter(), (9, 8)
    batch = packed(make_batch(*lengths, prompt=0), lengths)
    expected = drafter.training_forward(batch, anchor_seeds=SEEDS[:2]).loss
    last = batch.target_last_hidden_states.clone()
    last[0, [8, 16]] = torch.nan
    changed = dataclasses.replace(batch, target_last_hidden_states=last)
    assert drafter.training_forward(changed, anchor_seeds=SEEDS[:2]).loss == expected


def test_every_needed_row_is_read_when_all_candidates_are_anchors(make_drafter, make_batch):
    drafter, batch = make_drafter(num_anchors=100), make_batch(12)
    loss = drafter.training_forward(batch, anchor_seeds=[1]).loss.item()
    for row in drafter.needed_rows(batch.loss_mask)[0].nonzero().flatten().tolist():
        last = batch.target_last_hidden_states.clone()
        last[0, row] += 1.0
        out = drafter.training_forward(dataclasses.replace(batch, target_last_hidden_states=last), anchor_seeds=[1])
        assert out.loss.item() != loss, row


def test_context_at_or_after_an_anchor_is_not_seen(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20)
    anchors = Anchors(torch.tensor([[8, 12]]), torch.ones(1, 2, dtype=torch.bool))

    def logits_with(position):
        features = batch.target_hidden_states.clone()
        features[0, position] += 1.0
        changed = dataclasses.replace(batch, target_hidden_states=features)
        return drafter.training_forward(changed, anchors=anchors, return_logits=True).draft_logits[0]

    before, at_first, at_second = logits_with(19), logits_with(8), logits_with(12)
    assert torch.equal(before[0], at_first[0])
    assert not torch.allclose(before[1], at_first[1])
    assert torch.equal(before, at_second)


def test_a_row_trains_alike_alone_and_in_a_padded_batch(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20, 14, 17)
    together = drafter.training_forward(batch, anchor_seeds=SEEDS[:3], return_logits=True)
    alone_batch = make_batch(20, 14)
    alone = drafter.training_forward(rows_of(alone_batch, slice(1, 2)), anchor_seeds=SEEDS[1:2], return_logits=True)
    counted = alone.eval_mask[0]
    width = len(counted)
    assert torch.equal(together.target_ids[1, :width], alone.target_ids[0])
    torch.testing.assert_close(
        together.draft_logits[1, :width][counted], alone.draft_logits[0][counted], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
@pytest.mark.parametrize("lengths", [(20, 14, 17, 11), (20, 14, 6, 6)])
def test_two_ranks_sum_to_the_whole_batch(make_drafter, make_batch, lengths, algorithm):
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(*lengths)
    whole, whole_gradients = train(drafter, batch, anchor_seeds=SEEDS)

    halves = [slice(0, 2), slice(2, 4)]
    # The first pass records what each rank would send, the second answers with the sums over both ranks.
    sent = [[], []]
    for rank, rows in enumerate(halves):

        def record(values, rank=rank):
            sent[rank].append(values.clone())
            return values

        drafter.training_forward(rows_of(batch, rows), anchor_seeds=SEEDS[rows], reduce=record)
    assert [len(calls) for calls in sent] == [2, 2]
    denominator = sent[0][0] + sent[1][0]

    losses, parts, second = [], [], []
    for rows in halves:
        answers = iter([denominator, None])

        def reduce(values, answers=answers):
            answer = next(answers)
            if answer is None:
                second.append(values.clone())
                return values
            return answer

        out, part = train(drafter, rows_of(batch, rows), anchor_seeds=SEEDS[rows], reduce=reduce)
        losses.append(out.loss.detach())
        parts.append(part)
    torch.testing.assert_close(sum(losses), whole.loss.detach())
    assert_same_gradients({name: parts[0][name] + parts[1][name] for name in parts[0]}, whole_gradients)

    answers = iter([denominator, second[0] + second[1]])
    out = drafter.training_forward(
        rows_of(batch, halves[0]), anchor_seeds=SEEDS[:2], reduce=lambda values: next(answers)
    )
    assert out.metrics == pytest.approx(whole.metrics, rel=1e-5)


def packed(batch, lengths):
    """The rows of a padded batch, end to end."""
    rows = range(len(lengths))
    ids, loss_mask, context, last = (
        torch.cat([tensor[row, : lengths[row]] for row in rows])[None]
        for tensor in (
            batch.input_ids,
            batch.loss_mask,
            batch.target_hidden_states,
            batch.target_last_hidden_states,
        )
    )
    return FeatureBatch.from_tensors(ids, loss_mask, None, context, last, sample_lengths=lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_train_like_padded_ones_and_like_each_alone(make_drafter, make_batch, kind):
    lengths, weights = (20, 14, 6, 17), torch.tensor([1.0, 2.0, 1.0, 1.0])
    drafter, batch = make_drafter(markov_head_type=kind), make_batch(*lengths)
    together = packed(batch, lengths)
    assert together.input_ids.shape == (1, sum(lengths))
    padded, padded_gradients = train(drafter, batch, anchor_seeds=SEEDS, sample_weights=weights)
    out, out_gradients = train(drafter, together, anchor_seeds=SEEDS, sample_weights=weights)
    torch.testing.assert_close(out.loss, padded.loss)
    assert_same_gradients(out_gradients, padded_gradients)
    depends_on_padding = {"valid_anchors_ratio"}
    assert {name: out.metrics[name] for name in out.metrics.keys() - depends_on_padding} == pytest.approx(
        {name: padded.metrics[name] for name in padded.metrics.keys() - depends_on_padding}, rel=1e-5
    )

    logits = drafter.training_forward(together, anchor_seeds=SEEDS, return_logits=True)
    for row in range(len(lengths)):
        alone = drafter.training_forward(
            packed(rows_of(batch, [row]), lengths[row : row + 1]), anchor_seeds=SEEDS[row : row + 1], return_logits=True
        )
        num_anchors = alone.eval_mask.shape[1]
        counted = alone.eval_mask[0]
        assert torch.equal(logits.eval_mask[row, :num_anchors], counted)
        torch.testing.assert_close(
            logits.draft_logits[row, :num_anchors][counted], alone.draft_logits[0][counted], rtol=1e-4, atol=1e-5
        )


def test_anchors_of_packed_samples_never_reach_into_the_next(make_drafter, make_batch):
    drafter, lengths = make_drafter(num_anchors=100), (9, 8)
    batch = packed(make_batch(*lengths, prompt=0), lengths)
    out = drafter.training_forward(batch, anchor_seeds=SEEDS[:2], return_logits=True)
    assert out.eval_mask.shape[:2] == (2, 8)
    assert out.eval_mask[0, -1].tolist() == [True, False, False, False]
    assert out.metrics["valid_anchors_ratio"] == pytest.approx((8 + 7) / 17)


def test_sample_of_weight_zero_changes_nothing(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20, 20)
    alone, alone_gradients = train(drafter, rows_of(batch, slice(0, 1)), anchor_seeds=SEEDS[:1])
    padded, padded_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2], sample_weights=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(padded.loss, alone.loss)
    assert padded.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert_same_gradients(padded_gradients, alone_gradients)


def test_sample_of_weight_two_counts_like_the_sample_twice(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20, 15)
    twice, twice_gradients = train(drafter, rows_of(batch, [0, 1, 1]), anchor_seeds=[1, 2, 2])
    weighted, weighted_gradients = train(drafter, batch, anchor_seeds=[1, 2], sample_weights=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(weighted.loss, twice.loss)
    assert weighted.metrics == pytest.approx(twice.metrics, rel=1e-5)
    assert_same_gradients(weighted_gradients, twice_gradients)


@pytest.mark.parametrize("loss", ["fused", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_without_supervision_has_zero_loss_and_zero_gradients(make_drafter, make_batch, kind, loss):
    drafter, batch = make_drafter(markov_head_type=kind, loss=loss), make_batch(9, 6, prompt=9)
    assert not batch.loss_mask.any()
    calls = []
    out, out_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2], reduce=lambda v: calls.append(v) or v)
    assert out.loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in out_gradients.values())
    assert all(value == 0 for value in out.metrics.values())
    assert len(calls) == 2  # other ranks would wait for ever otherwise
    assert out.rejections.isnan().all()


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_single_supervised_token_has_no_anchor_and_so_trains_nothing(make_drafter, make_batch, algorithm):
    """An anchor must be supervised, and so must the token that it predicts."""
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(9)
    batch.loss_mask[:] = False
    batch.loss_mask[0, 6] = True
    out, out_gradients = train(drafter, batch, anchor_seeds=[1])
    assert out.loss.item() == out.metrics["valid_anchors_abs"] == 0
    assert all(gradient.abs().max() == 0 for gradient in out_gradients.values())


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_unsupervised_sample_takes_its_part_in_the_means_over_samples(make_drafter, make_batch, algorithm):
    """20 tokens with 5 of prompt have 14 anchors; the sample without supervision has none, which halves the mean."""
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(20, 20)
    batch.loss_mask[1] = False
    out, out_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2])
    alone, alone_gradients = train(drafter, rows_of(batch, slice(0, 1)), anchor_seeds=SEEDS[:1])
    assert (out.metrics["valid_anchors_abs"], alone.metrics["valid_anchors_abs"]) == (7.0, 14.0)
    # the loss is a mean over slots, of which it has none
    torch.testing.assert_close(out.loss, alone.loss)
    assert_same_gradients(out_gradients, alone_gradients)
    assert out.rejections.isnan().tolist() == [False, True]


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_packed_samples_of_one_token_and_shorter_than_a_block_train_like_padded_ones(
    make_drafter, make_batch, algorithm
):
    lengths = (1, 3, 20, 1)
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(*lengths, prompt=0)
    batch.loss_mask[0, 1:] = batch.loss_mask[3, 1:] = batch.loss_mask[1, 3:] = False
    padded, padded_gradients = train(drafter, batch, anchor_seeds=SEEDS)
    out, out_gradients = train(drafter, packed(batch, lengths), anchor_seeds=SEEDS)
    torch.testing.assert_close(out.loss, padded.loss)
    assert_same_gradients(out_gradients, padded_gradients)
    assert out.rejections.isnan().tolist() == [True, False, False, True]


def test_every_trainable_weight_learns(make_drafter, make_batch):
    _, by_name = train(make_drafter(markov_head_type="rnn"), make_batch(20, 14), anchor_seeds=SEEDS[:2])
    assert [name for name, gradient in by_name.items() if gradient.abs().max() == 0] == []


def test_loss_settings_can_be_given_for_one_pass(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20)
    out = drafter.training_forward(
        batch, anchor_seeds=[1], ce_loss_alpha=1.0, l1_loss_alpha=0.0, confidence_head_alpha=0.0
    )
    assert "l1_loss" not in out.metrics
    assert out.loss.item() == pytest.approx(out.metrics["ce_loss"], rel=1e-5)
    with pytest.raises(TypeError, match="ce_alpha"):
        drafter.training_forward(batch, ce_alpha=1.0)


def test_loss_settings_come_from_the_settings(make_drafter, make_batch):
    batch = make_batch(20)
    drafter = make_drafter(ce_loss_alpha=0.5, l1_loss_alpha=0.25, confidence_head_alpha=0.0, loss_decay_gamma=2.0)
    metrics = drafter.training_forward(batch, anchor_seeds=[1]).metrics
    assert metrics["loss"] == pytest.approx(0.5 * metrics["ce_loss"] + 0.25 * metrics["l1_loss"])
    other = drafter.training_forward(batch, anchor_seeds=[1], loss_decay_gamma=4.0).metrics
    assert other["ce_loss"] != pytest.approx(metrics["ce_loss"], rel=1e-4)


def test_drafter_without_heads_has_neither_their_loss_nor_their_weights(make_drafter, make_batch):
    drafter = make_drafter(markov_rank=0, enable_confidence_head=False)
    out = drafter.training_forward(make_batch(20), anchor_seeds=[1], return_logits=True)
    assert out.confidence_pred is None
    assert not any("confidence" in name for name in out.metrics)
    assert not any("head." in name and "lm_head" not in name for name in drafter.state_dict())


def test_bf16_training_stays_close_to_float32(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20, 14)
    exact = drafter.training_forward(batch, anchor_seeds=SEEDS[:2]).loss.item()
    out, by_name = train(drafter.bfloat16(), batch, anchor_seeds=SEEDS[:2])
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact, rel=0.03)
    assert {gradient.dtype for gradient in by_name.values()} == {torch.bfloat16}
    assert drafter.rotary.inv_freq.dtype == torch.float32


def test_permuted_context_keeps_visibility_but_moves_features(make_drafter, make_batch):
    batch = make_batch(20, 14)
    straight, permuted = make_drafter(), make_drafter(permute_context=True)
    permuted.load_state_dict(straight.state_dict())
    anchors = Anchors(torch.tensor([[8, 12], [7, 9]]), torch.ones(2, 2, dtype=torch.bool))

    def logits(drafter, features=None, seeds=(1, 2)):
        given = batch if features is None else dataclasses.replace(batch, target_hidden_states=features)
        return drafter.training_forward(given, anchors=anchors, anchor_seeds=seeds, return_logits=True).draft_logits

    assert not torch.allclose(logits(straight), logits(permuted))
    assert torch.equal(logits(permuted), logits(permuted))
    assert not torch.allclose(logits(permuted)[0], logits(permuted, seeds=(3, 2))[0])
    assert torch.equal(logits(permuted)[1], logits(permuted, seeds=(3, 2))[1])
    changed = batch.target_hidden_states.clone()
    changed[:, 12:] += 1.0
    assert torch.equal(logits(permuted), logits(permuted, changed))


def test_permuted_positions_say_nothing_of_the_rows_own(make_drafter, make_batch):
    drafter, batch = make_drafter(permute_context=True), make_batch(9, 6)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    anchors = Anchors(torch.tensor([[8], [6]]), torch.ones(2, 1, dtype=torch.bool))
    blocks = PackedBlocks.of(anchors, batch.samples)
    positions = drafter._context_positions(batch, blocks, generators).tolist()
    first, second = positions[:8], positions[8:]
    assert all(0 <= position < SCATTERED_OVER for position in [*first, *second])
    assert max(first) > 8  # beyond the sample itself


def test_control_draws_positions_alike_in_training_and_drafting(make_drafter, make_batch):
    drafter, batch = make_drafter(permute_context=True).eval(), make_batch(9)
    generators = [torch.Generator().manual_seed(5)]
    blocks = PackedBlocks.of(Anchors(torch.tensor([[8]]), torch.ones(1, 1, dtype=torch.bool)), batch.samples)
    positions = drafter._context_positions(batch, blocks, generators)
    sequence = OneSequence(drafter, seed=5)
    features = batch.target_hidden_states[0, :9]
    sequence.observe(features, torch.zeros(9))
    context = drafter._fuse(features[:8][None])
    keys = drafter.layers[0].self_attn.keys_values(context, drafter._rope(context, positions[None])).keys
    torch.testing.assert_close(sequence.keys_values().keys[:, :, :8], keys)


def test_importance_multiplies_the_loss_of_its_sample_and_nothing_else(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20, 14)
    plain, plain_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2])
    halved, halved_gradients = train(drafter, batch, anchor_seeds=SEEDS[:2], importance_weights=torch.full((2,), 0.5))
    torch.testing.assert_close(halved.loss, plain.loss / 2)
    assert_same_gradients(halved_gradients, {name: gradient / 2 for name, gradient in plain_gradients.items()})
    assert halved.metrics == plain.metrics
    by_sample = [
        drafter.training_forward(batch, anchor_seeds=SEEDS[:2], importance_weights=torch.tensor(weights)).loss
        for weights in ([1.0, 0.25], [0.25, 1.0])
    ]
    torch.testing.assert_close(sum(by_sample), plain.loss * 1.25)
    assert by_sample[0] != by_sample[1]


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_sample_of_no_importance_trains_nothing_but_is_measured(make_drafter, make_batch, algorithm):
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(20, 14)
    whole = drafter.training_forward(batch, anchor_seeds=SEEDS[:2])
    parts = [
        drafter.training_forward(batch, anchor_seeds=SEEDS[:2], importance_weights=torch.tensor(weights))
        for weights in ([1.0, 0.0], [0.0, 1.0])
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    assert parts[0].metrics == parts[1].metrics == whole.metrics
    torch.testing.assert_close(parts[0].rejections, whole.rejections)


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_slots_whose_weight_vanishes_are_measured_all_the_same(make_drafter, make_batch, algorithm):
    """exp(−3 / 0.02) is 0 in float32: slot 3 has no part in the loss, but its acceptance is what it is."""
    drafter, batch = make_drafter(algorithm=algorithm), make_batch(20)
    steep, flat = (
        drafter.training_forward(batch, anchor_seeds=[1], loss_decay_gamma=gamma).metrics for gamma in (0.02, 4.0)
    )
    unweighted = [name for name in flat if name.startswith("accept_rate") or name == "tau_probabilistic"]
    assert {name: steep[name] for name in unweighted} == pytest.approx({name: flat[name] for name in unweighted})


def test_rejection_is_that_of_each_sample_alone(make_drafter, make_batch):
    drafter, batch = make_drafter(), make_batch(20, 14)
    together = drafter.training_forward(batch, anchor_seeds=SEEDS[:2], return_logits=True)
    slots = together.eval_mask
    l1 = (together.draft_logits.float().softmax(-1) - together.aligned_target_logits.softmax(-1)).abs().sum(-1)
    expected = [(l1[sample][slots[sample]] / 2).mean() for sample in range(2)]
    torch.testing.assert_close(together.rejections, torch.stack(expected), rtol=1e-4, atol=1e-6)
    padding = drafter.training_forward(batch, anchor_seeds=SEEDS[:2], sample_weights=torch.tensor([1.0, 0.0]))
    assert padding.rejections.isnan().tolist() == [False, True]
