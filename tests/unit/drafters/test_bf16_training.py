"""Training in bf16: under autocast, and 200 steps with fp32 masters and the fused loss beside the exact plain curve."""

import copy

import pytest
import torch
from transformers import Qwen3Config

from drafters import FeatureBatch, build_drafter
from drafters.config import settings_of

HIDDEN, VOCAB, LAYER_IDS, LENGTH, NUM_STEPS, MEAN_OF = 16, 31, (0, 1, 2, 4, 5), 24, 200, 20


def make_drafter(algorithm, loss):
    torch.manual_seed(3)
    target = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    section = {"num_draft_layers": 1, "block_size": 4, "num_anchors": 8, "mask_token_id": 0, "markov_rank": 4}
    section |= {"target_layer_ids": LAYER_IDS, "ttt_length": 3, "loss": loss}
    return build_drafter(target, **settings_of(algorithm, section))


def make_batches(head):
    """Samples whose next tokens follow from the features, and whose target is sure of them."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(4):
        ids = torch.randint(1, VOCAB, (2, LENGTH), generator=generator)
        rows = head[ids]
        noise = torch.randn(2, LENGTH, len(LAYER_IDS) * HIDDEN, generator=generator)
        last = 2 * rows.roll(-1, 1) / rows.norm(dim=-1, keepdim=True).roll(-1, 1)
        supervised = (torch.arange(LENGTH) >= 4).expand(2, -1)
        features = torch.cat([rows, rows.roll(-1, 1), noise[..., 2 * HIDDEN :]], dim=-1)
        batches.append(FeatureBatch.from_tensors(ids, supervised, None, features, last * 5))
    return batches


def losses(algorithm, dtype, loss):
    """The loss of each step; masters and AdamW are float32 whatever the drafter computes in."""
    masters = make_drafter(algorithm, loss)
    drafter = copy.deepcopy(masters).to(dtype)
    batches = make_batches(masters.lm_head.weight)
    optimizer = torch.optim.AdamW([weight for weight in masters.parameters() if weight.requires_grad], lr=3e-3)
    curve = []
    for step in range(NUM_STEPS):
        out = drafter.training_forward(batches[step % len(batches)], anchor_seeds=[2 * step, 2 * step + 1])
        drafter.zero_grad(set_to_none=True)
        out.loss.backward()
        for master, weight in zip(masters.parameters(), drafter.parameters(), strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizer.step()
        drafter.load_state_dict(masters.state_dict())
        curve.append(out.loss.item())
    return torch.tensor(curve)


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_float32_drafter_trains_under_autocast(algorithm, backward_too):
    """As a training loop of one's own may have it, whether or not it leaves autocast before backward."""
    drafter = make_drafter(algorithm, "fused")
    batch = make_batches(drafter.lm_head.weight)[0]
    exact = drafter.training_forward(batch, anchor_seeds=[1, 2]).loss
    exact.backward()
    expected = drafter.fc.weight.grad.clone()
    drafter.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = drafter.training_forward(batch, anchor_seeds=[1, 2]).loss
        if backward_too:
            loss.backward()
    if not backward_too:
        loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert loss != exact
    assert {weight.grad.dtype for weight in drafter.parameters() if weight.requires_grad} == {torch.float32}
    assert (drafter.fc.weight.grad - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_bf16_curve_stays_within_one_percent_of_the_exact_plain_one(algorithm):
    exact = losses(algorithm, torch.float32, "plain")
    quick = losses(algorithm, torch.bfloat16, "fused")
    exact, quick = (curve.view(-1, MEAN_OF).mean(1) for curve in (exact, quick))
    assert exact[-1] < 0.85 * exact[0]
    assert not torch.equal(quick, exact)
    torch.testing.assert_close(quick, exact, rtol=0.01, atol=0)
