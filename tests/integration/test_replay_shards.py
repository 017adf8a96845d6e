"""Two shards with a Redis of their own each: routing, leasing from both, and the loss of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from schedule_settings import schedule_settings
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from waiting import wait_until

from services.contracts import CaptureJob, Chunk, Sample, StepLease, StepReport, TableSignature
from services.errors import DeadlineError, ReplayError, ReplayUnavailableError
from services.prompts import buffer
from services.prompts.config import PromptsConfig
from services.prompts.coordinator import Coordinator
from services.replay.audit import audit_table
from services.replay.config import ReplayConfig
from services.replay.embedded import EmbeddedRedis
from services.replay.leasing import Leasing
from services.replay.links import ShardLink, close_links, link_shards
from services.replay.rules import Admission
from trainer.account import Account
from trainer.output import OutputDir
from trainer.run_redis import run_redis

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(1,), hidden_size=4, dtype="bf16")
CAPACITY_BYTES = 64 * 1024
PREFIX = "test:shards"
DEADLINE_S = 120.0
NUM_PROMPTS = 12
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[EmbeddedRedis]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(EmbeddedRedis.start(tmp_path, CAPACITY_BYTES, number=number)) for number in range(2)]


@pytest.fixture
def links(servers: list[EmbeddedRedis]) -> Iterator[tuple[ShardLink, ...]]:
    links = link_shards([server.url for server in servers], PREFIX)
    for link in links:
        make_table(link)
    yield links
    close_links(links)


def make_table(link: ShardLink) -> None:
    link.table.create(CAPACITY_BYTES, SIGNATURE, max_times_sampled=1)
    link.table.set_generation(7)


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


@pytest.fixture
def coordinator(
    servers: list[EmbeddedRedis], links: tuple[ShardLink, ...], model: str, tmp_path: Path
) -> Iterator[Coordinator]:
    source = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 20}]
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(NUM_PROMPTS)))
    settings = schedule_settings(
        num_shards=2,
        signature=SIGNATURE,
        capture_log=str(tmp_path / "captures.jsonl"),
        answers=str(tmp_path / "answers.jsonl"),
        lives=str(tmp_path / "lives"),
    )
    prompts = PromptsConfig.model_validate({"source": str(source), "min_loss_tokens": 4, "system_prompt": None})
    coordinator = Coordinator(prompts, model, [server.url for server in servers], PREFIX, settings)
    yield coordinator
    coordinator.finish()


def capture_one(link: ShardLink) -> CaptureJob | None:
    """Do a shard's work for its oldest job, if there is one."""
    job = link.queue.take(time.time(), 600)
    if job is None:
        return None
    assert link.table.admit(job, SIGNATURE.reserved_bytes(job), time.time(), queued=True) is Admission.ADMITTED
    sizes = {"context": (job.num_tokens, 8), "last": (len(job.last_rows), 8)}
    chunks = tuple(
        Chunk(tensor=cast(Any, tensor), row_start=0, row_end=rows, num_bytes=rows * row_bytes, crc32c=0)
        for tensor, (rows, row_bytes) in sizes.items()
    )
    with link.table.writing(job) as writer:
        for index, chunk in enumerate(chunks):
            writer.write(index, bytes(chunk.num_bytes))
    num_bytes = SIGNATURE.sample_bytes(job.num_tokens, len(job.last_rows))
    link.table.commit(Sample(job=job, chunks=chunks, num_bytes=num_bytes, target="t"), time.time())
    return job


def lose_redis(server: EmbeddedRedis, link: ShardLink) -> None:
    """SIGKILL a Redis; its supervisor restarts it, and its shard would make the table anew."""
    (redis,) = psutil.Process(server.pid).children()
    os.kill(redis.pid, signal.SIGKILL)

    def is_made() -> bool:
        with contextlib.suppress(ReplayUnavailableError):
            make_table(link)
            return True
        return False

    wait_until(is_made, "the table made anew")


def lease_of(coordinator: Coordinator, step: int) -> StepLease:
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return coordinator.step_lease(step, 7)
        except DeadlineError:
            if time.monotonic() > deadline_s:
                raise


def join(coordinator: Coordinator, accounts: list[Account]) -> None:
    def have_joined() -> bool:
        for rank, account in enumerate(accounts):
            if (wanted := coordinator.wanted(rank, 7)) is not None:
                coordinator.join(account.answer(wanted))
        return not coordinator._buffer.lost

    wait_until(lambda: coordinator._buffer.lost, "the loss to be noticed")
    wait_until(have_joined, "the ranks' accounts")


def test_redis_of_one_shard_costs_its_own_samples_alone(
    coordinator: Coordinator, servers: list[EmbeddedRedis], links: tuple[ShardLink, ...], tmp_path: Path
):
    wait_until(lambda: [link.queue.size() for link in links] == [6, 6], "equal queues")
    routed = [[job.capture for _ in range(6) if (job := capture_one(link))] for link in links]
    assert sorted(routed[0] + routed[1]) == list(range(NUM_PROMPTS))
    accounts = [Account(rank, 7) for rank in range(2)]
    leasing = Leasing(links, PREFIX, SIGNATURE)

    def train(step: int) -> None:
        lease = lease_of(coordinator, step)
        leases = [
            leasing.lease(rank=rank, generation=7, count=1, lease_s=600, timeout_s=DEADLINE_S) for rank in range(2)
        ]
        for rank, (account, own) in enumerate(zip(accounts, leases, strict=True)):
            account.grant(lease)
            assert account.hold(own)
            leasing.ack(own, 7)
            report = StepReport(step=step, rank=rank, generation=7, uses=(own[0].use,), num_tokens=1)
            account.report(report)
            coordinator.step_done(report)

    train(1)
    before = links[0].table.info()
    lose_redis(servers[1], links[1])
    train(2)  # the other shard's samples are there, and steps are granted before all accounts are
    join(coordinator, accounts)
    left_before = before.num_ready - 2
    assert links[0].table.info().num_ready == left_before, "untouched"
    wait_until(lambda: sum(link.queue.size() for link in links) > 0, "captures made again")
    ended = threading.Event()

    def fill() -> None:
        while not ended.wait(0.002):
            for link in links:
                capture_one(link)

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        for step in range(3, 7):
            train(step)
        assert lease_of(coordinator, 7).is_end
        wait_until(lambda: all(link.table.info().sealed for link in links), "the seal")
    finally:
        ended.set()
        filling.join(DEADLINE_S)
    assert [audit_table(link.client, PREFIX) for link in links] == [[], []]
    summary = coordinator.finish()
    assert (summary.trained, summary.not_reached, summary.balanced) == (NUM_PROMPTS, 0, True), summary.problems
    lines = [json.loads(line) for line in (tmp_path / "captures.jsonl").read_text().splitlines()]
    again = {line["capture"] for line in lines if line["reason"] == "Redis restarted empty"}
    assert again <= set(routed[1])
    assert len(again) == summary.recaptured


def test_shard_that_stays_away_is_named(
    coordinator: Coordinator, servers: list[EmbeddedRedis], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(buffer, "AWAY_S", 0.2)
    servers[1].close()
    name = servers[1].url

    def has_ended() -> bool:
        try:
            coordinator.progress()
        except ReplayUnavailableError as error:
            return name in str(error)
        return False

    wait_until(has_ended, "an error that names the shard")


def test_one_server_under_two_addresses_is_refused(servers: list[EmbeddedRedis], tmp_path: Path):
    urls = [servers[0].url, f"{servers[0].url}?db=1"]
    config = ReplayConfig.model_validate({"shards": 2, "redis": urls, "capacity": CAPACITY_BYTES})
    with pytest.raises(ReplayError, match="are one server"), run_redis(config, OutputDir(tmp_path, "r", 1)):
        raise AssertionError("not refused")


def test_servers_of_the_user_are_claimed_each(servers: list[EmbeddedRedis], tmp_path: Path):
    config = ReplayConfig.model_validate(
        {"shards": 2, "redis": [server.url for server in servers], "capacity": CAPACITY_BYTES}
    )
    with run_redis(config, OutputDir(tmp_path, "r", 1)) as redis:
        assert redis.urls == config.urls
        assert redis.keep_alive() == []
        other = OutputDir(tmp_path / "other", "r", 1)
        with pytest.raises(ReplayError, match="belongs to"), run_redis(config, other):
            raise AssertionError("not refused")


def test_embedded_servers_are_kept_alive_each(tmp_path: Path):
    config = ReplayConfig.model_validate({"shards": 2, "capacity": CAPACITY_BYTES})
    with run_redis(config, OutputDir(tmp_path, "r", 1)) as redis:
        links = link_shards(redis.urls, PREFIX)
        assert sorted(path.name for path in tmp_path.glob("redis*.log")) == ["redis-1.log", "redis.log"]
        before = [link.client.get("slipstream:nonce") for link in links]
        victim = links[1].client.info("server")["process_id"]
        os.kill(psutil.Process(victim).ppid(), signal.SIGKILL)
        news: list[str] = []
        wait_until(lambda: news.extend(redis.keep_alive()) or news, "the supervisor's restart")
        assert len(news) == 1
        after = [link.client.get("slipstream:nonce") for link in links]
        assert (after[0] == before[0], after[1] == before[1]) == (True, False)
        close_links(links)
