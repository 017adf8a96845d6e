"""What every drafter is: a module that trains on feature batches and proposes tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from drafters.batch import FeatureBatch
from drafters.config import DrafterConfig
from drafters.families.family import Family
from drafters.key_values import RaggedCache
from drafters.metrics import Reduce
from drafters.projection import OutputProjection, soft_capped

GREEDY_BELOW = 1e-5
"""Temperatures below this are argmax."""


class TrainingOutput(NamedTuple):
    """What one forward pass for training gives; a tuple, because training engines look for tensors in nothing else.

    Attributes:
        loss: Scalar with gradient. With ``reduce``: this rank's part, and the sum over ranks is the global loss.
        metrics: Global metrics by name.
        rejections: [B] float32, for each of this rank's samples the mean of 1 − acceptance over what was scored of it;
            NaN where nothing was.
        draft_logits: [B, A, γ, V], with the Markov bias; this and what follows only with ``return_logits``. Eagle3's
            are [steps, B, T, V], and the rest is None.
        target_ids: [B, A, γ] labels.
        eval_mask: [B, A, γ] bool; the other tensors count where it is true.
        confidence_pred: [B, A, γ] confidence logits; None without the head.
        aligned_target_logits: [B, A, γ, V] target logits that each slot is scored against.
    """

    loss: Tensor
    metrics: dict[str, float]
    rejections: Tensor
    draft_logits: Tensor | None = None
    target_ids: Tensor | None = None
    eval_mask: Tensor | None = None
    confidence_pred: Tensor | None = None
    aligned_target_logits: Tensor | None = None


class Proposal(NamedTuple):
    """Drafted tokens of one round for B sequences.

    Attributes:
        token_ids: [B, n] int64, 0 ≤ n ≤ γ.
        lengths: [B] int64, how many of each sequence's n tokens are proposed; None: all of them.
        probabilities: [B, n, V] float32 distributions that they were sampled from; None when greedy.
        confidence: [B, n] logits of each token's acceptance, given that those before it are; None without such a head.
    """

    token_ids: Tensor
    lengths: Tensor | None = None
    probabilities: Tensor | None = None
    confidence: Tensor | None = None

    def shortened(self, lengths: Tensor) -> Proposal:
        """What is left where no more than so many tokens of each sequence are proposed, [B]."""
        lengths = lengths.clamp_max(self.token_ids.shape[1] if self.lengths is None else self.lengths)
        longest = int(lengths.max())
        tensors = (self.token_ids, self.probabilities, self.confidence)
        token_ids, probabilities, confidence = (None if each is None else each[:, :longest] for each in tensors)
        assert token_ids is not None
        return Proposal(token_ids, lengths, probabilities, confidence)


@dataclass
class DraftState:
    """Drafting of several sequences, numbered without gaps.

    Attributes:
        cache: What every layer has seen of them.
        num_context: Observed rows of each; the position of its next anchor.
    """

    cache: RaggedCache
    num_context: list[int] = field(default_factory=list)

    def open(self, seeds: Sequence[int]) -> None:
        """Add sequences without context. Their seeds matter to the ``permute_context`` control alone."""
        self.num_context += [0] * len(seeds)

    def drop(self, sequence: int) -> None:
        """Forget a sequence; the last one takes its place."""
        last = len(self.num_context) - 1
        self.cache.move(last, sequence)
        self.num_context[sequence] = self.num_context[last]
        del self.num_context[last]


class Drafter(nn.Module, ABC):
    """Base of the drafters. The state dict has the tensor names of the native checkpoint.

    Attributes:
        algorithm: Name in the registry.
        config: The draft model's transformers config: the target's, with the drafter's layers.
        settings: Resolved settings.
        family: The target's family.
        embed_tokens: [V, D], a frozen copy of the target's.
        lm_head: [V, D], a frozen copy of the target's.
        logit_softcap: c where logits are c · tanh(logits / c), the target's and the drafter's alike; None if not.
    """

    algorithm: str

    def __init__(self, config: PretrainedConfig, settings: DrafterConfig, family: Family) -> None:
        super().__init__()
        self.config = config
        self.settings = settings
        self.family = family
        self.logit_softcap = family.logit_softcap(config)
        self.embed_tokens = family.embedding(config)
        self.lm_head = OutputProjection(config.hidden_size, config.vocab_size)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    @property
    def target_model_type(self) -> str:
        """Model type of the text config that it was built for, as far as its own config says."""
        for name in ("target_text_model_type", "target_model_type"):
            if recorded := getattr(self.config, name, None):
                return str(recorded)
        return str(self.config.model_type)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """New weights: linear and embedding N(0, initializer_range), biases 0, norms 1."""
        deviation = getattr(self.config, "initializer_range", 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits of rows [..., D] in the target's own terms, capped where the family's are: [..., V]."""
        return soft_capped(self.lm_head(hidden), self.logit_softcap)

    def _check_batch(self, batch: FeatureBatch, last_rows: Tensor) -> None:
        """Check that a batch's tokens and features are this drafter's, and features numbers where training reads them.

        Token ids are checked on a CPU only: reading them off a GPU would wait for it.

        Args:
            batch: To be checked.
            last_rows: [B, T] bool, the rows of the target's last hidden state that are read.

        Raises:
            ValueError: It has not; the message says what is wrong.
        """
        if batch.input_ids.device.type == "cpu":
            batch.check_token_ids(self.config.vocab_size)
        width, layer_ids = self.config.hidden_size, self.settings.target_layer_ids
        assert layer_ids is not None, "settings are resolved"
        wanted = {
            "target_hidden_states": (width * len(layer_ids), f"{width} of each of the layers {list(layer_ids)}"),
            "target_last_hidden_states": (width, "the target's hidden size"),
        }
        for name, (size, meaning) in wanted.items():
            given = getattr(batch, name).shape[-1]
            if given != size:
                raise ValueError(f"{name} is {given} wide, but this drafter reads {size}: {meaning}")
        batch.check_finite(last_rows)

    @abstractmethod
    def reset_buffers(self) -> None:
        """Compute again what is in no checkpoint."""

    def forward(self, *args: Any, **kwargs: Any) -> TrainingOutput:
        """`training_forward`, under the name that training engines call."""
        return self.training_forward(*args, **kwargs)

    @abstractmethod
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
        """Loss and metrics of a batch."""

    @abstractmethod
    def needed_rows(self, loss_mask: Tensor) -> Tensor:
        """Rows of the target's last hidden state that training reads: [B, T] → [B, T] bool."""

    @abstractmethod
    def start_drafting(self, max_sequences: int = 1, stop_token_ids: Collection[int] = ()) -> Any:
        """A fresh `DraftState`; `DraftState.open` adds its sequences.

        Args:
            max_sequences: Most sequences at once.
            stop_token_ids: A drafter that drafts token by token ends a proposal after the first of these.
        """

    @abstractmethod
    def observe(
        self, state: Any, features: Tensor, next_token_ids: Tensor, counts: Sequence[int], first: int = 0
    ) -> None:
        """Append verified context rows to b sequences of a state, which is changed in place.

        Args:
            state: From `start_drafting`.
            features: [b, R, L·D] target features of consecutive positions of each.
            next_token_ids: [b, R] the token that follows each of them.
            counts: How many of the R rows each sequence really has; what stands in the others is forgotten.
            first: The first of the b sequences.

        Raises:
            ValueError: The features are not as wide as the drafter's target is.
        """

    @abstractmethod
    def propose(
        self, state: Any, anchor_ids: Tensor, *, temperature: float = 0.0, uniforms: Tensor | None = None
    ) -> Proposal:
        """Draft the tokens after each sequence's anchor, which stands right after its observed rows.

        What was observed stays as it is.

        Args:
            state: From `start_drafting`, with every row before the anchors observed.
            anchor_ids: [B] the newest committed token of every sequence.
            temperature: Of the draft distribution; below 1e-5 argmax.
            uniforms: [B, γ] float64 in [0, 1), which sampled tokens come from; not needed when greedy.

        Raises:
            ValueError: Nothing was observed yet.
        """

    def _check_observed(self, state: DraftState) -> None:
        if not state.num_context or not all(state.num_context):
            raise ValueError("nothing observed: a proposal needs the features of the tokens before its anchor")
