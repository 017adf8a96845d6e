"""Which of the leased samples go through the drafter together, and in which order. No torch.

A pass of a rank takes as long as its tokens are many, and ranks wait for each other in every pass. So of the samples
that a rank has leased for the passes to come of one step, each pass gets about as many tokens as the others, and the
largest pass goes first: the largest of one rank then meets the largest of another, which matters most where a pass has
one sample and there is nothing to balance.

What it can reorder: samples leased by one rank for passes of one step, as far as they are ready together and fit
`trainer.prefetch`. What it cannot: samples across ranks, across steps, or in deterministic mode, where the coordinator
names each pass's samples. So a step trains the same samples in any order, every pass has as many as without it, and a
buffer that is nearly empty, which gives one pass's samples at a time, is read in its own order.
"""

from __future__ import annotations

from collections.abc import Sequence


def balance(num_tokens: Sequence[int], pass_sizes: Sequence[int]) -> list[list[int]]:
    """Deal samples out to passes: the longest first, each to the pass with the fewest tokens that has a place left.

    Args:
        num_tokens: Of each sample.
        pass_sizes: How many samples each pass takes; together as many as there are.

    Returns:
        For each pass the numbers of its samples, ascending. Passes with more samples come first, because only the last
        one of a plan may have fewer; among equals the one with the most tokens does.
    """
    assert sum(pass_sizes) == len(num_tokens)
    passes: list[list[int]] = [[] for _ in pass_sizes]
    sums = [0] * len(passes)
    for sample in sorted(range(len(num_tokens)), key=lambda sample: -num_tokens[sample]):
        open_passes = (index for index, size in enumerate(pass_sizes) if len(passes[index]) < size)
        lightest = min(open_passes, key=lambda index: sums[index])
        passes[lightest].append(sample)
        sums[lightest] += num_tokens[sample]
    order = sorted(range(len(passes)), key=lambda index: (-len(passes[index]), -sums[index]))
    return [sorted(passes[index]) for index in order]
