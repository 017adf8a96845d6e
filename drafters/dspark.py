"""DSpark: the block-parallel backbone with a Markov head and a confidence head (specs: "DFlash and DSpark")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from drafters.anchors import (
    Anchors,
    PackedBlocks,
    Slots,
    anchor_candidates,
    draw_anchors,
    seeded_generators,
    supervise,
)
from drafters.backbone import BlockBackbone, BlockDraftState
from drafters.batch import FeatureBatch
from drafters.confidence import ConfidenceHead
from drafters.config import DrafterConfig
from drafters.drafter import GREEDY_BELOW, Proposal, TrainingOutput
from drafters.families.family import Family
from drafters.fused_loss import fused_loss
from drafters.losses import (
    LossSettings,
    RowInputs,
    Vocabulary,
    confidence_loss,
    normalizer,
    plain_loss,
    slot_weights,
)
from drafters.markov import MarkovHead, build_markov_head
from drafters.metrics import (
    MetricSums,
    Reduce,
    add_acceptance,
    add_confidence,
    add_coverage,
    keep_local,
    sample_rejections,
)
from drafters.sampling import draw_tokens


class SlotOutputs(NamedTuple):
    """What the heads make of the backbone's output, for all slots of M blocks.

    Attributes:
        chosen: [M] int64, which of the [B · A] anchors the blocks start at.
        hidden: [M, γ, D].
        latent: [M, γ, r] of the Markov head; None without it.
        confidence: [M, γ] logits; None without the head.
    """

    chosen: Tensor
    hidden: Tensor
    latent: Tensor | None
    confidence: Tensor | None

    def of_all(self, values: Tensor, like: Tensor) -> Tensor:
        """Values [M, γ, …] of the blocks as those of all anchors [B, A, γ, …], zero for dummies."""
        everything = values.new_zeros(like.shape[0] * like.shape[1], *values.shape[1:])
        return everything.index_copy(0, self.chosen, values).unflatten(0, like.shape[:2])


class DSparkDrafter(BlockBackbone):
    """DSpark on any family that has a block layer."""

    algorithm = "dspark"

    def __init__(self, config: PretrainedConfig, settings: DrafterConfig, family: Family) -> None:
        super().__init__(config, settings, family)
        rank = settings.markov_rank
        self.markov_head: MarkovHead | None = None
        if rank:
            self.markov_head = build_markov_head(
                settings.markov_head_type, vocab_size=config.vocab_size, rank=rank, hidden_size=config.hidden_size
            )
        self.confidence_head: ConfidenceHead | None = None
        if settings.enable_confidence_head:
            self.confidence_head = ConfidenceHead(
                config.hidden_size, rank if settings.confidence_head_with_markov else 0
            )
        self.loss_settings = LossSettings(
            loss_decay_gamma=settings.loss_decay_gamma,
            ce_loss_alpha=settings.ce_loss_alpha,
            l1_loss_alpha=settings.l1_loss_alpha,
            confidence_head_alpha=settings.confidence_head_alpha,
        )

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

        Args:
            batch: B samples, on the drafter's device; features of any floating dtype.
            anchors: Positions [B, A] int64 within the samples, ascending, and keep [B, A] bool. Otherwise drawn.
            anchor_seeds: One a sample, which its anchors alone depend on. Otherwise torch's global generator seeds.
            sample_weights: [B] float32, how often each sample counts in loss and metrics; default ones.
            importance_weights: [B] float32 above 0, what each sample's loss is multiplied by; default ones. Unlike
                sample weights they enter no denominator and no metric.
            return_logits: Give logits, labels and masks of all slots too. Needs [B, A, γ, V] twice.
            reduce: Sums a 1-D float32 tensor over ranks; called exactly twice, whatever the batch holds.
            **loss_settings: Any field of `LossSettings`, instead of the drafter's own.

        Raises:
            TypeError: An unknown loss setting.
            ValueError: Token ids outside the vocabulary; features of another width, or NaN or infinite where the loss
                needs them; anchors outside their samples; more or fewer weights than samples.
        """
        samples = batch.samples
        loss_masks = [batch.loss_mask.flatten()[slice(*sample)] for sample in samples]
        needed_rows = torch.cat([self.needed_rows(loss_mask) for loss_mask in loss_masks])
        self._check_batch(batch, needed_rows.view(batch.loss_mask.shape))
        reduce = reduce or keep_local
        device = batch.input_ids.device
        alphas = replace(self.loss_settings, **loss_settings)
        sample_weights = batch.per_sample(sample_weights, "sample_weights")
        importance_weights = batch.per_sample(importance_weights, "importance_weights")

        generators = seeded_generators(anchor_seeds, len(samples))
        if anchors is None:
            drawn = draw_anchors(loss_masks, self.settings.num_anchors, generators)
        else:
            drawn = Anchors(*anchors).checked(samples)
        drawn = Anchors(drawn.positions.to(device, torch.long), drawn.keep.to(device, torch.bool))
        slots = supervise(batch.input_ids, batch.loss_mask, drawn, self.settings.num_drafts, samples)
        weights = slot_weights(slots.eval_mask, sample_weights, alphas.loss_decay_gamma)
        denominator = normalizer(weights, reduce)
        loss_weights = weights * importance_weights[:, None, None]
        counted = slots.eval_mask & (sample_weights > 0)[:, None, None]

        blocks = PackedBlocks.of(drawn, samples)
        outputs = self._run_heads(self.block_hidden(batch, blocks, generators), batch, blocks, slots.labels)
        rows = self._rows(outputs, batch, slots, counted, loss_weights / denominator, alphas)
        vocabulary = self._vocabulary()
        plain = return_logits or self.settings.loss == "plain"
        loss, terms = (plain_loss if plain else fused_loss)(rows, vocabulary)
        losses = {"ce_loss": (terms.cross_entropy, alphas.ce_loss_alpha)}
        if alphas.l1_loss_alpha:
            losses["l1_loss"] = (terms.l1, alphas.l1_loss_alpha)
        if outputs.confidence is not None:
            confidence = outputs.of_all(outputs.confidence, slots.eval_mask)
            term = confidence_loss(confidence[counted], terms.acceptance)
            losses["confidence_loss"] = (term.detach(), alphas.confidence_head_alpha)
            loss = loss + alphas.confidence_head_alpha * (term * loss_weights[counted]).sum() / denominator

        metrics = MetricSums()
        for name, (term, _) in losses.items():
            metrics.add(name, (term * weights[counted]).sum(), weights.sum())
        acceptance = torch.zeros_like(weights).masked_scatter_(counted, terms.acceptance)
        add_acceptance(metrics, acceptance, slots.eval_mask, sample_weights)
        if outputs.confidence is not None:
            add_confidence(metrics, confidence.detach().float().sigmoid() * slots.eval_mask, acceptance, weights)
        num_candidates = torch.stack([anchor_candidates(loss_mask).sum() for loss_mask in loss_masks])
        num_tokens = torch.tensor([sample.end - sample.start for sample in samples], device=device)
        add_coverage(
            metrics, num_candidates, num_tokens, drawn.keep, slots.eval_mask, sample_weights, self.settings.num_anchors
        )
        rejections = sample_rejections(terms.acceptance, counted.nonzero()[:, 0], len(samples))
        means = metrics.means(reduce)
        means["loss"] = sum(alpha * means[name] for name, (_, alpha) in losses.items())
        if not return_logits:
            return TrainingOutput(loss, means, rejections)
        draft_logits = vocabulary.draft_logits(outputs.hidden, outputs.latent)
        states = batch.target_last_hidden_states.flatten(0, 1)[slots.target_rows]
        return TrainingOutput(
            loss,
            means,
            rejections,
            draft_logits=outputs.of_all(draft_logits, slots.eval_mask),
            target_ids=slots.labels,
            eval_mask=slots.eval_mask,
            confidence_pred=None if outputs.confidence is None else confidence,
            aligned_target_logits=vocabulary.target_logits(states),
        )

    @torch.no_grad()
    def propose(
        self,
        state: BlockDraftState,
        anchor_ids: Tensor,
        *,
        temperature: float = 0.0,
        uniforms: Tensor | None = None,
    ) -> Proposal:
        """Draft γ tokens for each sequence, left to right, with the confidence of each.

        Raises:
            ValueError: Nothing was observed yet.
        """
        hidden = self.draft_hidden(state, anchor_ids)
        base_logits = self.head_logits(hidden)
        previous, markov_state = anchor_ids, None
        tokens, distributions, confidences = [], [], []
        for slot in range(hidden.shape[1]):
            slot_hidden, logits, embedded = hidden[:, slot], base_logits[:, slot], None
            if self.markov_head is not None:
                embedded = self.markov_head.embed(previous)
                latent, markov_state = self.markov_head.step(embedded, slot_hidden, markov_state)
                logits = logits + self.markov_head.bias(latent)
            if self.confidence_head is not None:
                confidences.append(self.confidence_head(slot_hidden, embedded))
            if temperature < GREEDY_BELOW:
                previous = logits.float().argmax(dim=-1)
            else:
                assert uniforms is not None, "sampling needs random numbers"
                distributions.append(torch.softmax(logits.float() / temperature, dim=-1))
                previous = draw_tokens(distributions[-1], uniforms[:, slot])
            tokens.append(previous)
        return Proposal(
            torch.stack(tokens, dim=1),
            probabilities=torch.stack(distributions, dim=1) if distributions else None,
            confidence=torch.stack(confidences, dim=1).float() if confidences else None,
        )

    def _run_heads(self, hidden: Tensor, batch: FeatureBatch, blocks: PackedBlocks, labels: Tensor) -> SlotOutputs:
        """Markov latents and confidence of all slots, teacher-forced: slot k follows the anchor or label k − 1."""
        chosen = blocks.chosen.to(hidden.device)
        embedded = latent = confidence = None
        if self.markov_head is not None:
            anchor_ids = batch.input_ids.flatten()[blocks.anchor_rows.to(hidden.device)]
            labels = labels.flatten(0, 1)[chosen]
            embedded = self.markov_head.embed(torch.cat([anchor_ids[:, None], labels[:, :-1]], dim=-1))
            latent = self.markov_head.latent(embedded, hidden)
        if self.confidence_head is not None:
            confidence = self.confidence_head(hidden, embedded)
        return SlotOutputs(chosen, hidden, latent, confidence)

    def _rows(
        self,
        outputs: SlotOutputs,
        batch: FeatureBatch,
        slots: Slots,
        counted: Tensor,
        weights: Tensor,
        alphas: LossSettings,
    ) -> RowInputs:
        """The slots that are counted, [B, A, γ] bool, as rows of the loss, with their weights [B, A, γ] in it."""
        places = counted.flatten(0, 1)[outputs.chosen].flatten().nonzero().squeeze(1)
        return RowInputs(
            hidden=outputs.hidden.flatten(0, 1).index_select(0, places),
            latent=None if outputs.latent is None else outputs.latent.flatten(0, 1).index_select(0, places),
            labels=slots.labels[counted],
            target_states=batch.target_last_hidden_states.flatten(0, 1).index_select(0, slots.target_rows[counted]),
            ce_weights=alphas.ce_loss_alpha * weights[counted],
            l1_weights=alphas.l1_loss_alpha * weights[counted],
        )

    def _vocabulary(self) -> Vocabulary:
        """What makes logits of the backbone's output, and of the target's last hidden state."""
        return Vocabulary(
            head=self.lm_head.table(),
            markov=None if self.markov_head is None else self.markov_head.markov_w2.table(),
            softcap=self.logit_softcap,
        )
