"""Cut the vocabulary of a drafter that was trained over all of it."""

from __future__ import annotations

from collections.abc import Sequence

from drafters.drafter import Drafter
from drafters.eagle3 import Eagle3Drafter
from drafters.export.formats import CannotExportError


def with_vocabulary(drafter: Drafter, token_ids: Sequence[int]) -> Eagle3Drafter:
    """The same drafter, sharing its weights, drafting these tokens only.

    Its head is the target's and was never trained, so some rows of it draft what the whole would have drafted, were
    the other tokens not there.

    Args:
        drafter: Eagle3, uncut.
        token_ids: Ascending.

    Raises:
        CannotExportError: The drafter is another one, or has been cut already.
    """
    if not isinstance(drafter, Eagle3Drafter):
        raise CannotExportError(
            f"only Eagle3's vocabulary can be cut, and this is {drafter.algorithm}: leave out --draft-vocab-size"
        )
    if drafter.drafted_tokens is not None:
        raise CannotExportError(
            f"this drafter was trained with a vocabulary of {len(drafter.drafted_tokens):,} tokens: leave out "
            "--draft-vocab-size"
        )
    settings = drafter.settings.model_copy(update={"draft_vocab_size": len(token_ids)})
    cut = Eagle3Drafter(drafter.config, settings, drafter.family)
    dtype = drafter.lm_head.weight.dtype
    cut.load_state_dict(drafter.state_dict() | {"d2t": cut.d2t}, assign=True)
    cut.to(dtype).set_vocabulary(token_ids)
    return cut.eval()
