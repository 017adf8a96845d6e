"""Eagle3's training beyond what the golden numbers pin: batches, ranks, weights, masks, settings."""

import dataclasses

import pytest
import torch
from one_sequence import OneSequence
from transformers import Gemma4TextConfig, LlamaConfig, Qwen3Config

from drafters import FeatureBatch, build_drafter, load_drafter, save_drafter
from drafters.checkpoint import CheckpointFormatError

HIDDEN, VOCAB, LAYER_IDS, NUM_STEPS, PROMPT = 16, 23, (0, 1, 2, 4, 5), 4, 5

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
TARGETS = {
    "qwen3": Qwen3Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),
    "gemma4": Gemma4TextConfig(
        **SHAPE,
        layer_types=["sliding_attention", "full_attention"] * 3 + ["full_attention"],
        num_global_key_value_heads=1,
        global_head_dim=12,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
        final_logit_softcapping=4.0,
    ),
}


def make_drafter(target="qwen3", **settings):
    torch.manual_seed(7)
    defaults = {"algorithm": "eagle3", "target_layer_ids": LAYER_IDS, "ttt_length": NUM_STEPS}
    return build_drafter(TARGETS[target], **(defaults | settings))


def make_batch(*lengths, num_layers=5, pad_to=None, own_lengths=False, prompt=PROMPT):
    """Random rows of given lengths, padded at the end with zeros; each row depends on its own length alone."""
    width = pad_to or max(lengths)
    columns = [[], [], [], [], []]
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        row = (
            torch.randint(1, VOCAB, (length,), generator=generator),
            torch.arange(length) >= prompt,
            torch.ones(length, dtype=torch.bool),
            torch.randn(length, num_layers * HIDDEN, generator=generator),
            torch.randn(length, HIDDEN, generator=generator),
        )
        for column, tensor in zip(columns, row, strict=True):
            column.append(torch.cat([tensor, tensor.new_zeros(width - length, *tensor.shape[1:])]))
    loss_lengths = torch.tensor(lengths) if own_lengths else None
    return FeatureBatch.from_tensors(*map(torch.stack, columns), loss_lengths=loss_lengths)


def rows_of(batch, rows):
    tensors = [field.name for field in dataclasses.fields(batch) if field.name != "sample_lengths"]
    return FeatureBatch(**{name: getattr(batch, name)[rows] for name in tensors})


def train(drafter, batch, **options):
    drafter.zero_grad(set_to_none=True)
    out = drafter.training_forward(batch, **options)
    out.loss.backward()
    return out, {name: weight.grad for name, weight in drafter.named_parameters() if weight.requires_grad}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_draft_layers", [1, 2])
def test_fused_and_plain_path_agree(target, num_draft_layers):
    drafter, batch = make_drafter(target, num_draft_layers=num_draft_layers), make_batch(20, 14)
    plain, plain_gradients = train(drafter, batch, return_logits=True)
    fused, fused_gradients = train(drafter, batch)
    assert fused.draft_logits is None
    assert plain.draft_logits.shape == (NUM_STEPS, 2, 20, VOCAB)
    torch.testing.assert_close(fused.loss, plain.loss)
    assert fused.metrics == pytest.approx(plain.metrics, rel=1e-5)
    assert_same_gradients(fused_gradients, plain_gradients)
    assert [name for name, gradient in fused_gradients.items() if gradient.abs().max() == 0] == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_draft_layers", [1, 2])
def test_flex_attention_trains_the_same(target, num_draft_layers, request):
    """GQA in all, capped logits in Gemma-4."""
    drafter, batch = make_drafter(target, num_draft_layers=num_draft_layers), make_batch(20, 6, 14)
    by_sample, their_gradients = train(drafter, batch)
    request.getfixturevalue("eager_flex")
    at_once, gradients = train(drafter, batch)
    torch.testing.assert_close(at_once.loss, by_sample.loss)
    assert at_once.metrics == pytest.approx(by_sample.metrics, rel=1e-5)
    assert_same_gradients(gradients, their_gradients)


@pytest.mark.parametrize(("token_id", "place"), [(VOCAB, (1, 3)), (-1, (0, 0))])
def test_token_outside_the_vocabulary_is_refused_by_name(token_id, place):
    drafter, batch = make_drafter(), make_batch(20, 14)
    batch.input_ids[place] = token_id
    with pytest.raises(
        ValueError, match=f"token id {token_id} at token {place[1]} of sample {place[0]} is outside .* of 23"
    ):
        drafter.training_forward(batch)


def test_training_equals_drafting_by_hand_over_all_positions():
    """The unrolled steps against a plain loop: full keys side by side, one position after another."""
    drafter, batch = make_drafter(), make_batch(9)
    logits = drafter.training_forward(batch, return_logits=True).draft_logits[:, 0]
    ids = batch.input_ids[0]
    for place in range(4):
        # drafting from this position: every earlier one is observed, later tokens are fed back
        sequence = OneSequence(drafter)
        sequence.observe(batch.target_hidden_states[0, : place + 1], ids[1 : place + 2])
        hidden = sequence.state.next_hidden[:, None]
        for step in range(NUM_STEPS):
            torch.testing.assert_close(drafter.head_logits(drafter.norm(hidden))[0, 0], logits[step, place])
            hidden = drafter._extend(sequence.state, ids[place + 2 + step].view(1, 1), hidden, [place + 1 + step])


def test_loss_of_one_position_by_hand():
    drafter, batch = make_drafter(step_loss_decay=0.5), make_batch(9)
    batch.loss_mask[:] = False
    batch.loss_mask[0, 6] = True
    out = drafter.training_forward(batch, return_logits=True)
    target = torch.softmax(drafter.lm_head(batch.target_last_hidden_states[0, 7]), dim=-1)
    losses = [
        -(target * torch.log_softmax(out.draft_logits[step, 0, 6 - step], dim=-1)).sum() / 9
        for step in range(NUM_STEPS)
    ]
    assert out.loss.item() == pytest.approx(sum(0.5**step * loss.item() for step, loss in enumerate(losses)), rel=1e-5)
    assert [out.metrics[f"ploss_{step}"] for step in range(NUM_STEPS)] == pytest.approx(
        [loss.item() for loss in losses]
    )
    assert [out.metrics[f"valid_tokens@{step}"] for step in range(NUM_STEPS)] == [1] * NUM_STEPS


def test_last_token_of_a_sample_is_not_scored():
    drafter, batch = make_drafter(), make_batch(9, pad_to=12)
    batch.loss_mask[:] = False
    batch.loss_mask[0, 8] = True
    assert drafter.training_forward(batch).loss.item() == 0


def test_expected_lengths_multiply_along_a_draft():
    drafter, batch = make_drafter(), make_batch(20, 11)
    batch.loss_mask[0, 9:12] = False
    out = drafter.training_forward(batch, return_logits=True)
    valid = batch.loss_mask.clone()
    valid[0, 19] = valid[1, 10] = False
    target = torch.softmax(drafter.lm_head(batch.target_last_hidden_states), dim=-1)
    lengths = []
    for row, place in valid.nonzero().tolist():
        survival, length = 1.0, 1.0
        for step in range(NUM_STEPS):
            if place + step >= 20 or not valid[row, place + step]:
                break
            draft = torch.softmax(out.draft_logits[step, row, place], dim=-1)
            survival *= 1 - (draft - target[row, place + step + 1]).abs().sum().item() / 2
            length += survival
        lengths.append(length)
    assert out.metrics["tau_probabilistic"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)


def test_drafter_that_knows_the_target_agrees_everywhere():
    drafter, batch = make_drafter(), make_batch(12)
    drafter.lm_head.weight.zero_()
    out = drafter.training_forward(batch)
    # both distributions are uniform
    assert out.metrics["accept_rate@0"] == pytest.approx(1)
    assert out.metrics["accuracy@0"] == 1
    # six positions are scored at step 0; the last three have fewer steps left
    assert out.metrics["tau_probabilistic"] == pytest.approx(1 + (4 + 4 + 4 + 3 + 2 + 1) / 6)
    assert out.metrics["tau_greedy"] == out.metrics["tau_probabilistic"]


def test_forward_is_training_forward():
    drafter, batch = make_drafter(), make_batch(12)
    assert drafter(batch, anchor_seeds=[1]).loss == drafter.training_forward(batch).loss


def test_every_needed_row_is_read():
    drafter, batch = make_drafter(), make_batch(12)
    batch.loss_mask[0, 8] = False
    for row in drafter.needed_rows(batch.loss_mask)[0].nonzero().flatten().tolist():
        last = batch.target_last_hidden_states.clone()
        last[0, row] += 1
        changed = drafter.training_forward(dataclasses.replace(batch, target_last_hidden_states=last))
        assert changed.loss != drafter.training_forward(batch).loss, row


def test_features_that_are_no_numbers_are_refused():
    drafter, batch = make_drafter(), make_batch(12)
    batch.target_hidden_states[0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"target_hidden_states has NaN .* token 3 of sample 0"):
        drafter.training_forward(batch)


def test_features_of_another_width_are_refused_with_both_widths():
    drafter = make_drafter()
    with pytest.raises(ValueError, match=r"target_hidden_states is 48 wide, but this drafter reads 80"):
        drafter.training_forward(make_batch(12, num_layers=3))


@pytest.mark.parametrize("name", ["sample_weights", "importance_weights"])
def test_weights_must_be_one_a_sample(name):
    drafter, batch = make_drafter(), make_batch(12, 9)
    with pytest.raises(ValueError, match=rf"{name} is \[1\], but there are 2 samples"):
        drafter.training_forward(batch, **{name: torch.ones(1)})


def test_columns_of_tensors_may_lie_apart_in_memory():
    drafter, batch = make_drafter(), make_batch(12, 9)
    apart = {
        field.name: value.transpose(0, 1).contiguous().transpose(0, 1)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor) and value.dim() > 1
    }
    assert not apart["loss_mask"].is_contiguous()
    other = dataclasses.replace(batch, **apart)
    assert drafter.training_forward(other).loss == drafter.training_forward(batch).loss


@pytest.mark.parametrize("own_lengths", [False, True])
def test_padding_changes_nothing_but_the_length(own_lengths):
    drafter = make_drafter()
    alone, alone_gradients = train(drafter, make_batch(12, own_lengths=True))
    padded, padded_gradients = train(drafter, make_batch(12, pad_to=18, own_lengths=own_lengths))
    scale = 1 if own_lengths else 12 / 18
    torch.testing.assert_close(padded.loss, alone.loss * scale)
    assert_same_gradients(padded_gradients, {name: gradient * scale for name, gradient in alone_gradients.items()})


def test_own_lengths_average_samples_as_if_each_came_alone():
    drafter, lengths = make_drafter(), (20, 14, 9)
    together, gradients = train(drafter, make_batch(*lengths, own_lengths=True))
    alone = [train(drafter, make_batch(length)) for length in lengths]
    torch.testing.assert_close(together.loss, sum(out.loss for out, _ in alone) / 3)
    assert_same_gradients(gradients, {name: sum(by_name[name] for _, by_name in alone) / 3 for name in gradients})


def packed(batch, lengths):
    """The samples of a padded batch end to end in one row."""
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    rows = {
        name: torch.cat([row[:length] for row, length in zip(column, lengths, strict=True)])[None]
        for name, column in columns.items()
        if column is not None and column.dim() > 1
    }
    return FeatureBatch.from_tensors(**rows, sample_lengths=lengths)


@pytest.mark.parametrize("num_draft_layers", [1, 2])
@pytest.mark.parametrize("lengths", [(20, 14, 9), (5, 16, 3, 11), (5, 12, 4), (1, 8, 1)])
def test_packed_samples_train_like_padded_ones(lengths, num_draft_layers):
    """Also where samples without a supervised token stand before, between and after others."""
    drafter = make_drafter(num_draft_layers=num_draft_layers)
    batch = make_batch(*lengths, own_lengths=True)
    padded, padded_gradients = train(drafter, batch)
    out, gradients = train(drafter, packed(batch, lengths))
    torch.testing.assert_close(out.loss, padded.loss)
    assert out.metrics == pytest.approx(padded.metrics, rel=1e-5)
    assert_same_gradients(gradients, padded_gradients)


def test_packed_samples_see_nothing_of_each_other():
    drafter, batch = make_drafter(), make_batch(12, 12)
    whole = packed(batch, (12, 12))
    other = packed(make_batch(13, 12), (12, 12))
    ours = drafter.training_forward(whole, return_logits=True).draft_logits[:, 0]
    theirs = drafter.training_forward(other, return_logits=True).draft_logits[:, 0]
    assert not torch.allclose(ours[:, :12], theirs[:, :12])
    torch.testing.assert_close(ours[:, 12:], theirs[:, 12:])
    padded = drafter.training_forward(batch, return_logits=True).draft_logits
    torch.testing.assert_close(ours, padded.flatten(1, 2))


def test_prompt_positions_have_keys_but_no_queries(monkeypatch):
    drafter, batch = make_drafter(), make_batch(30, prompt=20)
    sizes = []
    finish = type(drafter.layers[0]).finish
    monkeypatch.setattr(
        type(drafter.layers[0]),
        "finish",
        lambda layer, rows, more: sizes.append(rows.shape[1]) or finish(layer, rows, more),
    )
    drafter.training_forward(batch)
    # scored are positions 20 to 28, by queries from 20 − 3 on
    assert sizes == [12] * NUM_STEPS


@pytest.mark.parametrize("own_lengths", [False, True])
@pytest.mark.parametrize("lengths", [(20, 14, 17, 11), (20, 14, 5, 5)])
def test_two_ranks_sum_to_the_whole_batch(lengths, own_lengths):
    drafter, batch = make_drafter(), make_batch(*lengths, own_lengths=own_lengths)
    whole, whole_gradients = train(drafter, batch)
    halves = [rows_of(batch, slice(0, 2)), rows_of(batch, slice(2, 4))]

    def run(answers_of_rank):
        """Both ranks, each answered with the given sums; what each of them sent, and what came out."""
        sent, outs = [[], []], []
        for rank, half in enumerate(halves):
            answers = iter(answers_of_rank)

            def reduce(values, rank=rank, answers=answers):
                sent[rank].append(values.clone())
                return next(answers, values)

            outs.append(train(drafter, half, reduce=reduce))
        assert [len(calls) for calls in sent] == [2, 2]
        return [sum(calls) for calls in zip(*sent, strict=True)], outs

    counts, _ = run([])
    sums, _ = run(counts[:1])
    _, outs = run([counts[0], sums[1]])
    torch.testing.assert_close(sum(out.loss for out, _ in outs), whole.loss)
    assert_same_gradients({name: outs[0][1][name] + outs[1][1][name] for name in whole_gradients}, whole_gradients)
    for out, _ in outs:
        assert out.metrics == pytest.approx(whole.metrics, rel=1e-5)


def test_sample_of_weight_zero_changes_nothing():
    drafter, batch = make_drafter(), make_batch(20, 14)
    alone, alone_gradients = train(drafter, rows_of(batch, slice(0, 1)))
    batch.target_last_hidden_states[1] += 100.0
    padded, padded_gradients = train(drafter, batch, sample_weights=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(padded.loss, alone.loss)
    assert padded.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert_same_gradients(padded_gradients, alone_gradients)


def test_sample_of_weight_two_counts_like_the_sample_twice():
    drafter, batch = make_drafter(), make_batch(20, 15)
    twice, twice_gradients = train(drafter, rows_of(batch, [0, 1, 1]))
    weighted, weighted_gradients = train(drafter, batch, sample_weights=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(weighted.loss, twice.loss)
    assert weighted.metrics == pytest.approx(twice.metrics, rel=1e-5)
    assert_same_gradients(weighted_gradients, twice_gradients)


@pytest.mark.parametrize("loss", ["fused", "plain"])
@pytest.mark.parametrize("sample_weights", [None, torch.zeros(2)])
def test_batch_without_supervision_has_zero_loss_and_zero_gradients(loss, sample_weights):
    drafter, batch = make_drafter(loss=loss), make_batch(9, 6, prompt=9 if sample_weights is None else 3)
    calls = []
    out, gradients = train(drafter, batch, sample_weights=sample_weights, reduce=lambda v: calls.append(v) or v)
    assert out.loss.item() == 0
    assert all(gradient is not None and gradient.abs().max() == 0 for gradient in gradients.values())
    assert all(value == 0 for value in out.metrics.values())
    assert len(calls) == 2  # other ranks would wait for ever otherwise


def test_unsupervised_sample_takes_its_part_in_the_means_over_samples():
    """Its loss is 0: it halves the mean over two samples, and the gradients with it."""
    drafter, batch = make_drafter(), make_batch(12, 12)
    batch.loss_mask[1] = False
    out, gradients = train(drafter, batch)
    alone, alone_gradients = train(drafter, rows_of(batch, slice(0, 1)))
    torch.testing.assert_close(out.loss, alone.loss / 2)
    assert_same_gradients(gradients, {name: gradient / 2 for name, gradient in alone_gradients.items()})
    assert out.metrics["ploss_0"] == pytest.approx(alone.metrics["ploss_0"] / 2)
    assert out.metrics["valid_tokens@0"] == alone.metrics["valid_tokens@0"]
    assert out.rejections.isnan().tolist() == [False, True]


def test_loss_decay_can_be_given_for_one_pass():
    drafter, batch = make_drafter(step_loss_decay=0.5), make_batch(14)
    own, given = drafter.training_forward(batch), drafter.training_forward(batch, step_loss_decay=1.0)
    losses = [own.metrics[f"ploss_{step}"] for step in range(NUM_STEPS)]
    assert own.loss.item() == pytest.approx(sum(0.5**step * loss for step, loss in enumerate(losses)), rel=1e-5)
    assert given.loss.item() == pytest.approx(sum(losses), rel=1e-5)
    with pytest.raises(TypeError, match="loss_decay_gamma"):
        drafter.training_forward(batch, loss_decay_gamma=1.0)


@pytest.mark.parametrize("target", TARGETS)
def test_bf16_training_stays_close_to_float32(target):
    drafter, batch = make_drafter(target), make_batch(20, 14)
    exact = drafter.training_forward(batch).loss.item()
    out, gradients = train(drafter.bfloat16(), batch)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact, rel=0.03)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("layout", "layer_ids"), [("reference", (1, 2, 4)), ("llama", LAYER_IDS)])
def test_wrong_number_of_captured_layers_is_refused(layout, layer_ids):
    wanted = {"reference": 5, "llama": 3}[layout]
    with pytest.raises(ValueError, match=f"must be {wanted} layers for Eagle3's layout '{layout}'"):
        make_drafter(layout=layout, target_layer_ids=layer_ids)


@pytest.mark.parametrize("target", TARGETS)
def test_llama_layout_trains_and_comes_back_from_its_checkpoint(target, tmp_path):
    drafter = make_drafter(target, layout="llama", target_layer_ids=(1, 2, 4))
    batch = make_batch(14, num_layers=3)
    save_drafter(drafter, tmp_path)
    loaded = load_drafter(tmp_path)
    assert not [name for name in loaded.state_dict() if "q_norm" in name or "feedforward" in name]
    assert loaded.settings.layout == "llama"
    assert loaded.training_forward(batch).loss == drafter.training_forward(batch).loss


@pytest.mark.parametrize("target", TARGETS)
def test_checkpoint_comes_back(target, tmp_path):
    drafter, batch = make_drafter(target), make_batch(14)
    save_drafter(drafter, tmp_path)
    loaded = load_drafter(tmp_path)
    assert not loaded.training
    assert loaded.training_forward(batch).loss == drafter.training_forward(batch).loss


def test_checkpoint_of_another_width_is_refused_by_its_tensors(tmp_path):
    save_drafter(make_drafter(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 8'))
    with pytest.raises(CheckpointFormatError, match=r"fc\.weight is \[16, 80\] instead of \[8, 40\]"):
        load_drafter(tmp_path)


def test_importance_multiplies_the_loss_of_its_sample_and_nothing_else():
    drafter, batch = make_drafter(), make_batch(12, 9)
    plain, plain_gradients = train(drafter, batch)
    halved, halved_gradients = train(drafter, batch, importance_weights=torch.full((2,), 0.5))
    torch.testing.assert_close(halved.loss, plain.loss / 2)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(halved_gradients[name], gradient / 2)
    assert halved.metrics == plain.metrics
    by_sample = [
        drafter.training_forward(batch, importance_weights=torch.tensor(weights)).loss
        for weights in ([1.0, 0.25], [0.25, 1.0])
    ]
    torch.testing.assert_close(sum(by_sample), plain.loss * 1.25)


def test_rejection_is_that_of_each_sample_alone():
    drafter, batch = make_drafter(), make_batch(12, 9)
    together = drafter.training_forward(batch).rejections
    alone = [
        drafter.training_forward(batch, sample_weights=torch.tensor(weights)).rejections
        for weights in ([1.0, 0.0], [0.0, 1.0])
    ]
    assert alone[0].isnan().tolist() == [False, True]
    torch.testing.assert_close(together, torch.stack([alone[0][0], alone[1][1]]), rtol=1e-4, atol=1e-6)
    metrics = drafter.training_forward(batch, sample_weights=torch.tensor([1.0, 0.0])).metrics
    counts = [metrics[f"valid_tokens@{step}"] for step in range(drafter.settings.ttt_length)]
    rates = [metrics[f"accept_rate@{step}"] for step in range(drafter.settings.ttt_length)]
    expected = 1 - sum(count * rate for count, rate in zip(counts, rates, strict=True)) / sum(counts)
    assert float(together[0]) == pytest.approx(expected, rel=1e-4)
