"""Records that cross processes. Metadata only: tensors travel as chunk payloads, never in a record.

Use, capture and sample are the units of `Plan` and ledger:

- a **use** is one pass of one prompt through the drafter: (prompt, epoch, k) with k < reuse;
- a **capture** feeds the `reuse` uses of one (prompt, epoch);
- a **sample** is what a capture leaves in a table: its chunks and its metadata.

Uses and captures are numbered by the plan: capture c feeds uses c * reuse … c * reuse + reuse − 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

WIRE_VERSION = 2
"""Version of proto/target.proto and of the chunk layout; both ends of a capture must have the same.

2 brought fp8_e4m3."""

TensorName = Literal["context", "last"]
WireDtype = Literal["bf16", "fp16", "fp32", "fp8_e4m3"]

DEFAULT_CHUNK_BYTES = 1024**2
MAX_CHUNK_BYTES = 4 * 1024**2
"""Usual and largest payload of a chunk: no object on the wire or in Redis is larger."""

DTYPE_BYTES: dict[WireDtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1}
"""Of one element."""

SCALE_BYTES: dict[WireDtype, int] = {"bf16": 0, "fp16": 0, "fp32": 0, "fp8_e4m3": 4}
"""Of the float32 scale behind each hidden state."""

MIN_SCALE = 2.0**-126
MAX_SCALE = 255 * 2.0**120 / 448
"""Bounds of fp8's scales: float32's smallest normal number, and bfloat16's largest over e4m3's."""


def hidden_state_bytes(hidden_size: int, dtype: WireDtype) -> int:
    """Bytes of one token's hidden state of one layer: its elements, and behind them the scale if the dtype has any."""
    return hidden_size * DTYPE_BYTES[dtype] + SCALE_BYTES[dtype]


class Record(BaseModel):
    """Base of all records: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LastRows(StrEnum):
    """Which rows of the target's last hidden state a drafter's loss reads.

    The drafters' `needed_rows` computes the same from tensors; a test holds the two together.
    """

    BETWEEN = "between"
    """Row r where loss_mask[r] = loss_mask[r + 1] = 1 (DSpark, DFlash)."""

    AFTER = "after"
    """Row r where loss_mask[r − 1] = 1 (Eagle3)."""

    def select(self, loss_mask: Sequence[int]) -> list[int]:
        """Row numbers, ascending, for a loss mask of length T."""
        length = len(loss_mask)
        if self is LastRows.BETWEEN:
            return [row for row in range(length - 1) if loss_mask[row] and loss_mask[row + 1]]
        return [row for row in range(1, length) if loss_mask[row - 1]]


class Use(Record):
    """One pass of one prompt through the drafter."""

    prompt: int
    epoch: int
    k: int


class TargetDescription(Record):
    """What a target says of itself (`Describe`)."""

    model_name: str
    fingerprint: str
    """Hash of the config and of the weights' index: targets with different fingerprints give different features."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    max_tokens: int
    engine: str
    wire_version: int = WIRE_VERSION


class TableSignature(Record):
    """What all samples of a table share; a mismatch is refused at the first insert."""

    fingerprint: str
    layer_ids: tuple[int, ...]
    hidden_size: int
    dtype: WireDtype

    @property
    def context_row_bytes(self) -> int:
        """Bytes of one token's context features."""
        return len(self.layer_ids) * self.last_row_bytes

    @property
    def last_row_bytes(self) -> int:
        """Bytes of one token's last hidden state."""
        return hidden_state_bytes(self.hidden_size, self.dtype)

    def differences(self, held: TableSignature) -> str:
        """What is other than in the signature of a table, in words: "dtype fp8_e4m3, not bf16"."""
        wanted, found = self.model_dump(), held.model_dump()
        return ", ".join(f"{name} {value}, not {found[name]}" for name, value in wanted.items() if value != found[name])

    def sample_bytes(self, num_tokens: int, num_last_rows: int) -> int:
        """Payload bytes of one sample, known before it is captured."""
        return num_tokens * self.context_row_bytes + num_last_rows * self.last_row_bytes

    def reserved_bytes(self, job: CaptureJob) -> int:
        """Payload bytes that a capture may take: those of its sample, or of the longest answer."""
        longest_answer = job.generate.max_new_tokens if job.generate else 0
        return self.sample_bytes(job.num_tokens + longest_answer, len(job.last_rows) + longest_answer)


class Generation(Record):
    """How a target answers a prompt whose features it captures in the same pass (on-policy data)."""

    max_new_tokens: int
    """Longest answer, its stop token included."""
    min_new_tokens: int = 1
    """An answer shorter than this is of no use to the trainer."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    stop_token_ids: tuple[int, ...]
    last_rows: LastRows
    """The rows of the last hidden state to send, once the answer is known."""


class CaptureJob(Record):
    """One entry of the work queue: capture these tokens, or a prompt and the target's own answer to it."""

    capture: int
    attempt: int = 0
    """Counts the tries; a stale try's chunks can never be taken for a newer one's."""
    prompt: int
    epoch: int
    reuse: int = 1
    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    last_rows: tuple[int, ...]
    ks: tuple[int, ...] | None = None
    """The k of its uses still to be trained, ascending; None is all of them (a resumed run leaves some out)."""
    generate: Generation | None = None
    """Set while the target has still to answer: `input_ids` are the prompt, nothing counts in the loss yet."""

    @property
    def num_tokens(self) -> int:
        """T: tokens of the sequence, as far as they are known."""
        return len(self.input_ids)

    def answered(self, answer: Sequence[int]) -> CaptureJob:
        """The job once the target has answered: what it would be had the answer been known before.

        Args:
            answer: Token ids; each of them counts in the loss.
        """
        assert self.generate is not None
        loss_mask = (*self.loss_mask, *(1 for _ in answer))
        return self.model_copy(
            update={
                "input_ids": (*self.input_ids, *answer),
                "loss_mask": loss_mask,
                "last_rows": tuple(self.generate.last_rows.select(loss_mask)),
                "generate": None,
            }
        )


class Chunk(Record):
    """One stored piece of a sample: rows [row_start, row_end) of one tensor, C-contiguous, little-endian.

    For `last` the rows count within the rows that were asked for, not within the sequence.
    """

    tensor: TensorName
    row_start: int
    row_end: int
    num_bytes: int
    crc32c: int


class Sample(Record):
    """A committed sample's metadata: the job it came from and where its rows are."""

    job: CaptureJob
    chunks: tuple[Chunk, ...]
    num_bytes: int
    target: str
    """Address of the target that captured it."""


class LeaseName(Record):
    """A lease by its name alone: all that ending it takes."""

    lease_id: str


class SampleLease(LeaseName):
    """Permission for one rank to use one sample once; ended by `ack` or `release`, or by its deadline."""

    use: int
    """Number of the use in the plan."""
    k: int
    sample: Sample
    importance: float = 1.0
    """What the sample's loss is multiplied by: below 1 where a prioritized selector draws it more often than others."""
    shard: int = 0
    """Which of the run's shards holds the sample."""

    @property
    def incarnation(self) -> str:
        """Of the table that gave it: with another one, its sample is not there any more."""
        return self.lease_id.partition(".")[0]


class Traffic(Record):
    """What captures that were committed brought over the wire."""

    num_tokens: int = 0
    num_bytes: int = 0

    def plus(self, num_tokens: int, num_bytes: int) -> Traffic:
        """With one capture more."""
        return Traffic(num_tokens=self.num_tokens + num_tokens, num_bytes=self.num_bytes + num_bytes)


class StepLease(Record):
    """What the coordinator grants one optimizer step; the same numbers for every rank.

    `num_micro_batches` 0 means END: the plan is exhausted, stopped, or the step limit is reached.
    """

    step: int
    num_micro_batches: int
    num_uses: int = 0
    """Uses that the step trains, all ranks together."""
    captures: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Deterministic mode: captures[rank][micro_batch] are the captures to take, in order. Otherwise None: take
    what is ready."""
    end: str | None = None
    """Why nothing more is granted; set in END alone."""

    @property
    def is_end(self) -> bool:
        """Whether there is nothing more to train."""
        return self.num_micro_batches == 0


class StepReport(Record):
    """What one rank reports once an optimizer step is done."""

    step: int
    rank: int
    generation: int
    uses: tuple[int, ...]
    num_tokens: int
    metrics: dict[str, float] = {}
    """Global metrics (already reduced over ranks); only rank 0 fills them."""


class SampleNote(Record):
    """What the capture log keeps of a sample, as a rank that has read it knows it."""

    capture: int
    prompt: int
    attempt: int
    num_tokens: int
    num_bytes: int


class RankAccount(Record):
    """What a rank has been granted, holds and has done: all that a coordinator needs to begin anew beside it.

    Reports and samples reach back to the checkpoint before the newest one, so that either may be begun from.
    """

    rank: int
    generation: int
    incarnations: tuple[str, ...]
    """Of the tables that the coordinator named when it asked; the rank takes samples of no other ones any more."""
    leases: tuple[StepLease, ...] = ()
    """Granted to this rank and not reported by it; the last may be END."""
    reports: tuple[StepReport, ...] = ()
    """Ascending by step."""
    held: tuple[int, ...] = ()
    """Uses whose features are in the rank's memory and whose step is not reported."""
    samples: tuple[SampleNote, ...] = ()
    """Of held and of reported uses."""


class TableInfo(Record):
    """A table's state at one moment."""

    resident_bytes: int
    """Bytes of committed samples and of captures in flight."""
    peak_bytes: int
    """The most that they have been."""
    wanted_bytes: int
    """Bytes of the last capture that was refused for them; 0 once one was admitted."""
    capacity_bytes: int
    num_ready: int
    """Samples with a use that can be leased."""
    num_ready_uses: int
    num_leased: int
    """Leases that are held."""
    num_inserting: int
    """Captures in flight."""
    inserts: int
    """Samples committed."""
    samples: int
    """Leases given, those that went back included."""
    deletes: int
    """Samples freed."""
    sealed: bool
    """Nothing more will be inserted."""
    generation: int
    """Of the trainer group that may lease."""
    max_times_sampled: int
    """Most uses that one sample feeds."""
    selector: str
    min_size: int
    samples_per_insert: int
    min_diff: float | None
    """Bounds of the rate limiter; None is unbounded."""
    max_diff: float | None
    difference: int
    """Uses promised, captures in flight included, and not yet sampled: what the limiter holds between its bounds."""
    can_insert: bool
    """Whether the rate limiter lets another whole sample in; its bytes are another matter."""
    can_sample: bool
    """Whether the rate limiter lets a use go."""


class Outcome(Record):
    """What became of a capture; written by the shard in the same transition that changes the table."""

    capture: int
    attempt: int
    kind: Literal["committed", "failed"]
    num_tokens: int = 0
    num_bytes: int = 0
    retry: bool = False
    """Failed, but another try may succeed (a dead target). Otherwise the capture's uses are skipped."""
    reason: str = ""


class Event(Record):
    """Something worth telling a user: a restart, a skip, a scaling."""

    time_s: float
    kind: str
    message: str


ALL_DOMAINS = "all"
"""Domain of prompts that name none."""


class HeldoutPrompt(Record):
    """A prompt that evaluation decodes."""

    token_ids: list[int]
    """With the generation prompt."""
    domain: str = ALL_DOMAINS
    """What kind of text it asks for, as its source names it."""


class Autoscaling(Record):
    """How a run scales its targets by itself."""

    is_on: bool
    """Otherwise it is suspended: somebody has scaled by hand, or switched it off."""
    min: int
    max: int


TargetStateName = Literal["pending", "loading", "serving", "silent", "quarantined", "draining", "failed"]


class TargetState(Record):
    """What the driver knows of one target server."""

    index: int
    """Number of the server within its run; never given twice."""
    state: TargetStateName
    """pending: not placed yet. silent: served before and does not answer now, for instance while it restarts.
    quarantined: answered wrongly and is being restarted. draining: published no more, its running captures may finish.
    failed: it will not come back by itself."""
    address: str | None = None
    """host:port where it serves or served last; None before it first served."""
    message: str = ""
    """Why it does not serve; for pending the resource that is missing."""
