import math

import pytest
import torch

from drafters.markov import GatedMarkovHead, RecurrentMarkovHead, VanillaMarkovHead, build_markov_head


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_vanilla_bias_is_w2_times_the_embedding_of_the_previous_token():
    head = VanillaMarkovHead(3, 2)
    head.markov_w1.weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])
    head.markov_w2.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    embedded = head.embed(torch.tensor([1]))
    assert head.bias(head.latent(embedded, torch.zeros(1, 4))).tolist() == [[3.0, -1.0, 4.0]]


def test_gated_latent_scales_the_embedding_by_a_gate_of_hidden_and_embedding():
    head = GatedMarkovHead(2, 1, hidden_size=1)
    head.gate_proj.weight.data = torch.tensor([[2.0, 3.0]])  # hidden first, then embedding
    head.gate_proj.bias.data = torch.tensor([-1.0])
    latent = head.latent(torch.tensor([[0.5]]), torch.tensor([[0.25]]))
    assert latent.item() == pytest.approx(sigmoid(2 * 0.25 + 3 * 0.5 - 1) * 0.5)


def test_recurrent_latent_carries_a_gated_state_from_slot_to_slot():
    head = RecurrentMarkovHead(2, 1, hidden_size=1)
    # inputs: state, embedding, hidden; outputs: gate, candidate, output
    head.joint_proj.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.2], [4.0, 0.3, -0.6]])
    head.joint_proj.bias.data = torch.tensor([0.1, 0.2, 0.3])
    embedded, hidden = torch.tensor([[[0.7], [-0.4]]]), torch.tensor([[[0.5], [0.9]]])
    first = math.tanh(0.3 * 0.7 - 0.6 * 0.5 + 0.3)
    gate = sigmoid(2 * 0.7 + 3 * 0.5 + 0.1)
    state = (1 - gate) * math.tanh(-0.7 + 0.2 * 0.5 + 0.2)
    second = math.tanh(4 * state + 0.3 * -0.4 - 0.6 * 0.9 + 0.3)
    assert head.latent(embedded, hidden).flatten().tolist() == pytest.approx([first, second], rel=1e-5)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_stepping_slot_by_slot_equals_all_slots_at_once(kind):
    torch.manual_seed(0)
    head = build_markov_head(kind, vocab_size=9, rank=3, hidden_size=4)
    embedded, hidden = head.embed(torch.randint(9, (2, 5))), torch.randn(2, 5, 4)
    latents, state = [], None
    for slot in range(5):
        latent, state = head.step(embedded[:, slot], hidden[:, slot], state)
        latents.append(latent)
    torch.testing.assert_close(torch.stack(latents, dim=1), head.latent(embedded, hidden))


def test_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'lstm' must be vanilla, gated or rnn"):
        build_markov_head("lstm", vocab_size=2, rank=1, hidden_size=1)
