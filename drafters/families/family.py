"""What a drafter needs to know of its target's family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from drafters.families.layer import DraftLayer


class Family(ABC):
    """A family of targets: how their draft models are configured and built.

    Attributes:
        name: Of the family, for messages.
        architecture_prefix: How names of its drafters' architectures begin in a checkpoint.
    """

    name: str
    architecture_prefix: str

    @abstractmethod
    def draft_values(self, text_config: PretrainedConfig) -> dict[str, Any]:
        """A target's text config as the draft model's: everything but the number of layers, which the caller sets.

        Raises:
            ValueError: The config lacks what a draft layer needs, or says what no draft layer does.
        """

    @abstractmethod
    def read_config(self, values: Mapping[str, Any]) -> PretrainedConfig:
        """The draft model's config from the values of a checkpoint or of `draft_values`.

        Raises:
            ValueError: The values are no config of this family.
        """

    @abstractmethod
    def embedding(self, config: PretrainedConfig) -> nn.Embedding:
        """Token embedding [V, D], scaled if the family's is."""

    @abstractmethod
    def norm(self, config: PretrainedConfig) -> nn.Module:
        """Norm over the hidden size."""

    @abstractmethod
    def rotary(self, config: PretrainedConfig) -> nn.Module:
        """(Any tensor of the wanted dtype and device, positions [B, rows]) → (cos, sin), each [B, rows, head size].

        Frequencies stay float32 whatever the drafter's dtype.
        """

    @abstractmethod
    def layer(self, config: PretrainedConfig, index: int, attention_inputs: int | None = None) -> DraftLayer:
        """A decoder layer with the family's own tensor names.

        Args:
            config: From `read_config`.
            index: Of the draft layer.
            attention_inputs: Width of what q, k and v project; None is the hidden size, Eagle3's is twice that.
        """

    def logit_softcap(self, config: PretrainedConfig) -> float | None:
        """c where logits of target and drafter are c · tanh(logits / c); None where they are as they are."""
        return None

    @abstractmethod
    def check_warm_start(self, target_values: Mapping[str, Any], layer_id: int) -> None:
        """Check that a draft layer can begin with this layer of a target, whose text config these values are.

        Raises:
            ValueError: The target's layer computes something else.
        """
