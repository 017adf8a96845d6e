"""Which tokens a drafter with a cut vocabulary drafts. Torch-free, for the driver; the tensors come in as they are.

Eagle3 drafts with the rows of the target's head that belong to the most frequent tokens. The others it can never
propose: the target samples them itself, so decoding stays lossless. ``d2t`` says which token a drafted one is, as an
offset: target id = draft id + d2t[draft id].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def most_frequent(
    counts: Mapping[int, int], size: int, *, vocab_size: int, always: Collection[int] = ()
) -> tuple[int, ...]:
    """The tokens to keep, ascending.

    Args:
        counts: How often each token was seen; those that were not may be left out.
        size: How many to keep.
        vocab_size: V.
        always: Kept whatever their count, such as stop tokens.

    Raises:
        ValueError: There are fewer tokens, or more that are always kept, or ids outside the vocabulary.
    """
    foreign = [token for token in (*counts, *always) if not 0 <= token < vocab_size]
    if foreign:
        raise ValueError(f"token {foreign[0]} is outside the vocabulary of {vocab_size}")
    if not len(set(always)) <= size <= vocab_size:
        raise ValueError(
            f"cannot keep {size} tokens: the vocabulary has {vocab_size}, and {len(set(always))} of them are always "
            "kept; choose another draft_vocab_size"
        )
    pinned = set(always)
    order = sorted(range(vocab_size), key=lambda token: (token not in pinned, -counts.get(token, 0), token))
    return tuple(sorted(order[:size]))


def share_of(counts: Mapping[int, int], kept: Collection[int]) -> float:
    """Part of what was counted that is kept; 0 where nothing was counted."""
    members, total = set(kept), sum(counts.values())
    return sum(count for token, count in counts.items() if token in members) / total if total else 0.0


def check_tokens(tokens: Sequence[int], size: int, vocab_size: int) -> None:
    """Check that these are `size` tokens of the vocabulary, ascending.

    Raises:
        ValueError: They are not.
    """
    if len(tokens) != size:
        raise ValueError(f"the draft vocabulary has {len(tokens)} tokens instead of {size}")
    if any(left >= right for left, right in pairwise(tokens)):
        raise ValueError("the tokens of a draft vocabulary must ascend without repeats")
    if tokens[0] < 0 or tokens[-1] >= vocab_size:
        raise ValueError(
            f"the draft vocabulary has tokens from {tokens[0]} to {tokens[-1]}, but the target's has {vocab_size}"
        )


def check_offsets(offsets: Tensor, vocab_size: int) -> None:
    """Check that ``d2t`` [Vd] gives tokens of the vocabulary, ascending.

    Raises:
        ValueError: It does not.
    """
    if offsets.is_floating_point() or offsets.dim() != 1:
        raise ValueError(f"d2t must be whole numbers [Vd], it is {offsets.dtype} {list(offsets.shape)}")
    tokens = [place + offset for place, offset in enumerate(offsets.tolist())]
    try:
        check_tokens(tokens, len(tokens), vocab_size)
    except ValueError as error:
        raise ValueError(f"d2t must be offsets, target id = draft id + d2t[draft id]: {error}") from error
