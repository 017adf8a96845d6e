"""The coordinator against a real Redis: a stand-in shard commits what it takes, stand-in ranks train it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from replaying import put_chunk
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from waiting import wait_until

from services.answers import AnswerWriter
from services.contracts import CaptureJob, Chunk, LastRows, Outcome, Sample, StepLease, StepReport, TableSignature
from services.errors import (
    CheckpointError,
    DeadlineError,
    PausedError,
    PromptError,
    ReplayError,
    ReplayUnavailableError,
    StaleGenerationError,
)
from services.prompts.config import PromptsConfig
from services.prompts.coordinator import Coordinator, CoordinatorSettings
from services.prompts.intake import Intake
from services.prompts.ledger import audit
from services.replay.connect import connect
from services.replay.embedded import EmbeddedRedis
from services.replay.table import Admission, RedisTable
from services.replay.work import WorkQueue
from trainer.account import Account

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIGNATURE = TableSignature(fingerprint="f", layer_ids=(1,), hidden_size=4, dtype="bf16")
CAPACITY_BYTES = 64 * 1024
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    embedded = EmbeddedRedis.start(tmp_path_factory.mktemp("redis"), CAPACITY_BYTES)
    yield embedded.url
    embedded.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    vocab = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def write_prompts(path: Path, count: int, *extra: bytes) -> str:
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "x" * 20}]}
        ).encode()
        for i in range(count)
    ]
    path.write_bytes(b"\n".join([*lines, *extra]) + b"\n")
    return str(path)


def answer_of(prompt: int) -> tuple[int, ...]:
    """What the target answers: prompt 3 too little to learn from."""
    return (7,) if prompt == 3 else (prompt, 8, 9, 10, 11)


@dataclass
class Run:
    """One run's table, queue and prompts; coordinators come and go."""

    url: str
    prefix: str
    model: str
    folder: Path
    table: RedisTable
    queue: WorkQueue
    source: str
    open: list[Coordinator]
    num_answered: int = 0
    accounts: tuple[Account, Account] = field(default_factory=lambda: (Account(0, 1), Account(1, 1)))

    def start(
        self, *, ledger: str | None = None, generation: int = 1, own_answers: bool = False, **changes: Any
    ) -> Coordinator:
        prompts = {
            "source": self.source,
            "min_loss_tokens": 4,
            "system_prompt": None,
            "answers": "target" if own_answers else "dataset",
        } | {key: changes.pop(key) for key in [*changes] if key in PromptsConfig.model_fields}
        settings = {
            "reuse": 1,
            "last_rows": LastRows.BETWEEN,
            "world_size": 2,
            "micro_batch_size": 1,
            "accumulation": 2,
            "max_steps": None,
            "deterministic": False,
            "tail": "pad",
            "signature": SIGNATURE,
            "lookahead_captures": 4,
            "capture_log": str(self.folder / "captures.jsonl"),
            "answers": str(self.folder / "answers.jsonl"),
            "lives": str(self.folder / "lives"),
            "ledger": ledger,
            "generation": generation,
        } | changes
        if not settings.get("joins"):
            self.table.destroy()
            self.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=settings["reuse"])
            self.table.set_generation(generation)
        coordinator = Coordinator(
            PromptsConfig.model_validate(prompts),
            self.model,
            self.url,
            self.prefix,
            CoordinatorSettings.model_validate(settings),
        )
        self.open.append(coordinator)
        return coordinator

    def capture_one(self) -> CaptureJob | None:
        """Do a shard's work for the oldest job, if there is one and the buffer has room."""
        job = self.queue.take(time.time(), 60)
        return self.capture(job) if job is not None else None

    def capture(self, job: CaptureJob) -> CaptureJob | None:
        """Do a shard's work for a job that was taken; without room it is given back."""
        if self.table.admit(job, SIGNATURE.reserved_bytes(job), time.time()) is Admission.FULL:
            self.queue.give_back(job)
            return None
        if job.generate is not None:
            self.num_answered += 1
            answer = answer_of(job.prompt)
            AnswerWriter(self.folder / "answers.jsonl").append(job.prompt, answer)
            if len(answer) < job.generate.min_new_tokens:
                self.table.abandon(
                    job, Outcome(capture=job.capture, attempt=job.attempt, kind="failed", retry=True, reason="short")
                )
                return None
            job = job.answered(answer)
        num_bytes = SIGNATURE.sample_bytes(job.num_tokens, len(job.last_rows))
        sizes = {"context": (job.num_tokens, 8), "last": (len(job.last_rows), 8)}
        chunks = []
        for index, (tensor, (rows, row_bytes)) in enumerate(sizes.items()):
            chunk = Chunk(tensor=tensor, row_start=0, row_end=rows, num_bytes=rows * row_bytes, crc32c=0)
            put_chunk(self.table, job, index, bytes(chunk.num_bytes))
            chunks.append(chunk)
        self.table.commit(Sample(job=job, chunks=tuple(chunks), num_bytes=num_bytes, target="t"), time.time())
        return job

    def train_step(self, coordinator: Coordinator, lease: StepLease, *, generation: int = 1) -> list[int]:
        """Capture and train what a step lease grants, on every rank; returns the uses."""
        reports = self.train_unreported(lease, generation=generation)
        for report in reports:
            coordinator.step_done(report)
        return sorted(use for report in reports for use in report.uses)

    def train_unreported(self, lease: StepLease, *, generation: int = 1) -> list[StepReport]:
        """Capture and train what a step lease grants; each rank's report is in its account."""
        uses: list[list[int]] = [[], []]
        for account in self.accounts:
            account.grant(lease)
        for micro_batch in range(lease.num_micro_batches):
            for rank in range(2):
                captures = None if lease.captures is None else lease.captures[rank][micro_batch]
                uses[rank] += self._train(rank, generation, captures)
        reports = [
            StepReport(step=lease.step, rank=rank, generation=generation, uses=tuple(done), num_tokens=10 * len(done))
            for rank, done in enumerate(uses)
        ]
        for account, report in zip(self.accounts, reports, strict=True):
            account.report(report)
        return reports

    def join(self, coordinator: Coordinator, generation: int = 1) -> None:
        """Give both ranks' accounts as soon as they are wanted."""
        wait_until(lambda: coordinator.wanted(1, generation), "the wish for the ranks' accounts")
        for account in self.accounts:
            coordinator.join(account.answer(coordinator.wanted(1, generation) or ()))

    def _train(self, rank: int, generation: int, captures: tuple[int, ...] | None) -> list[int]:
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            if captures == ():
                return []
            leases = self.table.lease(
                rank=rank, generation=generation, count=1, now_s=time.time(), lease_s=60, captures=captures
            )
            if leases:
                assert self.accounts[rank].hold(leases)
                self.table.ack(leases, generation, time.time())
                return [lease.use for lease in leases]
            if self.capture_one() is None and self.table.info().sealed and self.table.info().num_ready == 0:
                return []
            time.sleep(0.002)
        raise AssertionError(f"no sample came within {DEADLINE_S} s")


@pytest.fixture
def run(redis_url: str, model: str, tmp_path: Path) -> Iterator[Run]:
    client = connect(redis_url)
    prefix = f"test:{tmp_path.name}"
    source = write_prompts(tmp_path / "chats.jsonl", 10)
    run = Run(
        redis_url, prefix, model, tmp_path, RedisTable(client, prefix), WorkQueue(client, prefix), source, open=[]
    )
    yield run
    for coordinator in run.open:
        coordinator.finish()
    run.table.destroy()


def lease_of(coordinator: Coordinator, step: int, generation: int = 1) -> StepLease:
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return coordinator.step_lease(step, generation)
        except DeadlineError:
            if time.monotonic() > deadline_s:
                raise


def test_later_epochs_and_resumed_runs_use_the_answers_of_the_first(run: Run):
    coordinator = run.start(epochs=2, own_answers=True)
    step = 1
    while not (lease := lease_of(coordinator, step)).is_end:
        run.train_step(coordinator, lease)
        step += 1
    summary = coordinator.finish()
    assert summary.balanced
    assert (summary.planned, summary.trained, summary.skipped) == (20, 18, 2)
    assert coordinator.progress().skipped == {"too few loss tokens": 2}
    assert 10 <= run.num_answered < 20  # ten prompts; the second epoch begins before every one is answered

    again = run.start(epochs=2, generation=2, own_answers=True)
    before = run.num_answered
    run.train_step(again, lease_of(again, 1, 2), generation=2)
    assert run.num_answered == before


def test_whole_plan_is_trained_and_balances(run: Run):
    coordinator = run.start(epochs=2)
    trained: list[int] = []
    step = 1
    while not (lease := lease_of(coordinator, step)).is_end:
        trained += run.train_step(coordinator, lease)
        step += 1
    assert step - 1 == 5  # 20 uses, 4 a step
    assert sorted(trained) == list(range(20))
    wait_until(lambda: run.table.info().sealed, "the seal")
    progress = coordinator.progress()
    assert (progress.planned, progress.trained, progress.captured, progress.recaptured) == (20, 20, 20, 0)
    # <start> user\n question_i <end> \n: 1 + 5 + 10 + 2 tokens; <start> assistant\n x… <end> \n: 1 + 10 + 20 + 2.
    assert progress.distinct_tokens == 10 * 51
    assert progress.tokens_captured == 2 * 10 * 51
    assert progress.tokens_trained == 200
    assert progress.ended == "plan exhausted"
    ledger = coordinator.ledger_at(5, timeout_s=DEADLINE_S)
    assert audit(ledger.splitlines(), (run.folder / "captures.jsonl").read_text().splitlines()).balanced
    assert coordinator.finish().model_dump() == {
        "planned": 20,
        "trained": 20,
        "skipped": 0,
        "not_reached": 0,
        "captured": 20,
        "recaptured": 0,
        "balanced": True,
    }


def test_work_queue_is_bounded_and_in_plan_order(run: Run):
    coordinator = run.start(lookahead_captures=3)
    wait_until(lambda: run.queue.size() == 3, "the queue's fill")
    jobs = []
    while len(jobs) < 6:
        job = run.capture_one()
        if job is not None:
            jobs.append(job.capture)
        assert run.queue.size() <= 3
    assert jobs == list(range(6))
    assert coordinator.progress().skipped == {}


def test_deterministic_lease_is_trained_as_named(run: Run):
    coordinator = run.start(deterministic=True)
    lease = lease_of(coordinator, 1)
    assert lease.captures == (((0,), (2,)), ((1,), (3,)))
    assert run.train_step(coordinator, lease) == [0, 1, 2, 3]
    tail = lease_of(coordinator, 3) if run.train_step(coordinator, lease_of(coordinator, 2)) else None
    assert tail is not None
    assert tail.captures == (((8,),), ((9,),))


def test_resume_recaptures_what_the_checkpoint_does_not_have(run: Run):
    first = run.start()
    for step in (1, 2):
        run.train_step(first, lease_of(first, step))
    (run.folder / "ledger.jsonl").write_text(first.ledger_at(1, timeout_s=DEADLINE_S))
    first.finish()  # what a crash leaves is the same: the log is flushed as captures are committed
    captured_before = first._log.num_captured

    second = run.start(ledger=str(run.folder / "ledger.jsonl"), generation=2)
    trained: list[int] = []
    step = 2
    while not (lease := lease_of(second, step, generation=2)).is_end:
        trained += run.train_step(second, lease, generation=2)
        step += 1
    before = json.loads(first.ledger_at(1, timeout_s=DEADLINE_S).splitlines()[-1])["uses"]
    assert sorted([*before, *trained]) == list(range(10))
    summary = second.finish()
    assert summary.balanced, summary.problems
    assert (summary.trained, summary.captured) == (10, captured_before + 6)
    assert summary.recaptured == summary.captured - 10
    reasons = {json.loads(line)["reason"] for line in (run.folder / "captures.jsonl").open()}
    assert reasons == {"first", "not trained at step 1, where the run resumed"}


def test_resume_with_reuse_trains_the_uses_left_of_a_sample_once(run: Run):
    first = run.start(reuse=3)
    run.train_step(first, lease_of(first, 1))
    (run.folder / "ledger.jsonl").write_text(first.ledger_at(1, timeout_s=DEADLINE_S))
    first.finish()
    second = run.start(reuse=3, ledger=str(run.folder / "ledger.jsonl"), generation=2)
    step = 2
    while not (lease := lease_of(second, step, generation=2)).is_end:
        run.train_step(second, lease, generation=2)
        step += 1
    summary = second.finish()
    assert summary.balanced, summary.problems
    assert (summary.trained, summary.not_reached) == (30, 0)


def test_failed_captures_are_retried_then_skipped(run: Run):
    coordinator = run.start()
    failed: list[int] = []

    def fail_first_in_line() -> bool:
        job = run.queue.take(time.time(), 60)
        if job is None:
            return False
        if job.capture != 0:
            run.capture(job)
            return False
        failed.append(job.attempt)
        run.table.abandon(
            job, Outcome(capture=0, attempt=job.attempt, kind="failed", retry=True, reason="no target answered")
        )
        return coordinator.progress().skipped != {}

    wait_until(lambda: fail_first_in_line() or coordinator.progress().skipped != {}, "the skip")
    assert failed == [0, 1, 2, 3, 4]
    assert coordinator.progress().skipped == {"capture failed": 1}
    assert coordinator.progress().skip_examples == {"capture failed": "no target answered after 5 tries"}
    step = 1
    while not (lease := lease_of(coordinator, step)).is_end:
        run.train_step(coordinator, lease)
        step += 1
    summary = coordinator.finish()
    assert (summary.trained, summary.skipped, summary.balanced) == (9, 1, True)


def test_unusable_prompts_are_skipped_and_counted_with_their_lines(run: Run):
    bad = [
        b'{"turns": ["no answer"]}',
        b"{broken",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}]}',
        json.dumps(
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y" * 200}]}
        ).encode(),
        b'{"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "y"}]}',
    ]
    run.source = write_prompts(run.folder / "mixed.jsonl", 4, *bad)
    coordinator = run.start(max_length=100)
    while not (lease := lease_of(coordinator, coordinator.progress().steps_done + 1)).is_end:
        run.train_step(coordinator, lease)
    progress = coordinator.progress()
    assert progress.rejected == 1
    assert progress.rejected_lines[0].startswith(f"{run.source}:6: not JSON")
    assert progress.skipped == {
        "no assistant turn": 1,
        "too few loss tokens": 1,
        "too long": 1,
        "unknown role": 1,
    }
    assert progress.skip_examples["too long"].startswith(f"{run.source}:8: ")
    summary = coordinator.finish()
    assert (summary.planned, summary.trained, summary.skipped, summary.balanced) == (8, 4, 4, True)


def test_lease_waits_no_longer_than_a_second_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    encode = Intake.job
    monkeypatch.setattr(Intake, "job", lambda self, **job: gate.wait(DEADLINE_S) and encode(self, **job))
    coordinator = run.start()
    with pytest.raises(DeadlineError, match="step 1: fewer than 4 uses are encoded after 1 s; ask again"):
        coordinator.step_lease(1, 1)
    gate.set()
    assert lease_of(coordinator, 1).num_micro_batches == 2


def test_ledger_waits_for_every_rank(run: Run):
    coordinator = run.start()
    lease_of(coordinator, 1)
    coordinator.step_done(StepReport(step=1, rank=0, generation=1, uses=(0, 1), num_tokens=20))
    with pytest.raises(DeadlineError, match=r"the ledger of step 1 is not complete after 0.05 s"):
        coordinator.ledger_at(1, timeout_s=0.05)
    text: list[str] = []
    waiting = threading.Thread(target=lambda: text.append(coordinator.ledger_at(1, timeout_s=DEADLINE_S)))
    waiting.start()
    coordinator.step_done(StepReport(step=1, rank=1, generation=1, uses=(2, 3), num_tokens=20))
    waiting.join(DEADLINE_S)
    assert json.loads(text[0].splitlines()[1])["uses"] == [0, 1, 2, 3]
    assert coordinator.ledger_at(0, timeout_s=0).count("\n") == 1


def test_stop_granting_ends_after_the_granted_steps(run: Run):
    coordinator = run.start()
    lease = lease_of(coordinator, 1)
    coordinator.stop_granting()
    assert lease_of(coordinator, 2).is_end
    assert len(run.train_step(coordinator, lease)) == 4
    summary = coordinator.finish()
    assert (summary.trained, summary.not_reached, summary.balanced) == (4, 6, True)


def test_feeder_error_reaches_whoever_asks(run: Run):
    source = Path(run.source)
    coordinator = run.start(epochs=50)
    lease_of(coordinator, 1)
    source.write_bytes(b"x" * source.stat().st_size)  # from now on no line can be read

    def has_raised() -> bool:
        run.capture_one()  # makes room in the queue, so that another line is read
        return coordinator._error is not None

    wait_until(has_raised, "the feeder's error")
    for call in (coordinator.progress, lambda: coordinator.step_lease(2, 1), lambda: coordinator.ledger_at(1, 1)):
        with pytest.raises(PromptError, match="the file was changed"):
            call()


def test_impossible_report_ends_the_run_although_ranks_do_not_wait_for_its_answer(run: Run):
    coordinator = run.start()
    lease_of(coordinator, 1)
    with pytest.raises(ReplayError, match="use 99 is outside"):
        coordinator.step_done(StepReport(step=1, rank=0, generation=1, uses=(99,), num_tokens=1))
    with pytest.raises(ReplayError, match="use 99 is outside"):
        coordinator.step_lease(2, 1)


def test_source_without_usable_prompts_is_an_error(run: Run):
    run.source = write_prompts(run.folder / "none.jsonl", 0, b'{"turns": ["no answer"]}')
    coordinator = run.start()
    with pytest.raises(
        PromptError, match=r"not one conversation .*1 uses no assistant turn \(such as .*none.jsonl:1: there"
    ):
        lease_of(coordinator, 1)


def test_heldout_prompts_end_with_the_generation_prompt(run: Run, model: str):
    heldout = write_prompts(run.folder / "heldout.jsonl", 5)
    coordinator = run.start(heldout=heldout)
    prompts = coordinator.heldout_prompts(3)
    assert len(prompts) == 3
    assert prompts == coordinator.heldout_prompts(5)[:3]
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    ending = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids
    assert all(prompt.token_ids[-len(ending) :] == ending for prompt in prompts)


def test_no_heldout_source_gives_no_prompts(run: Run):
    assert run.start().heldout_prompts(4) == []


def test_training_on_the_heldout_file_is_refused(run: Run):
    with pytest.raises(PromptError, match="are the same file"):
        run.start(heldout=run.source)


def test_ledger_of_other_prompts_is_refused(run: Run):
    first = run.start()
    (run.folder / "ledger.jsonl").write_text(first.ledger_at(0, timeout_s=DEADLINE_S))
    run.source = write_prompts(run.folder / "more.jsonl", 11)
    with pytest.raises(CheckpointError, match="num_prompts was 10 and is 11, digest was"):
        run.start(ledger=str(run.folder / "ledger.jsonl"))
    with pytest.raises(CheckpointError, match="cannot read the ledger"):
        run.start(ledger=str(run.folder / "gone.jsonl"))


def test_redis_that_does_not_answer_is_an_error(run: Run):
    run.url = "redis://127.0.0.1:1/0"
    with pytest.raises(ReplayUnavailableError, match=r"127\.0\.0\.1:1"):
        run.start()


def train_to_the_end(run: Run, coordinator: Coordinator, step: int, generation: int = 1) -> None:
    while not (lease := lease_of(coordinator, step, generation)).is_end:
        run.train_step(coordinator, lease, generation=generation)
        step += 1


def capture_lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "captures.jsonl").read_text().splitlines()]


def test_redis_that_restarted_empty_costs_captures_and_no_use(run: Run):
    coordinator = run.start()
    run.train_step(coordinator, lease_of(coordinator, 1))
    unreported = run.train_unreported(lease_of(coordinator, 2))
    wait_until(run.capture_one, "a capture that is resident, and lost")
    run.table.destroy()
    assert coordinator.wanted(0, 1) is None  # no table, nothing to join
    run.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
    run.join(coordinator)
    assert coordinator.wanted(0, 1) is None
    for report in unreported:  # they come late, and say what the accounts have said
        coordinator.step_done(report)
    train_to_the_end(run, coordinator, 3)
    summary = coordinator.finish()
    assert (summary.trained, summary.not_reached, summary.balanced) == (10, 0, True)
    assert {line["reason"] for line in capture_lines(run)} <= {"first", "Redis restarted empty"}
    again = [line for line in capture_lines(run) if line["reason"] == "Redis restarted empty"]
    assert all(line["attempt"] >= 1000 for line in again)


def test_capture_that_only_a_rank_knows_of_is_logged_when_it_joins(run: Run, monkeypatch: pytest.MonkeyPatch):
    coordinator = run.start()
    lease = lease_of(coordinator, 1)
    monkeypatch.setattr(
        run.table.__class__, "drain_outcomes", lambda self: []
    )  # Redis dies before the coordinator looks
    reports = run.train_unreported(lease)
    run.table.destroy()
    monkeypatch.undo()
    run.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
    run.join(coordinator)
    wait_until(lambda: coordinator.progress().steps_done == 1, "the step that the accounts tell of")
    trained = sorted(use for report in reports for use in report.uses)
    assert sorted(line["capture"] for line in capture_lines(run)[:4]) == trained
    train_to_the_end(run, coordinator, 2)
    assert coordinator.finish().balanced


def test_coordinator_that_was_killed_goes_on_beside_the_ranks(run: Run):
    first = run.start()
    (run.folder / "ledger.jsonl").write_text(first.ledger_at(0, timeout_s=DEADLINE_S))
    run.train_step(first, lease_of(first, 1))
    unreported = run.train_unreported(lease_of(first, 2))
    wait_until(run.capture_one, "a capture that nobody trains on")
    first.finish()  # its feeder ends; nothing of what it knows is handed on
    second = run.start(ledger=str(run.folder / "ledger.jsonl"), joins=True)
    with pytest.raises(DeadlineError, match="begins anew and waits for the accounts of rank 0, 1"):
        second.step_lease(3, 1)
    run.join(second)
    second.step_done(unreported[0])
    assert lease_of(second, 3).num_uses == 2  # the rest of ten
    assert second.progress().steps_done == 2
    train_to_the_end(run, second, 3)
    summary = second.finish()
    assert (summary.trained, summary.not_reached, summary.balanced) == (10, 0, True)
    assert (run.folder / "lives").read_text() == "2\n"


def test_new_trainer_group_begins_at_its_checkpoint_and_the_old_one_is_refused(run: Run):
    coordinator = run.start(epochs=2)
    run.train_step(coordinator, lease_of(coordinator, 1))
    (run.folder / "ledger.jsonl").write_text(coordinator.ledger_at(1, timeout_s=DEADLINE_S))
    run.train_step(coordinator, lease_of(coordinator, 2))
    wait_until(run.capture_one, "a capture that the new group finds dropped")
    jobs: list[CaptureJob] = []  # that a shard has taken and not admitted yet
    wait_until(lambda: jobs.extend(filter(None, [run.queue.take(time.time(), 60)])) or jobs, "a job")
    coordinator.begin_group(2, str(run.folder / "ledger.jsonl"))
    assert run.table.admit(jobs[0], SIGNATURE.reserved_bytes(jobs[0]), time.time(), queued=True) is Admission.GONE
    with pytest.raises(StaleGenerationError):
        coordinator.step_lease(3, 1)
    with pytest.raises(StaleGenerationError):
        coordinator.join(run.accounts[0].answer(("x",)))
    run.accounts = (Account(0, 2), Account(1, 2))
    train_to_the_end(run, coordinator, 2, generation=2)
    summary = coordinator.finish()
    assert (summary.trained, summary.not_reached, summary.balanced) == (20, 0, True)
    assert "the trainer group began again after step 1" in {line["reason"] for line in capture_lines(run)}


def test_pause_outlasts_a_lost_table(run: Run):
    coordinator = run.start()
    assert coordinator.pause() == 0
    run.table.destroy()
    run.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
    run.join(coordinator)
    with pytest.raises(PausedError):
        lease_of(coordinator, 1)
    coordinator.go_on()
    train_to_the_end(run, coordinator, 1)
    assert coordinator.finish().trained == 10


def test_ranks_give_signs_of_life_and_a_new_group_begins_without_any(run: Run):
    coordinator = run.start()
    assert coordinator.progress().silent_s == {}
    coordinator.wanted(1, 1)
    assert 0 <= coordinator.progress().silent_s[1] < DEADLINE_S
    coordinator.begin_group(2, None)
    assert coordinator.progress().silent_s == {}
