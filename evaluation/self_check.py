"""Is a drafter that was written and read back the one that it was written from?

Both compute the same inputs, drawn from a seed: logits of a training forward, and greedy drafts. Files whose tensors
went astray, whose layers are in another order or whose vocabulary is shifted do not get through; what a server makes of
a config's keys is beyond this, and pinned by tests of the writers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafters.batch import FeatureBatch
from drafters.drafter import Drafter
from services.errors import SlipstreamError

NUM_TOKENS = 24
"""Of the sequence that is computed."""

NUM_CONTEXTS = 4
"""Contexts of growing length that are drafted from."""

LARGEST_DIFFERENCE = 1e-5
"""Of logits, relative to the largest of them: the same weights and operations differ by nothing at all."""


class SelfCheckError(SlipstreamError):
    """What was written does not compute what it was written from."""


class SelfCheck(NamedTuple):
    """What was compared."""

    max_logit_difference: float
    """Relative to the largest logit."""
    num_logits: int
    num_drafts: int
    """Tokens that both drafted alike."""


def compare_drafters(written: Drafter, native: Drafter, *, seed: int = 0) -> SelfCheck:
    """Compare logits and greedy drafts of a drafter that was read back with those of the one that was written.

    Args:
        written: Read back.
        native: In evaluation mode and of the same dtype.
        seed: Of the inputs.

    Raises:
        SelfCheckError: They differ.
    """
    batch = _batch(native, seed)
    ours, theirs = _logits(native, batch), _logits(written, batch)
    if ours.shape != theirs.shape or not torch.equal(ours == -torch.inf, theirs == -torch.inf):
        raise SelfCheckError(
            f"what was written drafts from another vocabulary: logits are {list(theirs.shape)} instead of "
            f"{list(ours.shape)}, or other tokens are left out"
        )
    finite = ours != -torch.inf
    ours, theirs = ours[finite], theirs[finite]
    scale = ours.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((ours - theirs).abs().max() / scale)
    if not difference <= LARGEST_DIFFERENCE:  # NaN is none
        raise SelfCheckError(
            f"logits of what was written differ from the drafter's by {difference:.3g} of the largest, above "
            f"{LARGEST_DIFFERENCE:g}"
        )
    drafted, expected = _greedy_drafts(written, batch), _greedy_drafts(native, batch)
    if drafted != expected:
        raise SelfCheckError(f"what was written drafts {drafted} where the drafter drafts {expected}")
    return SelfCheck(difference, ours.numel(), sum(len(draft) for draft in expected))


def _batch(drafter: Drafter, seed: int) -> FeatureBatch:
    """Random tokens and features of one sequence, all of it supervised."""
    generator = torch.Generator().manual_seed(seed)
    layer_ids, config = drafter.settings.target_layer_ids, drafter.config
    assert layer_ids is not None, "settings are resolved"
    context = torch.randn(1, NUM_TOKENS, len(layer_ids) * config.hidden_size, generator=generator)
    return FeatureBatch.from_tensors(
        torch.randint(config.vocab_size, (1, NUM_TOKENS), generator=generator),
        torch.ones(1, NUM_TOKENS, dtype=torch.long),
        torch.ones(1, NUM_TOKENS, dtype=torch.long),
        context.to(drafter.lm_head.weight.dtype),
        torch.zeros(1, NUM_TOKENS, config.hidden_size, dtype=drafter.lm_head.weight.dtype),
    )


@torch.no_grad()
def _logits(drafter: Drafter, batch: FeatureBatch) -> Tensor:
    positions = torch.tensor([[0, NUM_TOKENS // 3, NUM_TOKENS // 2]])
    anchors = (positions, torch.ones_like(positions, dtype=torch.bool))
    logits = drafter.training_forward(batch, anchors=anchors, return_logits=True).draft_logits
    assert logits is not None, "they were asked for"
    return logits.float()


def _greedy_drafts(drafter: Drafter, batch: FeatureBatch) -> list[list[int]]:
    """A proposal after each of several beginnings of the sequence, as a batch of rows of different lengths."""
    lengths = range(NUM_TOKENS // NUM_CONTEXTS, NUM_TOKENS, NUM_TOKENS // NUM_CONTEXTS)
    state = drafter.start_drafting(len(lengths))
    state.open([0] * len(lengths))
    rows = max(lengths)
    features = batch.target_hidden_states[:, :rows].expand(len(lengths), -1, -1)
    drafter.observe(state, features, batch.input_ids[:, 1 : rows + 1].expand(len(lengths), -1), list(lengths))
    proposal = drafter.propose(state, batch.input_ids[0, list(lengths)])
    return [[int(token) for token in row] for row in proposal.token_ids]
