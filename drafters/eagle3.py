"""Eagle3: one decoder layer that drafts token by token, trained on its own outputs (specs: "Eagle3", "Drafting").

The layer sees the embedding of the newest token beside a hidden state: the target's features at first, then what it put
out itself. Training unrolls that for as many steps as drafting will take, at all positions at once.

Letters beside those of `drafters.batch`: S steps, W positions that any row of the batch is supervised at, N supervised
positions of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from drafters.attention import KeyValues, Rope
from drafters.backbone import ContextCache
from drafters.batch import FeatureBatch
from drafters.config import DrafterConfig
from drafters.drafter import GREEDY_BELOW, Drafter, Proposal, TrainingOutput
from drafters.eagle3_attention import attend_steps
from drafters.eagle3_loss import SoftLosses, StepRows, fused_soft_loss, plain_soft_loss
from drafters.families.family import Family
from drafters.families.layer import DraftLayer
from drafters.losses import Vocabulary
from drafters.metrics import MetricSums, Reduce, keep_local

SMALLEST_COUNT = 1e-6
"""Samples that a batch is divided by at least, so that one without any has loss 0."""


class Supervision(NamedTuple):
    """Supervised positions of a batch, in order of row and position.

    Attributes:
        rows: [N] int64, the batch's row of each.
        places: [N] int64, its position p: step i scores what position p − i put out against target row p + 1.
        window: First position and one past the last at which any step's output counts.
    """

    rows: Tensor
    places: Tensor
    window: tuple[int, int]


@dataclass
class Eagle3DraftState:
    """Drafting of one sequence.

    Attributes:
        caches: One for each layer.
        stop_token_ids: A proposal ends with the first of these.
        num_context: Observed rows; the position of the first drafted token, if it is fed back.
        next_hidden: [1, 1, D] output at the last observed row, which the first drafted token comes from.
    """

    caches: list[ContextCache]
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    num_context: int = 0
    next_hidden: Tensor | None = None


class Eagle3Drafter(Drafter):
    """Eagle3 on any family: layers whose q, k and v project [embedding ; hidden], each half with its own norm."""

    algorithm = "eagle3"

    def __init__(self, config: PretrainedConfig, settings: DrafterConfig, family: Family) -> None:
        super().__init__(config, settings, family)
        assert settings.target_layer_ids is not None, "settings are resolved"
        width = config.hidden_size
        self.fc = nn.Linear(len(settings.target_layer_ids) * width, width, bias=False)
        self.layers = nn.ModuleList(
            family.layer(config, index, attention_inputs=2 * width) for index in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            layer.add_module("hidden_norm", family.norm(config))
        self.norm = family.norm(config)
        self.rotary = family.rotary(config)

    def reset_buffers(self) -> None:
        """Make the rotary frequencies anew."""
        self.rotary = self.family.rotary(self.config)

    def needed_rows(self, loss_mask: Tensor) -> Tensor:
        """Row r where r − 1 is supervised: [B, T] → [B, T] bool."""
        needed = torch.zeros_like(loss_mask, dtype=torch.bool)
        needed[..., 1:] = loss_mask[..., :-1].bool()
        return needed

    def training_forward(
        self,
        batch: FeatureBatch,
        *,
        anchors: tuple[Tensor, Tensor] | None = None,
        anchor_seeds: Sequence[int] | None = None,
        sample_weights: Tensor | None = None,
        return_logits: bool = False,
        reduce: Reduce | None = None,
        step_loss_decay: float | None = None,
    ) -> TrainingOutput:
        """Loss and metrics of a batch.

        Step i's loss is Σ over supervised positions of the soft cross-entropy, divided by T in each sample and averaged
        over samples of all ranks, weighted with how often each counts. T is the batch's padded length.

        Args:
            batch: B rows, on the drafter's device; features of any floating dtype.
            anchors: Not used: every position drafts.
            anchor_seeds: Not used.
            sample_weights: [B] float32, how often each row counts in loss and metrics; default ones.
            return_logits: Give logits of all positions too. Needs [S, B, T, V].
            reduce: Sums a 1-D float32 tensor over ranks; called exactly twice, whatever the batch holds.
            step_loss_decay: Step i weighs this to the power i, instead of the drafter's own.
        """
        reduce = reduce or keep_local
        device = batch.input_ids.device
        decay = self.settings.step_loss_decay if step_loss_decay is None else step_loss_decay
        if sample_weights is None:
            sample_weights = torch.ones(len(batch.input_ids))
        sample_weights = sample_weights.to(device, torch.float32)
        num_samples, num_ranks = reduce(torch.stack([sample_weights.sum(), sample_weights.new_ones(())]))

        supervision = self._supervise(batch, sample_weights)
        window = (0, batch.input_ids.shape[1]) if return_logits else supervision.window
        hidden = self._unroll(batch, window)
        lengths = _lengths(batch)
        weights = (sample_weights / (lengths * num_samples.clamp_min(SMALLEST_COUNT)))[supervision.rows]
        steps = [
            self._step_rows(step, states, supervision, window, weights * decay**step)
            for step, states in enumerate(hidden)
        ]
        target_states = batch.target_last_hidden_states[supervision.rows, supervision.places + 1]
        vocabulary = Vocabulary(self.lm_head.table(), softcap=self.logit_softcap)
        if return_logits or self.settings.loss == "plain":
            loss, terms = plain_soft_loss(steps, target_states, vocabulary)
        else:
            loss, terms = fused_soft_loss(steps, target_states, vocabulary)

        metrics = MetricSums()
        _add_metrics(metrics, terms, steps, supervision, sample_weights, lengths, 1 / num_ranks)
        means = metrics.means(reduce)
        means["loss"] = sum(decay**step * means[f"ploss_{step}"] for step in range(len(steps)))
        draft_logits = None
        if return_logits:
            draft_logits = torch.stack([self.head_logits(self.norm(states)) for states in hidden])
        return TrainingOutput(loss, means, draft_logits=draft_logits)

    def start_drafting(self, seed: int = 0, stop_token_ids: Collection[int] = ()) -> Eagle3DraftState:
        """A state without context; the seed is not used.

        Args:
            seed: Not used.
            stop_token_ids: Proposals end with the first of these that is drafted.
        """
        return Eagle3DraftState([ContextCache() for _ in self.layers], frozenset(stop_token_ids))

    @torch.no_grad()
    def observe(self, state: Eagle3DraftState, features: Tensor, next_token_ids: Tensor) -> None:
        """Append rows: features of a position beside the token that follows it.

        Raises:
            ValueError: ``features`` is not [R, L·D] with R tokens beside it, or R is 0.
        """
        width = self.fc.in_features
        if features.dim() != 2 or features.shape[1] != width or next_token_ids.shape != features.shape[:1]:
            raise ValueError(
                f"features must be [R, {width}] with [R] next tokens, got {list(features.shape)} with "
                f"{list(next_token_ids.shape)}"
            )
        if not len(features):
            raise ValueError("nothing to observe: give at least one row of features")
        hidden = self.fc(features.to(self.fc.weight.dtype))[None]
        state.next_hidden = self._extend(state.caches, next_token_ids[None], hidden, state.num_context)[:, -1:]
        state.num_context += len(features)

    @torch.no_grad()
    def propose(
        self,
        state: Eagle3DraftState,
        anchor_id: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        confidence_threshold: float = 0.0,
    ) -> Proposal:
        """Draft ``ttt_length`` tokens one after another, fewer if one is a stop token.

        The anchor itself was observed already, as the token that follows the last row; the threshold is not used.

        Raises:
            ValueError: Nothing was observed yet.
        """
        if state.next_hidden is None:
            raise ValueError("nothing observed: a proposal needs the features of the tokens before its anchor")
        hidden = state.next_hidden
        tokens: list[Tensor] = []
        distributions = []
        for position in range(state.num_context, state.num_context + self.settings.ttt_length):
            if tokens:
                hidden = self._extend(state.caches, tokens[-1].view(1, 1), hidden, position - 1)
            logits = self.head_logits(self.norm(hidden))[0, 0].float()
            if temperature < GREEDY_BELOW:
                tokens.append(logits.argmax())
            else:
                distributions.append(torch.softmax(logits / temperature, dim=-1))
                tokens.append(torch.multinomial(distributions[-1], 1, generator=generator)[0])
            if state.stop_token_ids and int(tokens[-1]) in state.stop_token_ids:
                break
        for cache in state.caches:
            cache.crop(state.num_context)
        return Proposal(torch.stack(tokens), torch.stack(distributions) if distributions else None)

    @property
    def _draft_layers(self) -> Iterable[DraftLayer]:
        return cast(Iterable[DraftLayer], self.layers)

    def _supervise(self, batch: FeatureBatch, sample_weights: Tensor) -> Supervision:
        """Positions p that count: p is supervised, and the target's row p + 1, which predicts token p + 2, is there."""
        counts = batch.loss_mask[:, :-1] & batch.attention_mask[:, 1:] & (sample_weights[:, None] > 0)
        rows, places = counts.nonzero(as_tuple=True)
        if not len(places):
            return Supervision(rows, places, (0, 1))
        first, last = torch.aminmax(places)
        # Step i's output for p stands at p − i. Deeper layers need the first one's output of step 0 everywhere.
        begin = int(first) - self.settings.ttt_length + 1 if len(self.layers) == 1 else 0
        return Supervision(rows, places, (max(0, begin), int(last) + 1))

    def _unroll(self, batch: FeatureBatch, window: tuple[int, int]) -> list[Tensor]:
        """What the layers put out at each step, at the positions of a window: S times [B, W, D].

        Keys of step 0 are those of all positions up to the window's end; padding comes after every query.
        """
        begin, end = window
        hidden: Tensor = self.fc(batch.target_hidden_states[:, :end].to(self.fc.weight.dtype))
        num_steps = self.settings.ttt_length
        token_ids = functional.pad(batch.input_ids, (0, num_steps))
        seen: list[list[KeyValues]] = [[] for _ in self.layers]
        outputs = []
        for step in range(num_steps):
            start = end - hidden.shape[1]
            embedded = self.embed_tokens(token_ids[:, start + step + 1 : end + step + 1])
            rope = self._rope(hidden, start + step)
            for layer, steps in zip(self._draft_layers, seen, strict=True):
                rows = _wide_rows(layer, embedded, hidden)
                steps.append(layer.self_attn.keys_values(rows, rope))
                hidden, rows = hidden[:, begin - end :], rows[:, begin - end :]
                queries = layer.self_attn.queries(rows, Rope(*(part[:, begin - end :] for part in rope)))
                attended = attend_steps(queries, steps[0], steps[1:], layer.self_attn.scaling)
                hidden = layer.finish(hidden, layer.self_attn.output(attended))
            outputs.append(hidden)
        return outputs

    def _step_rows(
        self, step: int, states: Tensor, supervision: Supervision, window: tuple[int, int], weights: Tensor
    ) -> StepRows:
        """Rows that a step is scored with: of every supervised position that it can predict from inside the row."""
        targets = (supervision.places >= step).nonzero().squeeze(1)
        hidden = states[supervision.rows[targets], supervision.places[targets] - step - window[0]]
        return StepRows(self.norm(hidden), targets, weights[targets])

    def _extend(self, caches: list[ContextCache], token_ids: Tensor, hidden: Tensor, position: int) -> Tensor:
        """Run rows that follow what is cached, from a position on, and cache them: [1, R], [1, R, D] → [1, R, D]."""
        embedded = self.embed_tokens(token_ids.to(self.embed_tokens.weight.device))
        rope = self._rope(hidden, position)
        for layer, cache in zip(self._draft_layers, caches, strict=True):
            rows = _wide_rows(layer, embedded, hidden)
            cache.append(layer.self_attn.keys_values(rows, rope))
            attended = attend_steps(layer.self_attn.queries(rows, rope), cache.rows(), (), layer.self_attn.scaling)
            hidden = layer.finish(hidden, layer.self_attn.output(attended))
        return hidden

    def _rope(self, hidden: Tensor, start: int) -> Rope:
        """Rotation of rows [B, R, D] at positions from ``start`` on."""
        return Rope(*self.rotary(hidden, torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]))


def _wide_rows(layer: DraftLayer, embedded: Tensor, hidden: Tensor) -> Tensor:
    """What q, k and v project, [..., 2D]."""
    return torch.cat([layer.input_layernorm(embedded), layer.get_submodule("hidden_norm")(hidden)], dim=-1)


def _lengths(batch: FeatureBatch) -> Tensor:
    """What each row's loss is divided by, [B] float32."""
    return torch.full((len(batch.input_ids),), batch.input_ids.shape[1], dtype=torch.float32, device=batch.input_ids.device)


def _add_metrics(
    metrics: MetricSums,
    terms: Sequence[SoftLosses],
    steps: Sequence[StepRows],
    supervision: Supervision,
    sample_weights: Tensor,
    lengths: Tensor,
    rank_share: Tensor,
) -> None:
    """Loss, agreement and acceptance of each step, and the tokens of a round that they let one expect.

    Args:
        metrics: Where to.
        terms: Of each step.
        steps: The rows that these belong to.
        supervision: N supervised positions.
        sample_weights: [B].
        lengths: [B] what each sample's loss is divided by.
        rank_share: 1 / number of ranks.
    """
    rows, places, _ = supervision
    num_samples, of_sample = sample_weights.sum(), sample_weights[rows]
    acceptance, agreement = of_sample.new_zeros(2, len(steps), len(lengths), int(lengths.max()))
    for step, (each, targets) in enumerate(zip(terms, (step.targets for step in steps), strict=True)):
        weights = of_sample[targets]
        count = weights.sum()
        metrics.add(f"ploss_{step}", (each.cross_entropy * weights / lengths[rows[targets]]).sum(), num_samples)
        metrics.add(f"accuracy@{step}", (each.agreement * weights).sum(), count)
        metrics.add(f"accept_rate@{step}", (each.acceptance * weights).sum(), count)
        metrics.add(f"valid_tokens@{step}", count, rank_share)
        acceptance[step, rows[targets], places[targets] - step] = each.acceptance
        agreement[step, rows[targets], places[targets] - step] = each.agreement
    for name, kept in (("tau_greedy", agreement), ("tau_probabilistic", acceptance)):
        expected_length = 1 + kept.cumprod(0).sum(0)[rows, places]
        metrics.add(name, (expected_length * of_sample).sum(), of_sample.sum())
