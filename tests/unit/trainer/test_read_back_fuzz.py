"""Files of a run that somebody or something has spoiled: read back, or refused naming file and line; nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evaluation.report import Report
from evaluation.weights import weights_digest
from services.answers import AnswerBook, AnswerWriter
from services.control.client import BEACON, read_beacon
from services.errors import CheckpointError, OutputDirError, PromptError, SlipstreamError, UsageError
from services.prompts.capture_log import CaptureLog
from services.prompts.ledger import Ledger, PlanHeader, StepLine, audit, lines_of
from services.prompts.lives import count_life
from services.prompts.plan import MAX_USES, Plan
from trainer.commands.dashboard import _run_id
from trainer.evaluations import Evaluations
from trainer.output import OutputDir, claim_output_dir
from trainer.recipe import build_recipe
from trainer.submission import last_json_line
from trainer.training_state import FIGURES, FOLDER, read_figures

EXAMPLES = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
DEEP = b"[" * 100_000
PLAN = PlanHeader(num_prompts=3, epochs=2, reuse=2, seed=1, digest="d")


def sound_ledger() -> bytes:
    ledger = Ledger(PLAN)
    ledger.skip([4, 5], "too long", "chats.jsonl:3: 99 tokens")
    ledger.add_step(StepLine(step=1, generation=0, uses=(0, 2), num_tokens=20))
    ledger.add_step(StepLine(step=2, generation=0, uses=(1, 3), num_tokens=20))
    return ledger.text(2).encode()


REPORT = {
    "label": "step_3", "checkpoint": "/run/step_3", "temperature": 0.0, "accepted_length": 2.0, "interval": [1.5, 2.5],
    "accept_rate": [0.5], "cond_accept_rate": [None], "draft_tokens_per_proposal": 1.0, "verify_rate": 0.5,
    "num_samples": 1, "num_rounds": 2, "num_tokens": 4, "seconds": 0.1, "lossless": True, "first_divergence": None,
}  # fmt: skip
CAPTURE = {"capture": 3, "prompt": 2, "attempt": 0, "reason": "first", "num_tokens": 5, "num_bytes": 99}
RECORD = {"run_id": "demo-1", "attempt": 2, "generation": 3, "identity": {"target": "org/target", "seed": 1}}
SOUND = {
    "ledger": sound_ledger(),
    "captures": b"".join(json.dumps(CAPTURE | {"capture": number}).encode() + b"\n" for number in range(3)),
    "answers": b'{"prompt":1,"token_ids":[2,3]}\n{"prompt":2,"token_ids":[4]}\n',
    "lives": b"3\n",
    "record": json.dumps(RECORD, indent=2).encode(),
    "summary": b'{"peak_buffer_bytes": 77, "steps": 3}',
    "evaluations": json.dumps({"settings": {}, "report": REPORT}).encode() + b"\n",
    "beacon": b'{"run_id": "demo-1", "ray_address": "a:1", "pid": 7, "has_token": false}',
}

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 12),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -(10**18)]),
    st.floats(),
    st.text(max_size=5),
    st.just("\ud800"),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@st.composite
def spoiled(draw: st.DrawFn, name: str) -> bytes:
    """A sound file with a byte changed, cut, a line doubled or moved, one value replaced, or something else instead."""
    whole = SOUND[name]
    how = draw(st.sampled_from(["byte", "cut", "lines", "value", "value", "value", "bytes", "json", "number"]))
    if how == "byte":
        place = draw(st.integers(0, len(whole) - 1))
        return whole[:place] + bytes([draw(st.integers(0, 255))]) + whole[place + 1 :]
    if how == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if how == "lines":
        return b"".join(draw(st.lists(st.sampled_from(whole.splitlines(keepends=True)), max_size=6)))
    if how == "bytes":
        return draw(st.binary(max_size=60)) + b"\n"
    if how == "json":
        return json.dumps(draw(values)).encode() + b"\n"
    if how == "number":
        return str(draw(leaves)).encode("utf-8", "backslashreplace") + b"\n"
    lines = [whole] if name == "record" else whole.splitlines(keepends=True)
    chosen = draw(st.integers(0, len(lines) - 1))
    record = json.loads(lines[chosen])
    holder = record
    while True:
        if not isinstance(holder, dict) or not holder:
            return json.dumps(draw(values)).encode() + b"\n"
        key = draw(st.sampled_from(sorted(holder)))
        if isinstance(holder[key], dict) and draw(st.booleans()):
            holder = holder[key]
            continue
        if draw(st.booleans()):
            holder[key] = draw(values)
        else:
            del holder[key]
        break
    lines[chosen] = json.dumps(record).encode() + b"\n"
    return b"".join(lines)


def reads_or_refuses(
    path: Path, content: bytes, read: Callable[[], object], *errors: type[SlipstreamError], has_lines: bool = False
) -> bool:
    """Whether the file is read; else it is refused in one line that names it, and stays as it was."""
    path.write_bytes(content)
    message = None
    try:
        read()
    except errors as error:
        message = str(error)
    if message is None:
        return True
    assert str(path) in message or str(path.parent) in message
    assert "\n" not in message
    assert len(message) < 2000
    if has_lines and "is empty" not in message and "another plan" not in message and "cannot read" not in message:
        assert message.partition(f"{path}:")[2].partition(":")[0].isdecimal(), message
    return False


@EXAMPLES
@given(content=spoiled("ledger"))
@example(content=DEEP)
@example(content=b'{"plan": {"num_prompts": 99999999999999, "epochs": 9, "reuse": 9, "seed": 1, "digest": "d"}}')
def test_ledger_is_resumed_from_or_refused_and_its_audit_never_fails(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    text = content.decode("utf-8", "replace")
    reads_or_refuses(
        path, content, lambda: Ledger.resume(text, PLAN, origin=str(path)), CheckpointError, has_lines=True
    )
    summary = audit(lines_of(text), ())
    assert summary.trained + summary.skipped + summary.not_reached == summary.planned
    assert all("\n" not in problem for problem in summary.problems)


@EXAMPLES
@given(content=spoiled("captures"))
@example(content=DEEP + b"\n")
@example(content=json.dumps(CAPTURE | {"attempt": 2**64 - 1}).encode() + b"\n")
def test_capture_log_is_gone_on_with_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "captures.jsonl"

    def read() -> None:
        with CaptureLog(path, num_captures=6, num_prompts=3) as log:
            log.append(capture=0, prompt=0, attempt=log.next_attempt(0), num_tokens=1, num_bytes=1, why_again="lost")

    reads_or_refuses(path, content, read, CheckpointError, has_lines=True)
    audit(lines_of(SOUND["ledger"].decode()), lines_of(path.read_bytes().decode("utf-8", "replace")))


@EXAMPLES
@given(content=spoiled("answers"))
@example(content=DEEP + b"\n")
@example(content=b'{"prompt":1,"token_ids":[-1]}\n')
@example(content=b'{"prompt":1,"token_ids":[4294967296]}\n')
def test_answers_are_read_or_refused_as_often_as_they_are_asked_for(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    book = AnswerBook(path)
    is_read = reads_or_refuses(path, content, lambda: book.find(1), CheckpointError, has_lines=True)
    assert reads_or_refuses(path, content, lambda: book.find(1), CheckpointError, has_lines=True) == is_read
    if is_read:
        writer = AnswerWriter(path)
        writer.append(7, (8, 9))
        writer.close()
        assert book.find(7) == (8, 9)


@EXAMPLES
@given(content=spoiled("lives"))
@example(content=b"-3")
@example(content=b"\xff")
@example(content="１２".encode())
@example(content=b"9" * 5000)
def test_lives_are_counted_on_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lives"
    if reads_or_refuses(path, content, lambda: count_life(path), CheckpointError):
        assert path.read_text() == f"{int(content.decode().strip()) + 1}\n"
    else:
        assert path.read_bytes() == content


def a_recipe(output_dir: Path):
    return build_recipe({"target": {"model": "m"}, "prompts": {"source": "p"}, "output_dir": str(output_dir)}, "test")


@EXAMPLES
@given(content=spoiled("record"))
@example(content=DEEP)
@example(content=json.dumps(RECORD | {"attempt": "2"}).encode())
@example(content=json.dumps(RECORD | {"generation": None}).encode())
def test_record_of_a_run_is_taken_or_refused_and_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"

    def read() -> None:
        with claim_output_dir(a_recipe(tmp_path)) as output:
            output.next_generation()

    assert not reads_or_refuses(path, content, read, OutputDirError), "it is of another run at the least"
    assert path.read_bytes() == content
    assert isinstance(_run_id(tmp_path), str)


def test_record_of_the_same_run_is_gone_on_with_whatever_else_it_holds(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path)
    record = RECORD | {"identity": recipe.identity(), "of_a_later_version": 1}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with claim_output_dir(recipe) as output:
        assert (output.run_id, output.attempt, output.next_generation()) == ("demo-1", 3, 4)


@EXAMPLES
@given(content=spoiled("summary"))
@example(content=DEEP)
@example(content=b'{"peak_buffer_bytes": NaN}')
def test_summary_gives_its_peak_or_is_refused(tmp_path: Path, content: bytes) -> None:
    output = OutputDir(tmp_path, "demo-1", 1)
    reads_or_refuses(output.summary, content, output.earlier_peak_bytes, OutputDirError)


@EXAMPLES
@given(content=spoiled("evaluations"))
@example(content=DEEP)
@example(content=b"\n")
def test_results_of_decoding_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evaluations.jsonl"
    reads_or_refuses(
        path, content, lambda: Evaluations(a_recipe(tmp_path), "target", path), CheckpointError, has_lines=True
    )


def test_spoiled_result_of_these_settings_is_refused_by_its_field(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(b"")
    own = Evaluations(a_recipe(tmp_path), "target", path)._settings
    checkpoint = tmp_path / "step_3"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).touch()
    found = REPORT | {"weights": weights_digest(checkpoint)}
    path.write_text(json.dumps({"settings": own, "num_samples": 4, "report": found}) + "\n")
    reported = Evaluations(a_recipe(tmp_path), "target", path).report(checkpoint, 4)
    assert reported == Report.model_validate(found)
    for spoiled_field in ({"seconds": "long"}, {"label": "best"}):
        path.write_text(json.dumps({"settings": own, "num_samples": 4, "report": found | spoiled_field}) + "\n")
        (name,) = spoiled_field
        with pytest.raises(CheckpointError, match=rf"evaluations\.jsonl:1: no result of decoding: {name}: "):
            Evaluations(a_recipe(tmp_path), "target", path)


@EXAMPLES
@given(content=spoiled("beacon"))
@example(content=DEEP)
def test_place_of_a_running_job_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    reads_or_refuses(tmp_path / BEACON, content, lambda: read_beacon(tmp_path), UsageError)


@EXAMPLES
@given(content=st.one_of(st.binary(max_size=60), values.map(lambda value: json.dumps(value).encode())))
@example(content=DEEP)
@example(content=b"{}")
def test_figures_of_a_checkpoint_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FOLDER).mkdir(exist_ok=True)
    assert not reads_or_refuses(tmp_path / FOLDER / FIGURES, content, lambda: read_figures(tmp_path), CheckpointError)


@pytest.mark.parametrize("line", ['{"a":' * 100_000, "{", '{"a": 1', "\ud800"])
def test_log_that_ends_without_a_summary_has_none(line: str) -> None:
    assert last_json_line(f"x\n{line}\n") is None


def test_line_of_a_ledger_ends_at_a_line_feed_alone() -> None:
    detail = "chats\u2028of\x85mine\x0b.jsonl:3: 99 tokens"
    ledger = Ledger(PLAN)
    ledger.skip([4], "too long", detail)
    again = Ledger.resume(ledger.text(0), PLAN, origin="x")
    assert again.skip_examples == {"too long": detail}
    assert audit(lines_of(ledger.text(0)), ()).balanced


def test_plan_that_no_ledger_can_count_is_refused_with_the_settings_to_change() -> None:
    assert Plan(1000, MAX_USES // 1000, 1, seed=0).num_uses == MAX_USES
    with pytest.raises(PromptError, match=rf"1000 prompts, prompts.epochs {MAX_USES} and replay.reuse 2 make a plan"):
        Plan(1000, MAX_USES, 2, seed=0)


def spoil(lines: Sequence[bytes], number: int, line: bytes) -> bytes:
    return b"".join([*lines[: number - 1], line + b"\n", *lines[number:]])


@pytest.mark.parametrize("line", [b"", b"{", b"\xff", b"[]", b"null", DEEP], ids=lambda line: str(line[:5]))
@pytest.mark.parametrize("name", ["ledger", "captures", "answers"])
def test_spoiled_line_is_named_by_its_number(tmp_path: Path, name: str, line: bytes) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(spoil(SOUND[name].splitlines(keepends=True), 2, line))
    readers: dict[str, Callable[[], object]] = {
        "ledger": lambda: Ledger.resume(path.read_bytes().decode("utf-8", "replace"), PLAN, origin=str(path)),
        "captures": lambda: CaptureLog(path, num_captures=6, num_prompts=3),
        "answers": lambda: AnswerBook(path).find(1),
    }
    with pytest.raises(CheckpointError, match=rf"{name}\.jsonl:2: "):
        readers[name]()
