"""The ledger: what became of every use of the plan, kept as text that can be audited without the run.

Two files tell the story. The **ledger** lies in every checkpoint and holds only that checkpoint's lineage, one JSON
object a line, in three kinds:

    {"plan": {"num_prompts": 900, "epochs": 2, "reuse": 1, "seed": 42, "digest": "…"}}      first line
    {"skip": "too long", "uses": [17], "detail": "chats.jsonl:18: 5120 tokens, above prompts.max_length 4096"}
    {"step": 1, "generation": 0, "uses": [0, 1, 2, 3], "num_tokens": 2048}

The **capture log** lies in the output directory and is only ever appended to, crashes and resumes included:

    {"capture": 3, "prompt": 12, "attempt": 0, "reason": "first", "num_tokens": 512, "num_bytes": 98304}

Each planned use is trained once, skipped with a reason, or not reached; `audit` derives that from the two texts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from services.contracts import Record, WireDtype
from services.errors import CheckpointError, ReplayError
from services.prompts.plan import MAX_USES
from services.reading import first_fault, read_json

FIRST = "first"
"""Reason of a capture that is made for the first time; any other says why it was made again."""

MAX_ATTEMPT = 2**62
"""Above all attempts of a capture: what comes after one is kept in 64 bits."""

MAX_PROBLEMS = 20
"""Faults that an audit lists; a broken log has as many as it has lines."""

OPEN, TRAINED, SKIPPED = 0, 1, 2


class PlanHeader(Record):
    """The plan that a ledger counts, and the hash of the prompts that its numbers stand for."""

    num_prompts: int = Field(ge=1)
    epochs: int = Field(ge=1)
    reuse: int = Field(ge=1)
    seed: int
    digest: str

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_uses > MAX_USES:
            raise ValueError(f"more than {MAX_USES} uses")
        return self

    @property
    def num_captures(self) -> int:
        """Captures of the whole plan."""
        return self.num_prompts * self.epochs

    @property
    def num_uses(self) -> int:
        """Uses of the whole plan."""
        return self.num_captures * self.reuse


class HeaderLine(Record):
    """First line of a ledger."""

    plan: PlanHeader


class SkipLine(Record):
    """Uses that will never be trained, and why."""

    skip: str
    uses: tuple[int, ...]
    detail: str = ""


class StepLine(Record):
    """The uses that one optimizer step trained, over all ranks, ascending."""

    step: int
    generation: int
    uses: tuple[int, ...]
    num_tokens: int


class CaptureLine(Record):
    """One committed capture."""

    capture: int = Field(ge=0)
    prompt: int = Field(ge=0)
    attempt: int = Field(ge=0, lt=MAX_ATTEMPT)
    reason: str
    num_tokens: int
    num_bytes: int
    dtype: WireDtype | None = None
    """As which its features travelled; logs of before version 2 of the wire do not say."""


class LedgerSummary(Record):
    """The ledger in numbers: uses, and captures.

    `captured` counts all captures, those made again included; `recaptured` only the latter. `balanced` is true exactly
    when the logs have no fault; `problems` lists the first faults and is no part of a dump.
    """

    planned: int
    trained: int
    skipped: int
    not_reached: int
    captured: int
    recaptured: int
    balanced: bool
    problems: tuple[str, ...] = Field((), exclude=True)


class Ledger:
    """What became of each use so far: a byte a use, and the lines of the file."""

    def __init__(self, plan: PlanHeader) -> None:
        self.plan = plan
        self.last_step = 0
        """Optimizer steps done; the next is one more."""
        self.num_trained = 0
        self.num_tokens_trained = 0
        self.skipped: dict[str, int] = {}
        """Uses skipped, by reason."""
        self.skip_examples: dict[str, str] = {}
        """The first skip of each reason."""
        self._state = bytearray(plan.num_uses)
        self._skip_lines: list[str] = []
        self._step_lines: list[str] = []

    @classmethod
    def resume(cls, text: str, plan: PlanHeader, *, origin: str) -> Ledger:
        """Read the ledger of a checkpoint.

        Args:
            text: The file's content.
            plan: What the run plans now; must be what the ledger counts.
            origin: Names the file in errors.

        Raises:
            CheckpointError: A line is malformed or contradicts another, or the plan is another one.
        """
        ledger: Ledger | None = None
        for number, line in enumerate(lines_of(text), start=1):
            try:
                entry = parse_entry(line)
                if isinstance(entry, HeaderLine) != (ledger is None):
                    raise ReplayError("the plan must be the first line, and only that")
                if isinstance(entry, HeaderLine):
                    if entry.plan != plan:
                        raise CheckpointError(
                            f"{origin} counts the uses of another plan: {_differences(entry.plan, plan)}. "
                            "Resume with the prompts that the run began with, or begin in a new output directory."
                        )
                    ledger = cls(plan)
                elif isinstance(entry, StepLine) and ledger is not None:
                    ledger.add_step(entry)
                elif isinstance(entry, SkipLine) and ledger is not None:
                    ledger.skip(entry.uses, entry.skip, entry.detail)
            except ReplayError as error:
                raise CheckpointError(f"{origin}:{number}: {error}") from error
        if ledger is None:
            raise CheckpointError(f"{origin} is empty: a ledger begins with its plan")
        return ledger

    def open_ks(self, capture: int) -> tuple[int, ...]:
        """The k of a capture's open uses, ascending."""
        first = capture * self.plan.reuse
        return tuple(k for k in range(self.plan.reuse) if self._state[first + k] == OPEN)

    def is_open(self, use: int) -> bool:
        """Whether a use is neither trained nor skipped."""
        return self._state[use] == OPEN

    def has_trained(self, uses: Sequence[int]) -> bool:
        """Whether all these uses are trained."""
        return all(0 <= use < len(self._state) and self._state[use] == TRAINED for use in uses)

    def open_uses(self) -> list[int]:
        """All open uses."""
        return [use for use, state in enumerate(self._state) if state == OPEN]

    def check_uses(self, uses: Sequence[int]) -> None:
        """Raise unless all these uses can be trained.

        Raises:
            ReplayError: A use is out of the plan's range, named twice, trained already, or skipped.
        """
        for use in uses:
            if not 0 <= use < len(self._state):
                raise ReplayError(f"use {use} is outside the plan's {len(self._state)} uses")
            if self._state[use] != OPEN:
                raise ReplayError(f"use {use} is {'trained' if self._state[use] == TRAINED else 'skipped'} already")
        if len(set(uses)) != len(uses):
            raise ReplayError(f"use {_first_repeat(uses)} is named twice")

    def add_step(self, line: StepLine) -> None:
        """Note a finished optimizer step.

        Raises:
            ReplayError: It is not the next step, or a use cannot be trained. Nothing is changed.
        """
        if line.step != self.last_step + 1:
            raise ReplayError(f"step {line.step} follows step {self.last_step}: one is missing or there twice")
        self.check_uses(line.uses)
        for use in line.uses:
            self._state[use] = TRAINED
        self.last_step = line.step
        self.num_trained += len(line.uses)
        self.num_tokens_trained += line.num_tokens
        self._step_lines.append(line.model_dump_json())

    def skip(self, uses: Sequence[int], reason: str, detail: str = "") -> None:
        """Note that uses will never be trained.

        Raises:
            ReplayError: One is out of range, trained, or skipped already. Nothing is changed.
        """
        self.check_uses(uses)
        for use in uses:
            self._state[use] = SKIPPED
        self.skipped[reason] = self.skipped.get(reason, 0) + len(uses)
        self.skip_examples.setdefault(reason, detail)
        self._skip_lines.append(SkipLine(skip=reason, uses=tuple(uses), detail=detail).model_dump_json())

    def text(self, step: int) -> str:
        """The ledger as a checkpoint after this step keeps it: what was skipped so far and the steps up to it."""
        if step > self.last_step:
            raise ReplayError(f"the ledger ends at step {self.last_step}, before step {step}")
        lines = [HeaderLine(plan=self.plan).model_dump_json(), *self._skip_lines, *self._step_lines[:step]]
        return "\n".join(lines) + "\n"


def audit(ledger: Iterable[str], captures: Iterable[str]) -> LedgerSummary:
    """Count a run from its logs alone and look for anything that does not add up.

    Args:
        ledger: Lines of a checkpoint's ledger.
        captures: Lines of the capture log.
    """
    audits = _Audit()
    audits.read_ledger(ledger)
    audits.read_captures(captures)
    return audits.summary()


class _Audit:
    def __init__(self) -> None:
        self._plan: PlanHeader | None = None
        self._state = bytearray()
        self._num_trained = 0
        self._num_skipped = 0
        self._num_captured = 0
        self._num_recaptured = 0
        self._problems: list[str] = []
        self._num_problems = 0

    def read_ledger(self, lines: Iterable[str]) -> None:
        last_step = 0
        for number, entry in self._parse(lines, "ledger", parse_entry):
            if isinstance(entry, HeaderLine):
                self._begin(entry.plan, number)
            elif self._plan is None:
                self._fault(f"ledger line {number}: comes before the plan")
            elif isinstance(entry, StepLine):
                if entry.step != last_step + 1:
                    self._fault(f"ledger line {number}: step {entry.step} follows step {last_step}")
                last_step = entry.step
                self._num_trained += self._settle(entry.uses, TRAINED, f"step {entry.step}")
            else:
                self._num_skipped += self._settle(entry.uses, SKIPPED, f"skip {entry.skip!r}")
        if self._plan is None:
            self._fault("the ledger has no plan")

    def read_captures(self, lines: Iterable[str]) -> None:
        num_captures = self._plan.num_captures if self._plan else 0
        attempts: dict[int, int] = {}
        for number, line in self._parse(lines, "capture log", CaptureLine.model_validate_json):
            where = f"capture log line {number}: capture {line.capture}"
            if line.capture >= num_captures:
                self._fault(f"{where} is outside the plan's {num_captures} captures")
                continue
            before = attempts.get(line.capture)
            if before is None and line.reason != FIRST:
                self._fault(f"{where} was made again ({line.reason}) without a first time")
            if before is not None and line.reason == FIRST:
                self._fault(f"{where} is called the first, but it is there before")
            if before is not None and line.attempt <= before:
                self._fault(f"{where} has attempt {line.attempt} after attempt {before}")
            attempts[line.capture] = line.attempt
            self._num_captured += 1
            self._num_recaptured += before is not None
        reuse = self._plan.reuse if self._plan else 1
        for use, state in enumerate(self._state):
            if state == TRAINED and use // reuse not in attempts:
                self._fault(f"use {use} was trained, but its capture {use // reuse} was never made")

    def summary(self) -> LedgerSummary:
        planned = len(self._state)
        problems = tuple(self._problems)
        if self._num_problems > len(problems):
            problems += (f"and {self._num_problems - len(problems)} more",)
        return LedgerSummary(
            planned=planned,
            trained=self._num_trained,
            skipped=self._num_skipped,
            not_reached=self._state.count(OPEN),
            captured=self._num_captured,
            recaptured=self._num_recaptured,
            balanced=not problems,
            problems=problems,
        )

    def _begin(self, plan: PlanHeader, number: int) -> None:
        if self._plan is not None:
            self._fault(f"ledger line {number}: a second plan")
            return
        self._plan = plan
        self._state = bytearray(plan.num_uses)

    def _settle(self, uses: Sequence[int], state: int, what: str) -> int:
        """Give uses their end; returns how many had none before."""
        settled = 0
        for use in uses:
            if not 0 <= use < len(self._state):
                self._fault(f"{what}: use {use} is outside the plan's {len(self._state)} uses")
            elif self._state[use] != OPEN:
                before = "trained" if self._state[use] == TRAINED else "skipped"
                self._fault(f"{what}: use {use} was {before} before")
            else:
                self._state[use] = state
                settled += 1
        return settled

    def _parse(self, lines: Iterable[str], name: str, parse: Any) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, parse(line)
            except (ReplayError, ValidationError) as error:
                fault = first_fault(error) if isinstance(error, ValidationError) else error
                self._fault(f"{name} line {number}: {fault}")

    def _fault(self, message: str) -> None:
        self._num_problems += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(message)


def lines_of(text: str) -> list[str]:
    """The lines of a ledger: only a line feed ends one, since a detail may hold what else ends lines elsewhere."""
    *lines, rest = text.split("\n")
    return [*lines, rest] if rest else lines


def parse_entry(line: str) -> HeaderLine | SkipLine | StepLine:
    """Read one line of a ledger.

    Raises:
        ReplayError: It is not JSON or of no known kind.
    """
    try:
        value = read_json(line)
    except ValueError as error:
        raise ReplayError(f"not JSON: {error}") from error
    kinds: dict[str, type[HeaderLine | SkipLine | StepLine]] = {"plan": HeaderLine, "skip": SkipLine, "step": StepLine}
    kind = next((kinds[key] for key in kinds if isinstance(value, dict) and key in value), None)
    if kind is None:
        raise ReplayError("not a line of a ledger: it names no plan, skip or step")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ReplayError(first_fault(error)) from error


def _differences(then: PlanHeader, now: PlanHeader) -> str:
    before, after = then.model_dump(), now.model_dump()
    return ", ".join(f"{key} was {before[key]} and is {after[key]}" for key in before if before[key] != after[key])


def _first_repeat(uses: Sequence[int]) -> int:
    seen: set[int] = set()
    for use in uses:
        if use in seen:
            return use
        seen.add(use)
    raise ValueError("no repeat")
