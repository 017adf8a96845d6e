"""Attention of a few new rows over everything that their sequences have cached: decoding, of drafters and targets.

Letters: b sequences, R new rows of each, N entries, H heads, K key heads, G = H / K, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from drafters.key_values import KeyValues


def positions_seen(last_seen: Tensor, num_entries: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """What is added to attention scores so that each row sees the entries up to a position.

    Args:
        last_seen: [b, R] int64, the last position that each row sees; for causal attention its own.
        num_entries: N.
        dtype: Of the scores.
        window: With a sliding window, how many positions are seen, the last one included.

    Returns:
        [b, 1, R, N]: 0 where an entry is seen, −∞ elsewhere.
    """
    entries = torch.arange(num_entries, device=last_seen.device)
    hidden = entries > last_seen[..., None]
    if window is not None:
        hidden |= entries <= last_seen[..., None] - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, -torch.inf)[:, None]


def attend_cached(queries: Tensor, seen: KeyValues, bias: Tensor, scale: float | None) -> Tensor:
    """Softmax attention. Query heads that share a key head become rows of one head, so that no key is copied.

    Args:
        queries: [b, H, R, d], rotated.
        seen: N entries of each sequence.
        bias: [b, 1, R, N] of `positions_seen`; one row where all R see the same.
        scale: Multiplies the scores; None is 1 / √d.

    Returns:
        [b, H, R, d of the values].
    """
    num_heads, num_rows = queries.shape[1:3]
    num_key_heads = seen.keys.shape[1]
    groups = num_heads // num_key_heads
    if groups > 1:
        queries = queries.unflatten(1, (num_key_heads, groups)).flatten(2, 3)
        if bias.shape[2] > 1:
            bias = bias.repeat(1, 1, groups, 1)
    bias = bias.expand(-1, -1, queries.shape[2], -1)
    attended = functional.scaled_dot_product_attention(queries, seen.keys, seen.values, attn_mask=bias, scale=scale)
    return attended.unflatten(2, (groups, num_rows)).flatten(1, 2) if groups > 1 else attended


def attend_new(queries: Tensor, rows: KeyValues, scale: float | None) -> Tensor:
    """Causal attention of R rows over themselves alone: sequences that begin here.

    Args:
        queries: [b, H, R, d], rotated.
        rows: Their own keys and values.
        scale: Multiplies the scores; None is 1 / √d.

    Returns:
        [b, H, R, d of the values].
    """
    grouped = queries.shape[1] != rows.keys.shape[1]
    return functional.scaled_dot_product_attention(
        queries, rows.keys, rows.values, is_causal=True, scale=scale, enable_gqa=grouped
    )
