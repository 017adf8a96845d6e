"""What drafts are worth in wall time: plain and speculative decoding of the same prompts in one run.

Both sides have the same target, engine, batch and prompts. Groups of prompts are decoded by turns, one side first and
then the other, so that a machine that slows down slows both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from drafters.drafter import Drafter
from evaluation.batch_decoder import BatchDecoder, Row, cut_below
from evaluation.timing import PhaseClock, Timing, total
from services.contracts import Record

WARM_UP_TOKENS = 4
"""New tokens decoded before anything is timed: first calls allocate and choose kernels."""


class Speedup(Record):
    """Result of `measure_speedup`."""

    plain: Timing
    speculative: Timing
    accepted_length: float
    """τ of the speculative side."""
    batch_size: int

    @property
    def ratio(self) -> float:
        """Wall time a token of plain decoding / that of speculative decoding."""
        return self.plain.token_s / self.speculative.token_s


def timed_decode(
    target_model: nn.Module,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    confidence_threshold: float = 0.0,
    seed: int = 0,
) -> tuple[list[Row], Timing]:
    """Decode prompts and say where the time went; without a drafter plainly.

    Arguments are those of `speculative_generate`, with prompts that have been checked.
    """
    clock = PhaseClock(next(target_model.parameters()).device)
    with BatchDecoder(
        target_model,
        drafter,
        max_rows=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=stop_token_ids,
        cut=cut_below(confidence_threshold),
        clock=clock,
    ) as decoder:
        rows = decoder.run(prompts, seed)
    return rows, clock.timing(sum(len(row.tokens) - row.num_prompt for row in rows))


def measure_speedup(
    target_model: nn.Module,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    confidence_threshold: float = 0.0,
    seed: int = 0,
) -> Speedup:
    """Decode every prompt plainly and speculatively, group by group, taking turns in who is first.

    Args:
        target_model: In evaluation mode.
        drafter: Its drafter, on the same device.
        prompts: At least one; a group is `batch_size` of them.
        batch_size: Rows at once, on both sides.
        max_new_tokens: As `speculative_generate`, like all that follow.
        temperature: Of both sides.
        stop_token_ids: Of both sides.
        confidence_threshold: Of the drafter's proposals.
        seed: Prompt i of a group is seeded seed + i.

    Raises:
        ValueError: No round was decoded.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "temperature": temperature,
        "stop_token_ids": stop_token_ids,
        "confidence_threshold": confidence_threshold,
        "seed": seed,
    }
    for side in (None, drafter):
        timed_decode(target_model, side, prompts[:batch_size], max_new_tokens=WARM_UP_TOKENS, **options)
    timings: dict[bool, list[Timing]] = {False: [], True: []}
    rounds: list[int] = []
    for turn, start in enumerate(range(0, len(prompts), batch_size)):
        group = prompts[start : start + batch_size]
        for is_speculative in (False, True) if turn % 2 == 0 else (True, False):
            rows, timing = timed_decode(
                target_model, drafter if is_speculative else None, group, max_new_tokens=max_new_tokens, **options
            )
            timings[is_speculative].append(timing)
            if is_speculative:
                rounds += chain.from_iterable((entry.committed for entry in row.rounds) for row in rows)
    if not rounds:
        raise ValueError("no round was decoded: every prompt ended at its first token, so there is no speedup")
    return Speedup(
        plain=total(timings[False]),
        speculative=total(timings[True]),
        accepted_length=sum(rounds) / len(rounds),
        batch_size=batch_size,
    )
