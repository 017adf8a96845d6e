from __future__ import annotations

import json

import pytest

from services.errors import CheckpointError, ReplayError
from services.prompts.ledger import CaptureLine, Ledger, PlanHeader, StepLine, audit

PLAN = PlanHeader(num_prompts=3, epochs=2, reuse=2, seed=1, digest="d")  # 6 captures, 12 uses


def step(number: int, *uses: int, generation: int = 0) -> StepLine:
    return StepLine(step=number, generation=generation, uses=uses, num_tokens=10 * len(uses))


def captured(capture: int, attempt: int = 0, reason: str = "first") -> str:
    line = CaptureLine(capture=capture, prompt=capture % 3, attempt=attempt, reason=reason, num_tokens=10, num_bytes=99)
    return line.model_dump_json()


def sound() -> tuple[list[str], list[str]]:
    """Two steps train captures 0 and 1, the uses of capture 2 are skipped, the others are not reached."""
    ledger = Ledger(PLAN)
    ledger.skip([4, 5], "too long", "chats.jsonl:3: 99 tokens")
    ledger.add_step(step(1, 0, 2))
    ledger.add_step(step(2, 1, 3))
    log = [captured(0), captured(1), captured(3), captured(3, 1, "not trained at step 1, where the run resumed")]
    return ledger.text(2).splitlines(), log


def test_sound_logs_balance():
    summary = audit(*sound())
    assert summary.problems == ()
    assert summary.model_dump() == {
        "planned": 12,
        "trained": 4,
        "skipped": 2,
        "not_reached": 6,
        "captured": 4,
        "recaptured": 1,
        "balanced": True,
    }


def falsify(ledger: list[str], log: list[str], case: str) -> str:
    """Spoil one thing; returns what the audit must say about it."""
    match case:
        case "trained twice":
            ledger[3] = json.dumps(json.loads(ledger[3]) | {"uses": [1, 2]})
            return "step 2: use 2 was trained before"
        case "trained twice in one step":
            ledger[3] = json.dumps(json.loads(ledger[3]) | {"uses": [1, 1]})
            return "step 2: use 1 was trained before"
        case "missing step":
            del ledger[2]
            return "ledger line 3: step 2 follows step 0"
        case "step there twice":
            ledger.append(json.dumps({"step": 2, "generation": 0, "uses": [6], "num_tokens": 1}))
            return "step 2 follows step 2"
        case "never captured":
            del log[1]
            return "use 2 was trained, but its capture 1 was never made"
        case "out of range":
            ledger[3] = json.dumps(json.loads(ledger[3]) | {"uses": [12]})
            return "use 12 is outside the plan's 12 uses"
        case "negative":
            ledger[3] = json.dumps(json.loads(ledger[3]) | {"uses": [-1]})
            return "use -1 is outside"
        case "skipped and trained":
            ledger[1] = json.dumps(json.loads(ledger[1]) | {"uses": [0]})
            return "step 1: use 0 was skipped before"
        case "skipped twice":
            ledger.append(ledger[1])
            return "use 4 was skipped before"
        case "no plan":
            del ledger[0]
            return "the ledger has no plan"
        case "second plan":
            ledger.append(ledger[0])
            return "a second plan"
        case "not json":
            ledger[2] = ledger[2][:-5]
            return "ledger line 3: not JSON"
        case "unknown line":
            ledger.append('{"stop": 3}')
            return "names no plan, skip or step"
        case "unknown field":
            ledger[2] = json.dumps(json.loads(ledger[2]) | {"balanced": True})
            return "ledger line 3: balanced: Extra inputs are not permitted"
        case "capture out of range":
            log.append(captured(6))
            return "capture 6 is outside the plan's 6 captures"
        case "again without a first time":
            log.append(captured(4, 0, "lost"))
            return "capture 4 was made again (lost) without a first time"
        case "first twice":
            log.append(captured(0, 1))
            return "capture 0 is called the first, but it is there before"
        case "attempt twice":
            log.append(captured(3, 1, "lost"))
            return "capture 3 has attempt 1 after attempt 1"
        case "torn capture":
            log.append('{"capture": 5')
            return "capture log line 5: "
    raise AssertionError(case)


CASES = [
    *("trained twice", "trained twice in one step", "missing step", "step there twice", "never captured"),
    *("out of range", "negative", "skipped and trained", "skipped twice", "no plan", "second plan", "not json"),
    *("unknown line", "unknown field", "capture out of range", "again without a first time", "first twice"),
    *("attempt twice", "torn capture"),
]


@pytest.mark.parametrize("case", CASES)
def test_falsified_log_does_not_balance(case):
    ledger, log = sound()
    expected = falsify(ledger, log, case)
    summary = audit(ledger, log)
    assert not summary.balanced
    assert any(expected in problem for problem in summary.problems), summary.problems


@pytest.mark.parametrize("case", ["trained twice", "skipped and trained", "out of range", "missing step"])
def test_falsified_log_still_counts_every_use_once(case):
    ledger, log = sound()
    falsify(ledger, log, case)
    summary = audit(ledger, log)
    assert summary.trained + summary.skipped + summary.not_reached == summary.planned == 12


def test_many_problems_are_counted_but_not_all_listed():
    ledger, log = sound()
    summary = audit([*ledger, *["?"] * 30], log)
    assert len(summary.problems) == 21
    assert summary.problems[-1] == "and 10 more"


def test_resume_gives_the_ledger_back_as_it_was_at_the_step():
    ledger = Ledger(PLAN)
    ledger.skip([4, 5], "too long", "line 3")
    ledger.add_step(step(1, 0, 2))
    ledger.add_step(step(2, 1))
    again = Ledger.resume(ledger.text(1), PLAN, origin="x")
    assert (again.last_step, again.num_trained, again.num_tokens_trained) == (1, 2, 20)
    assert again.skipped == {"too long": 2}
    assert again.skip_examples == {"too long": "line 3"}
    assert again.open_uses() == [1, 3, 6, 7, 8, 9, 10, 11]
    assert again.open_ks(0) == (1,)
    assert again.text(1) == ledger.text(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "x is empty"),
        (lambda text: text.replace('"digest":"d"', '"digest":"e"'), "digest was e and is d"),
        (lambda text: text.replace('"seed":1', '"seed":2'), "seed was 2 and is 1"),
        (lambda text: text[:-3], "x:3: not JSON"),
        (lambda text: text + text.splitlines()[-1], "x:4: step 1 follows step 1"),
        (lambda text: text + text.splitlines()[1], "x:4: use 4 is skipped already"),
        (lambda text: "\n".join(text.splitlines()[1:]), "x:1: the plan must be the first line"),
        (lambda text: text.splitlines()[0] + "\n" + text, "x:2: the plan must be the first line"),
    ],
)
def test_broken_ledger_is_refused_on_resume(spoil, message):
    ledger = Ledger(PLAN)
    ledger.skip([4], "too long")
    ledger.add_step(step(1, 0))
    with pytest.raises(CheckpointError, match=message):
        Ledger.resume(spoil(ledger.text(1)), PLAN, origin="x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (step(3, 4), "step 3 follows step 1"),
        (step(1, 4), "step 1 follows step 1"),
        (step(2, 4, 0), "use 0 is trained already"),
        (step(2, 1), "use 1 is skipped already"),
        (step(2, 4, 4), "use 4 is named twice"),
        (step(2, 12), "use 12 is outside the plan's 12 uses"),
    ],
)
def test_impossible_step_is_refused_and_changes_nothing(line, message):
    ledger = Ledger(PLAN)
    ledger.add_step(step(1, 0))
    ledger.skip([1], "tail")
    before = ledger.text(1)
    with pytest.raises(ReplayError, match=message):
        ledger.add_step(line)
    assert ledger.text(1) == before
    assert ledger.last_step == 1
    assert 4 in ledger.open_uses()


def test_text_of_a_step_to_come_is_refused():
    with pytest.raises(ReplayError, match="ends at step 0, before step 1"):
        Ledger(PLAN).text(1)
