"""What decoding one benchmark sample recorded, and the file of such records that an evaluation goes on from. No torch.

<output_dir>/evaluation.json   the settings; another evaluation is refused in this folder
<output_dir>/records.jsonl     one record a line, appended as each sample ends
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter

from evaluation.report import Divergence
from evaluation.timing import Timing
from services.append_log import open_append_log
from services.contracts import Record
from services.errors import OutputDirError
from services.files import SUFFIX, replace_text
from services.reading import first_fault, read_json

SETTINGS_FILE = "evaluation.json"
RECORDS_FILE = "records.jsonl"

SampleKey = tuple[str, int]
"""Task and index of a sample."""


class SampleRecord(Record):
    """One sample, decoded speculatively. Tuples have one entry a round.

    Attributes:
        kind: Of the line.
        task: Name of the task.
        domain: math, code, chat, or own.
        index: Of the sample in its task, after the shuffle.
        prompt_hash: `hash_of` its prompt.
        num_prompt_tokens: Length of the prompt.
        seed: Of its random numbers.
        accepted_lengths: Tokens committed, the bonus token included.
        proposal_lengths: Tokens verified; in a round that a drafted stop token ended, those up to and including it.
        accepted_draft_lengths: Drafts kept, the bonus token excluded.
        confidence: Logits of each drafted token's acceptance given that those before it are accepted, for the whole
            proposal before any cut; None where the drafter has no confidence head.
        output_hash: `hash_of` the new tokens.
        timing: Its share of the wall time: what each step took, divided evenly among the samples that were in it.
    """

    kind: Literal["sample"] = "sample"
    task: str
    domain: str
    index: int
    prompt_hash: str
    num_prompt_tokens: int
    seed: int
    accepted_lengths: tuple[int, ...]
    proposal_lengths: tuple[int, ...]
    accepted_draft_lengths: tuple[int, ...]
    confidence: tuple[tuple[float, ...], ...] | None = None
    output_hash: str
    timing: Timing

    @property
    def key(self) -> SampleKey:
        """Which sample this is."""
        return self.task, self.index

    @property
    def num_new_tokens(self) -> int:
        """New tokens, cut to the limit and after a stop token."""
        return self.timing.num_tokens

    @property
    def survival(self) -> list[list[float]] | None:
        """What the drafter took for the probability that the prefix up to each drafted token is accepted, by round."""
        if self.confidence is None:
            return None
        return [list(accumulate(map(sigmoid, logits), mul)) for logits in self.confidence]


class PlainRecord(Record):
    """The same sample, decoded by the target alone: what the speedup is measured against.

    Attributes:
        divergence: Where the speculative greedy output left this one; None where it did not, above temperature 0, and
            where the two were not decoded in one go.
    """

    kind: Literal["plain"] = "plain"
    task: str
    index: int
    prompt_hash: str
    output_hash: str
    timing: Timing
    divergence: Divergence | None = None

    @property
    def key(self) -> SampleKey:
        """Which sample this is."""
        return self.task, self.index


AnyRecord = Annotated[SampleRecord | PlainRecord, Field(discriminator="kind")]
_LINE: TypeAdapter[SampleRecord | PlainRecord] = TypeAdapter(AnyRecord)


class RecordLog:
    """The records of one evaluation; a context manager that holds its folder for this process.

    Attributes:
        folder: Where the evaluation lies.
        samples: Speculative records by sample.
        plain: Plain records by sample.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a folder, or begin one.

        Args:
            folder: Made if need be.
            settings: JSON values that determine the records; all must be those that the folder was begun with.

        Raises:
            OutputDirError: It holds another evaluation or other things, a line of it is spoiled, or another process
                is at work in it.
        """
        self.folder = folder
        self.samples: dict[SampleKey, SampleRecord] = {}
        self.plain: dict[SampleKey, PlainRecord] = {}
        _claim_settings(folder, settings)
        path = folder / RECORDS_FILE
        try:
            self._file = open_append_log(path, alone=True)
        except BlockingIOError as error:
            raise OutputDirError(
                f"another process is evaluating in {folder}: wait for it, or choose another --output-dir"
            ) from error
        try:
            self._read(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, record: SampleRecord | PlainRecord) -> None:
        """Append a record; from now on a crash of this process does not lose it."""
        self._file.write(record.model_dump_json(exclude_none=True).encode() + b"\n")
        self._file.flush()
        self._keep(record)

    def _keep(self, record: SampleRecord | PlainRecord) -> None:
        if isinstance(record, SampleRecord):
            self.samples[record.key] = record
        else:
            self.plain[record.key] = record

    def _read(self, path: Path) -> None:
        for record in read_records(path):
            self._keep(record)


def read_records(path: Path) -> list[SampleRecord | PlainRecord]:
    """The records of a file.

    Raises:
        OutputDirError: A line is none.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(_LINE.validate_python(read_json(line)))
        except ValueError as error:
            raise OutputDirError(
                f"{path}:{number}: no record of an evaluation: {first_fault(error)}. Take the line out: its sample is "
                "decoded again"
            ) from error
    return records


def hash_of(token_ids: Sequence[int]) -> str:
    """A short name of a sequence of tokens; equal sequences alone have equal ones."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:16]


def sigmoid(logit: float) -> float:
    """1 / (1 + e^−x), for any x."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[str]:
    """Names of the settings whose values are not the same on both sides."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _claim_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputDirError(f"cannot make the folder {folder}: {error}. Choose another --output-dir") from error
    if not path.exists():
        if others := sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(SUFFIX)):
            raise OutputDirError(
                f"{folder} holds files that are no evaluation ({', '.join(others[:3])}): choose another --output-dir"
            )
        replace_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        saved = read_json(path.read_bytes())
        if not isinstance(saved, dict):
            raise ValueError(f"a JSON {type(saved).__name__}, not an object")
    except ValueError as error:
        raise OutputDirError(
            f"{path} does not say what was evaluated: {first_fault(error)}. Choose another --output-dir"
        ) from error
    if changed := differences(settings, saved):
        said = "; ".join(f"{name} was {saved.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise OutputDirError(
            f"{folder} holds an evaluation with other settings: {said}. Choose another --output-dir, or repeat the "
            "command that began it to go on with it"
        )
