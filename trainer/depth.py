"""How many bytes of features a rank has out of the replay buffer at once. No torch.

Micro-batches ahead of the step are bounded as they are packed, in the drafter's dtype; what the buffer must hold for
them is counted as it travelled. With S samples of a forward pass of T tokens at most:

    depth   = trainer.prefetch, or two micro-batches of S · T tokens
    needed  = ranks · (depth or one such micro-batch, if that is more, + two: the one that trains, the one being leased)
"""

from __future__ import annotations

import math

from services.contracts import DTYPE_BYTES, TableSignature
from trainer.recipe import Recipe, TrainerConfig

DEFAULT_MICRO_BATCHES = 2


def prefetch_bytes(recipe: Recipe, signature: TableSignature) -> int:
    """Most bytes of packed micro-batches ahead of the step, on one rank."""
    if recipe.trainer.prefetch is not None:
        return recipe.trainer.prefetch
    return DEFAULT_MICRO_BATCHES * _longest_tokens(recipe) * _packed_token_bytes(signature, recipe.trainer)


def needed_buffer_bytes(recipe: Recipe, signature: TableSignature) -> int:
    """The least capacity that holds what all ranks may have out of the buffer at once, with the longest samples."""
    longest_bytes = signature.sample_bytes(_longest_tokens(recipe), _longest_tokens(recipe))
    ahead_tokens = prefetch_bytes(recipe, signature) / _packed_token_bytes(signature, recipe.trainer)
    ahead_bytes = max(longest_bytes, math.ceil(ahead_tokens * signature.sample_bytes(1, 1)))
    return recipe.trainer.world_size * (ahead_bytes + 2 * longest_bytes)


def _longest_tokens(recipe: Recipe) -> int:
    """Tokens of the longest micro-batch."""
    return recipe.trainer.layout.samples_per_pass * recipe.prompts.max_length


def _packed_token_bytes(signature: TableSignature, trainer: TrainerConfig) -> int:
    return (len(signature.layer_ids) + 1) * signature.hidden_size * DTYPE_BYTES[trainer.precision]
