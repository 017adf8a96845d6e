"""DSpark: the block-parallel backbone with a Markov head and a confidence head (specs: "DFlash and DSpark")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from drafters.anchors import Anchors, Slots, anchor_candidates, draw_anchors, seeded_generators, supervise
from drafters.backbone import BlockBackbone, BlockDraftState
from drafters.batch import FeatureBatch
from drafters.confidence import ConfidenceHead
from drafters.config import DrafterConfig
from drafters.drafter import GREEDY_BELOW, Proposal, TrainingOutput
from drafters.families.family import Family
from drafters.losses import LossSettings, confidence_loss, normalizer, row_losses, slot_weights
from drafters.markov import MarkovHead, build_markov_head
from drafters.metrics import MetricSums, Reduce, add_acceptance, add_confidence, add_coverage, keep_local


class SlotOutputs(NamedTuple):
    """What the heads make of the backbone's output, for all slots.

    Attributes:
        hidden: [B, A, γ, D].
        latent: [B, A, γ, r] of the Markov head; None without it.
        confidence: [B, A, γ] logits; None without the head.
    """

    hidden: Tensor
    latent: Tensor | None
    confidence: Tensor | None


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
        return_logits: bool = False,
        reduce: Reduce | None = None,
        **loss_settings: float,
    ) -> TrainingOutput:
        """Loss and metrics of a batch.

        Args:
            batch: B rows, on the drafter's device; features of any floating dtype.
            anchors: Positions [B, A] int64, ascending, and keep [B, A] bool. Otherwise they are drawn.
            anchor_seeds: One seed a row, which its anchors alone depend on. Otherwise torch's global generator seeds.
            sample_weights: [B] float32, how often each row counts in loss and metrics; default ones.
            return_logits: Give logits, labels and masks of all slots too. Needs [B, A, γ, V] twice.
            reduce: Sums a 1-D float32 tensor over ranks; called exactly twice, whatever the batch holds.
            **loss_settings: Any field of `LossSettings`, instead of the drafter's own.

        Raises:
            TypeError: An unknown loss setting.
        """
        reduce = reduce or keep_local
        device = batch.input_ids.device
        alphas = replace(self.loss_settings, **loss_settings)
        if sample_weights is None:
            sample_weights = torch.ones(len(batch.input_ids))
        sample_weights = sample_weights.to(device, torch.float32)

        generators = seeded_generators(anchor_seeds, len(batch.input_ids))
        if anchors is None:
            anchors = draw_anchors(batch.loss_mask, self.settings.num_anchors, generators)
        drawn = Anchors(anchors[0].to(device, torch.long), anchors[1].to(device, torch.bool))
        slots = supervise(batch.input_ids, batch.loss_mask, drawn, self.settings.block_size)
        rows = slots.eval_mask
        weights = slot_weights(rows, sample_weights, alphas.loss_decay_gamma)
        denominator = normalizer(weights, reduce)

        outputs = self._run_heads(self.block_hidden(batch, drawn, generators), batch, drawn, slots.labels)
        scored = rows if not return_logits else torch.ones_like(rows)
        draft_logits, target_logits = self._logits(outputs, batch, slots, scored)
        counted = rows[scored]
        terms = row_losses(draft_logits[counted], target_logits[counted], slots.labels[rows])

        losses = {"ce_loss": (terms.cross_entropy, alphas.ce_loss_alpha)}
        if alphas.l1_loss_alpha:
            losses["l1_loss"] = (terms.l1, alphas.l1_loss_alpha)
        if outputs.confidence is not None:
            term = confidence_loss(outputs.confidence[rows], terms.acceptance)
            losses["confidence_loss"] = (term, alphas.confidence_head_alpha)
        sums = {name: (term * weights[rows]).sum() for name, (term, _) in losses.items()}
        loss = sum(alpha * sums[name] for name, (_, alpha) in losses.items()) / denominator

        metrics = MetricSums()
        for name, total in sums.items():
            metrics.add(name, total, weights.sum())
        acceptance = torch.zeros_like(weights).masked_scatter(rows, terms.acceptance)
        add_acceptance(metrics, acceptance, rows, sample_weights)
        if outputs.confidence is not None:
            add_confidence(metrics, outputs.confidence.float().sigmoid() * rows, acceptance, weights)
        candidates = anchor_candidates(batch.loss_mask)
        add_coverage(metrics, candidates, drawn.keep, rows, sample_weights, self.settings.num_anchors)
        means = metrics.means(reduce)
        means["loss"] = sum(alpha * means[name] for name, (_, alpha) in losses.items())

        if not return_logits:
            return TrainingOutput(loss, means)
        return TrainingOutput(
            loss,
            means,
            draft_logits=draft_logits.view(*rows.shape, -1),
            target_ids=slots.labels,
            eval_mask=rows,
            confidence_pred=outputs.confidence,
            aligned_target_logits=target_logits.view(*rows.shape, -1),
        )

    @torch.no_grad()
    def propose(
        self,
        state: BlockDraftState,
        anchor_id: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        confidence_threshold: float = 0.0,
    ) -> Proposal:
        """Draft γ tokens left to right, then cut before the first unsure one. Without a head the threshold is ignored.

        Raises:
            ValueError: Nothing was observed yet.
        """
        hidden = self.draft_hidden(state, anchor_id)
        base_logits = self.lm_head(hidden)
        previous = torch.tensor(anchor_id, device=hidden.device)
        markov_state = None
        tokens, distributions, confidences = [], [], []
        for slot, slot_hidden in enumerate(hidden):
            logits, embedded = base_logits[slot], None
            if self.markov_head is not None:
                embedded = self.markov_head.embed(previous)
                latent, markov_state = self.markov_head.step(embedded, slot_hidden, markov_state)
                logits = logits + self.markov_head.bias(latent)
            if self.confidence_head is not None:
                confidences.append(self.confidence_head(slot_hidden, embedded))
            if temperature < GREEDY_BELOW:
                previous = logits.float().argmax()
            else:
                distributions.append(torch.softmax(logits.float() / temperature, dim=-1))
                previous = torch.multinomial(distributions[-1], 1, generator=generator)[0]
            tokens.append(previous)

        length = len(tokens)
        if confidences and confidence_threshold > 0:
            unsure = torch.stack(confidences).float().sigmoid() < confidence_threshold
            length = int((~unsure).long().cumprod(0).sum())
        probabilities = torch.stack(distributions)[:length] if distributions else None
        return Proposal(torch.stack(tokens)[:length], probabilities)

    def _run_heads(self, hidden: Tensor, batch: FeatureBatch, anchors: Anchors, labels: Tensor) -> SlotOutputs:
        """Markov latents and confidence of all slots, teacher-forced: slot k follows the anchor or label k − 1."""
        embedded = latent = confidence = None
        if self.markov_head is not None:
            anchor_ids = batch.input_ids.gather(1, anchors.positions)
            embedded = self.markov_head.embed(torch.cat([anchor_ids[..., None], labels[..., :-1]], dim=-1))
            latent = self.markov_head.latent(embedded, hidden)
        if self.confidence_head is not None:
            confidence = self.confidence_head(hidden, embedded)
        return SlotOutputs(hidden, latent, confidence)

    def _logits(self, outputs: SlotOutputs, batch: FeatureBatch, slots: Slots, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of draft and target in the slots that `scored` [B, A, γ] marks: [N, V] each, the target's detached."""
        draft_logits = self.lm_head(outputs.hidden[scored])
        if self.markov_head is not None and outputs.latent is not None:
            draft_logits = draft_logits + self.markov_head.bias(outputs.latent[scored])
        with torch.no_grad():
            samples = torch.arange(len(scored), device=scored.device)[:, None, None].expand_as(scored)
            states = batch.target_last_hidden_states[samples[scored], slots.target_rows[scored]]
            target_logits = self.lm_head(states.to(self.lm_head.weight.dtype))
        return draft_logits, target_logits
