"""Eagle3: one decoder layer that drafts token by token, trained on its own outputs (specs: "Eagle3", "Drafting").

The layer sees the embedding of the newest token beside a hidden state: the target's features at first, then what it put
out itself. Training unrolls that for as many steps as drafting will take, at all positions at once.

Letters beside those of `drafters.batch`: S steps, N scored positions, W rows that have queries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from drafters.batch import FeatureBatch, Span
from drafters.cached_attention import attend_cached, attend_new, positions_seen
from drafters.config import DrafterConfig
from drafters.drafter import GREEDY_BELOW, Drafter, DraftState, Proposal, TrainingOutput
from drafters.eagle3_attention import StepKeys, StepLayout
from drafters.eagle3_loss import Cut, SoftLosses, StepRows, fused_soft_loss, plain_soft_loss
from drafters.eagle3_rows import PackedRows, Supervision
from drafters.families.family import Family
from drafters.families.layer import DraftLayer, Rope
from drafters.key_values import RaggedCache
from drafters.losses import Vocabulary
from drafters.metrics import MetricSums, Reduce, keep_local, sample_rejections
from drafters.projection import soft_capped
from drafters.sampling import draw_tokens
from drafters.vocabulary import check_tokens

SMALLEST_COUNT = 1e-6
"""Samples that a batch is divided by at least, so that one without any has loss 0."""


@dataclass
class Eagle3DraftState(DraftState):
    """Drafting of several sequences.

    Attributes:
        stop_token_ids: A proposal ends with the first of these.
        next_hidden: [B, D] output at each sequence's last observed row, which its first drafted token comes from.
    """

    stop_token_ids: tuple[int, ...] = ()
    next_hidden: Tensor | None = None

    def drop(self, sequence: int) -> None:
        """Forget a sequence; the last one takes its place."""
        super().drop(sequence)
        assert self.next_hidden is not None
        self.next_hidden[sequence] = self.next_hidden[-1]
        self.next_hidden = self.next_hidden[:-1]


class Eagle3Drafter(Drafter):
    """Eagle3 on any family: layers whose q, k and v project [embedding ; hidden], each half with its own norm.

    With ``draft_vocab_size`` it drafts the tokens of `set_vocabulary` only. It keeps the whole head, which training
    needs for the target's distribution, and drafts with some of its rows.

    Attributes:
        d2t: [Vd] int64, the target's id of each drafted token minus its place here; None where all are drafted.
    """

    algorithm = "eagle3"
    d2t: Tensor | None

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
        size = settings.draft_vocab_size
        self.register_buffer("d2t", None if size is None else torch.zeros(size, dtype=torch.long))
        self._drafted_head: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def set_vocabulary(self, token_ids: Sequence[int]) -> None:
        """Draft these tokens and no others.

        Args:
            token_ids: Ascending, as many as ``draft_vocab_size``.

        Raises:
            ValueError: Nothing is cut, or they are too many, too few, unsorted or outside the vocabulary.
        """
        if self.d2t is None:
            raise ValueError("this drafter drafts every token: build it with a draft_vocab_size")
        check_tokens(token_ids, len(self.d2t), self.config.vocab_size)
        self.d2t.copy_(torch.tensor(token_ids) - torch.arange(len(token_ids)))
        self._drafted_head = None

    @property
    def drafted_tokens(self) -> Tensor | None:
        """[Vd] int64, the tokens that can be drafted; None for all."""
        return None if self.d2t is None else self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits of rows [..., D] in the target's own terms, [..., V]; −∞ for tokens that are never drafted."""
        tokens = self.drafted_tokens
        if tokens is None:
            return super().head_logits(hidden)
        drafted = soft_capped(functional.linear(hidden, self._head_of(tokens)), self.logit_softcap)
        logits = drafted.new_full((*drafted.shape[:-1], self.config.vocab_size), -torch.inf)
        return logits.index_copy_(-1, tokens, drafted)

    def _head_of(self, tokens: Tensor) -> Tensor:
        """Rows of the head, [Vd, D]; kept between calls while the head is the same, which in decoding it is."""
        if self.training:
            return self.lm_head.table()[tokens]
        weight = self.lm_head.weight
        key = (weight.data_ptr(), weight.dtype, weight.device, 0 if weight.is_inference() else weight._version)
        if self._drafted_head is None or self._drafted_head[0] != key:
            with torch.inference_mode(False):  # it outlives the call, and training may read it too
                self._drafted_head = (key, weight.detach()[tokens.clone()])
        return self._drafted_head[1]

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
        importance_weights: Tensor | None = None,
        return_logits: bool = False,
        reduce: Reduce | None = None,
        **loss_settings: float,
    ) -> TrainingOutput:
        """Loss and metrics of a batch.

        Step i's loss is the sum of a sample's soft cross-entropies divided by its length T, supervised or not, averaged
        over the samples of all ranks. The reference has one sample a batch, so its T is the sample's own length. With
        more, `FeatureBatch.loss_lengths` says which T. Rows that share a padded length are divided by that, unless told
        otherwise; a trainer gives each sample's own length, so that neither padding nor how samples are spread over
        ranks and micro-batches changes what a sample counts.

        Args:
            batch: B rows, on the drafter's device; features of any floating dtype.
            anchors: Not used: every position drafts.
            anchor_seeds: Not used.
            sample_weights: [B] float32, how often each row counts in loss and metrics; default ones.
            importance_weights: [B] float32 above 0, what each row's loss is multiplied by; default ones. Unlike sample
                weights they enter no denominator and no metric.
            return_logits: Give logits of all positions too. Needs [S, B, T, V].
            reduce: Sums a 1-D float32 tensor over ranks; called exactly twice, whatever the batch holds.
            **loss_settings: ``step_loss_decay``, instead of the drafter's own: step i weighs this to the power i.

        Raises:
            TypeError: An unknown loss setting.
            ValueError: Token ids outside the vocabulary; features of another width, or NaN or infinite where the loss
                needs them; more or fewer weights than samples.
        """
        decay = loss_settings.pop("step_loss_decay", self.settings.step_loss_decay)
        if loss_settings:
            raise TypeError(f"Eagle3 has no loss setting {', '.join(loss_settings)}: it has step_loss_decay")
        reduce = reduce or keep_local
        sample_weights = batch.per_sample(sample_weights, "sample_weights")
        importance_weights = batch.per_sample(importance_weights, "importance_weights")
        # Deeper layers need what the first puts out at step 0 everywhere.
        reach = self.settings.ttt_length - 1 if len(self.layers) == 1 else None
        supervision = Supervision.of_batch(batch, sample_weights, reach)
        scored = torch.zeros(batch.loss_mask.numel(), dtype=torch.bool, device=supervision.tokens.device)
        scored[supervision.tokens + 1] = True
        self._check_batch(batch, scored.view(batch.loss_mask.shape))
        num_samples, num_ranks = reduce(torch.stack([sample_weights.sum(), sample_weights.new_ones(())]))

        if return_logits:
            supervision = supervision.over_everything(batch)
        queries = PackedRows.of_spans(batch, supervision.spans)
        everything = PackedRows.of_spans(batch, [Span(0, span.end) for span in supervision.spans])
        layout = StepLayout.of_spans(supervision.spans, self.settings.ttt_length, batch.input_ids.device)
        hidden = self._unroll(batch, everything, queries, layout)
        shares = sample_weights / (batch.loss_lengths * num_samples.clamp_min(SMALLEST_COUNT)) * importance_weights
        weights = shares[supervision.samples]
        steps = []
        for step, outputs in enumerate(hidden):
            targets = (supervision.places >= step).nonzero().squeeze(1)
            rows = outputs[0, queries.find(supervision.tokens[targets] - step)]
            steps.append(StepRows(self.norm(rows), targets, weights[targets] * decay**step))
        target_states = batch.target_last_hidden_states.flatten(0, 1)[supervision.tokens + 1]
        vocabulary = Vocabulary(self.lm_head.table(), softcap=self.logit_softcap)
        tokens = self.drafted_tokens
        cut = None if tokens is None else Cut(tokens, vocabulary.head[tokens])
        if return_logits or self.settings.loss == "plain":
            loss, terms = plain_soft_loss(steps, target_states, vocabulary, cut)
        else:
            loss, terms = fused_soft_loss(steps, target_states, vocabulary, cut)

        metrics = MetricSums()
        _add_metrics(metrics, terms, steps, supervision, batch, sample_weights, 1 / num_ranks)
        scored_samples = torch.cat([supervision.samples[step.targets] for step in steps])
        acceptance = torch.cat([each.acceptance for each in terms])
        rejections = sample_rejections(acceptance, scored_samples, len(batch.samples))
        means = metrics.means(reduce)
        means["loss"] = sum(decay**step * means[f"ploss_{step}"] for step in range(len(steps)))
        draft_logits = None
        if return_logits:
            logits = torch.stack([self.head_logits(self.norm(outputs)) for outputs in hidden])
            draft_logits = logits.view(len(hidden), *batch.input_ids.shape, -1)
        return TrainingOutput(loss, means, rejections, draft_logits=draft_logits)

    def start_drafting(self, max_sequences: int = 1, stop_token_ids: Collection[int] = ()) -> Eagle3DraftState:
        """A state without sequences.

        Args:
            max_sequences: Most sequences at once.
            stop_token_ids: Proposals end with the first of these that is drafted.
        """
        return Eagle3DraftState(RaggedCache(max_sequences), stop_token_ids=tuple(stop_token_ids))

    @torch.no_grad()
    def observe(
        self, state: Eagle3DraftState, features: Tensor, next_token_ids: Tensor, counts: Sequence[int], first: int = 0
    ) -> None:
        """Append rows: features of a position beside the token that follows it.

        Raises:
            ValueError: ``features`` is not [b, R, L·D] with [b, R] tokens beside it, or a sequence gets no row.
        """
        width = self.fc.in_features
        if features.dim() != 3 or features.shape[-1] != width or next_token_ids.shape != features.shape[:2]:
            raise ValueError(
                f"features must be [b, R, {width}] with [b, R] next tokens, got {list(features.shape)} with "
                f"{list(next_token_ids.shape)}"
            )
        if not all(counts):
            raise ValueError("nothing to observe: give at least one row of features for each sequence")
        hidden = self.fc(features.to(self.fc.weight.dtype))
        starts = state.num_context[first : first + len(counts)]
        outputs = self._extend(state, next_token_ids, hidden, starts, first)
        last_rows = torch.tensor(counts, device=outputs.device) - 1
        newest = outputs[torch.arange(len(counts), device=outputs.device), last_rows]
        state.next_hidden = _replaced(state.next_hidden, newest, first)
        for row, count in enumerate(counts, start=first):
            state.num_context[row] += count

    @torch.no_grad()
    def propose(
        self,
        state: Eagle3DraftState,
        anchor_ids: Tensor,
        *,
        temperature: float = 0.0,
        uniforms: Tensor | None = None,
    ) -> Proposal:
        """Draft ``ttt_length`` tokens one after another; fewer are proposed where one is a stop token.

        The anchors themselves were observed already, as the tokens that follow the last rows.

        Raises:
            ValueError: Nothing was observed yet.
        """
        self._check_observed(state)
        assert state.next_hidden is not None
        hidden = state.next_hidden[:, None]
        tokens: list[Tensor] = []
        distributions = []
        for step in range(self.settings.ttt_length):
            if tokens:
                starts = [num_context + step - 1 for num_context in state.num_context]
                hidden = self._extend(state, tokens[-1][:, None], hidden, starts)
            logits = self.head_logits(self.norm(hidden))[:, 0].float()
            if temperature < GREEDY_BELOW:
                tokens.append(logits.argmax(dim=-1))
            else:
                assert uniforms is not None, "sampling needs random numbers"
                distributions.append(torch.softmax(logits / temperature, dim=-1))
                tokens.append(draw_tokens(distributions[-1], uniforms[:, step]))
        proposal = Proposal(
            torch.stack(tokens, dim=1), probabilities=torch.stack(distributions, dim=1) if distributions else None
        )
        if not state.stop_token_ids:
            return proposal
        stops = torch.tensor(state.stop_token_ids, device=proposal.token_ids.device)
        before = torch.isin(proposal.token_ids, stops).long().cumsum(dim=1)[:, :-1] == 0
        return proposal.shortened(1 + before.sum(dim=1))

    @property
    def _draft_layers(self) -> Iterable[DraftLayer]:
        return cast(Iterable[DraftLayer], self.layers)

    def _unroll(
        self, batch: FeatureBatch, everything: PackedRows, queries: PackedRows, layout: StepLayout
    ) -> list[Tensor]:
        """What the layers put out at each step.

        Args:
            batch: Features and token ids.
            everything: Rows that have keys at step 0.
            queries: The last of these in each sample, W in all.
            layout: Which rows see which.

        Returns:
            S times [1, W, D].
        """
        kept = everything.find(queries.tokens)
        hidden: Tensor = self.fc(batch.target_hidden_states.flatten(0, 1).to(self.fc.weight.dtype))[None]
        hidden = hidden[:, everything.tokens]
        seen = [StepKeys(layout) for _ in self.layers]
        outputs = []
        for step in range(self.settings.ttt_length):
            # At step 0 every position has keys, and so enters; what follows is the queries' alone.
            entering = queries if step else everything
            embedded = self.embed_tokens(entering.shifted_ids(batch, step + 1))
            rope = self._rope(hidden, entering.places + step)
            for layer, keys in zip(self._draft_layers, seen, strict=True):
                rows = _wide_rows(layer, embedded, hidden)
                keys.append(layer.self_attn.keys_values(rows, rope))
                if hidden.shape[1] > len(kept):
                    rows, hidden, rope = rows[:, kept], hidden[:, kept], Rope(rope.cos[:, kept], rope.sin[:, kept])
                attended = keys.attend(layer.self_attn.queries(rows, rope), layer.self_attn.scaling)
                hidden = layer.finish(hidden, layer.self_attn.output(attended))
            outputs.append(hidden)
        return outputs

    def _extend(
        self, state: Eagle3DraftState, token_ids: Tensor, hidden: Tensor, starts: Sequence[int], first: int = 0
    ) -> Tensor:
        """Run rows of b sequences, from a position on in each, and cache them: [b, R], [b, R, D] → [b, R, D]."""
        num_rows = hidden.shape[1]
        embedded = self.embed_tokens(token_ids.to(self.embed_tokens.weight.device))
        offsets = torch.arange(num_rows, device=hidden.device)
        positions = torch.tensor(starts, device=hidden.device)[:, None] + offsets
        rope = Rope(*self.rotary(hidden, positions))
        places = state.cache.places(positions, max(starts) + num_rows, first)
        bias = positions_seen(positions, places.end, hidden.dtype) if any(starts) else None
        for index, layer in enumerate(self._draft_layers):
            rows = _wide_rows(layer, embedded, hidden)
            queries, own = layer.self_attn.queries(rows, rope), layer.self_attn.keys_values(rows, rope)
            seen = state.cache.append(index, own, places)
            if bias is None:  # nothing is cached yet: rows see rows
                attended = attend_new(queries, own, layer.self_attn.scaling)
            else:
                attended = attend_cached(queries, seen, bias, layer.self_attn.scaling)
            hidden = layer.finish(hidden, layer.self_attn.output(attended))
        return hidden

    def _rope(self, like: Tensor, places: Tensor) -> Rope:
        """Rotation to places [rows]."""
        return Rope(*self.rotary(like, places[None]))


def _replaced(rows: Tensor | None, new: Tensor, first: int) -> Tensor:
    """Rows [B, D] with new ones from a place on, which may be past the end."""
    if rows is None or (first == 0 and len(new) >= len(rows)):
        return new
    return torch.cat([rows[:first], new, rows[first + len(new) :]])


def _wide_rows(layer: DraftLayer, embedded: Tensor, hidden: Tensor) -> Tensor:
    """What q, k and v project, [..., 2D]."""
    return torch.cat([layer.input_layernorm(embedded), layer.get_submodule("hidden_norm")(hidden)], dim=-1)


def _add_metrics(
    metrics: MetricSums,
    terms: Sequence[SoftLosses],
    steps: Sequence[StepRows],
    supervision: Supervision,
    batch: FeatureBatch,
    sample_weights: Tensor,
    rank_share: Tensor,
) -> None:
    """Loss, agreement and acceptance of each step, and the tokens of a round that they let one expect.

    Args:
        metrics: Where to.
        terms: Of each step.
        steps: The rows that these belong to.
        supervision: N supervised positions.
        batch: B rows.
        sample_weights: [B].
        rank_share: 1 / number of ranks.
    """
    samples, tokens = supervision.samples, supervision.tokens
    num_samples, of_sample = sample_weights.sum(), sample_weights[samples]
    acceptance, agreement = of_sample.new_zeros(2, len(steps), batch.input_ids.numel())
    for step, (each, targets) in enumerate(zip(terms, (step.targets for step in steps), strict=True)):
        weights = of_sample[targets]
        count = weights.sum()
        shares = weights / batch.loss_lengths[samples[targets]]
        metrics.add(f"ploss_{step}", (each.cross_entropy * shares).sum(), num_samples)
        metrics.add(f"accuracy@{step}", (each.agreement * weights).sum(), count)
        metrics.add(f"accept_rate@{step}", (each.acceptance * weights).sum(), count)
        metrics.add(f"valid_tokens@{step}", count, rank_share)
        acceptance[step, tokens[targets] - step] = each.acceptance
        agreement[step, tokens[targets] - step] = each.agreement
    for name, kept in (("tau_greedy", agreement), ("tau_probabilistic", acceptance)):
        expected_length = 1 + kept.cumprod(0).sum(0)[tokens]
        metrics.add(name, (expected_length * of_sample).sum(), of_sample.sum())
