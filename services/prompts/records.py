"""What the coordinator is told and what it answers, besides the step lease."""

from __future__ import annotations

from typing import Literal

from services.contracts import LastRows, Record, TableSignature, Traffic, WireDtype


class CoordinatorSettings(Record):
    """How a run uses its prompts.

    Attributes:
        reuse: Passes through the drafter that one capture feeds.
        last_rows: Rows of the last hidden state that the drafter's loss reads.
        world_size: Trainer ranks.
        micro_batch_size: Sequences of one forward pass of one rank.
        accumulation: Micro-batches of one rank in a full optimizer step.
        max_steps: Optimizer steps after which `END` is granted, counted from the run's very first; None runs the plan
            out.
        deterministic: Whether step leases name their captures, in plan order.
        tail: What becomes of a last step that is not full.
        signature: Of the tables; how many bytes a capture takes follows from it.
        lookahead_captures: Bound of each shard's work queue.
        capture_log: Path of the append-only log of captures; it outlives crashes.
        answers: Path of the target's own answers, which the shard writes.
        lives: Path of a file that counts how often a coordinator of this run began.
        ledger: Path of the ledger in the checkpoint that the run resumes from; None begins at step 0.
        generation: The trainer group that leases are granted to.
        num_shards: Replay shards that captures go to.
        joins: Whether the ranks are at work already: then nothing is granted until each has given its account.
        is_paused: Whether to grant nothing until `go_on`.
        is_stopped: Whether to grant nothing any more.
    """

    reuse: int
    last_rows: LastRows
    world_size: int
    micro_batch_size: int
    accumulation: int
    max_steps: int | None
    deterministic: bool
    tail: Literal["pad", "drop"]
    signature: TableSignature
    lookahead_captures: int
    capture_log: str
    answers: str
    lives: str
    ledger: str | None
    generation: int
    num_shards: int = 1
    joins: bool = False
    is_paused: bool = False
    is_stopped: bool = False

    @property
    def uses_per_round(self) -> int:
        """Uses of one micro-batch of every rank."""
        return self.world_size * self.micro_batch_size

    @property
    def uses_per_step(self) -> int:
        """Uses of one full optimizer step (the global batch)."""
        return self.uses_per_round * self.accumulation


class Progress(Record):
    """How far a run is.

    Attributes:
        planned: Uses of the whole plan.
        trained: Uses whose optimizer step is done, those before a resume included.
        skipped: Uses by reason.
        skip_examples: For each reason, what the first such skip was: file, line, figures.
        rejected: Malformed lines of the prompts file; they are no part of the plan.
        rejected_lines: The first few of them.
        captured: Captures committed over the run's life, those made again included.
        recaptured: Captures made again.
        tokens_captured: Tokens of all captures, those made again included.
        traffic: What all captures brought, those made again included, by the dtype as which it travelled.
        tokens_trained: Tokens of all trained uses.
        distinct_tokens: Tokens of the distinct prompts captured, each once: what a feature cache would have held.
        steps_done: Optimizer steps that every rank has reported.
        steps_granted: Optimizer steps granted.
        ended: Why no further step is granted, or None.
        last_failure: The last capture that failed and why, or None.
        silent_s: Seconds since the last sign of life, by rank; of ranks of this group that have given one.
    """

    planned: int
    trained: int
    skipped: dict[str, int]
    skip_examples: dict[str, str]
    rejected: int
    rejected_lines: tuple[str, ...]
    captured: int
    recaptured: int
    tokens_captured: int
    traffic: dict[WireDtype, Traffic]
    tokens_trained: int
    distinct_tokens: int
    steps_done: int
    steps_granted: int
    ended: str | None
    last_failure: str | None
    silent_s: dict[int, float]
