"""Samples spread over decoding replicas, real Ray actors, some of which are killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from untrained import DEMO_TARGET, save_untrained
from waiting import WAIT_S, wait_until

from evaluation.benchmark import BenchmarkSettings, Sample
from evaluation.records import PlainRecord, SampleRecord
from evaluation.sample_decoder import decoding_here
from evaluation.work import Work
from services.errors import CheckpointError, PartDiedError
from trainer.cluster import Part
from trainer.replicas import Replicas

pytestmark = pytest.mark.usefixtures("ray_cluster")

SAMPLES = tuple(
    Sample(task="mbpp", domain="code", index=index, seed=index, prompt_ids=(5 + index, 6, 7)) for index in range(12)
)
WORKS = [Work(speculative=SAMPLES[first : first + 2], plain=SAMPLES[first : first + 2]) for first in range(0, 12, 2)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkSettings:
    checkpoint = save_untrained(tmp_path_factory.mktemp("drafter"))
    return BenchmarkSettings(
        target=str(DEMO_TARGET), drafter=str(checkpoint), max_new_tokens=8, batch_size=2, threads=1
    )


class Running:
    """Replicas, and what they have said."""

    def __init__(self, settings: BenchmarkSettings, count: int = 2) -> None:
        self.said: list[str] = []
        self.replicas = Replicas(settings, count, self.said.append)


@pytest.fixture
def running(settings: BenchmarkSettings) -> Iterator[Running]:
    running = Running(settings)
    yield running
    running.replicas.close()


def kill(part: Part) -> None:
    """Kill a replica, and wait until it is dead: Ray may take its time, and a replica does many pieces in that."""
    ray.kill(part.actor)

    def is_dead() -> bool:
        try:
            ray.get(part.actor.__ray_ready__.remote(), timeout=WAIT_S)
        except ray.exceptions.RayActorError:
            return True
        return False

    wait_until(is_dead, "the death of a replica")


def outcome(records: list[SampleRecord | PlainRecord]) -> list[tuple[object, ...]]:
    """What does not depend on who decoded a sample, sorted."""
    return sorted(
        (record.kind, record.index, record.output_hash, getattr(record, "accepted_lengths", ())) for record in records
    )


def test_replicas_give_the_records_of_one_process_and_a_killed_ones_samples_are_decoded_again(running, settings):
    running.replicas.wait_started()
    alone: list[SampleRecord | PlainRecord] = []
    with decoding_here(settings) as decode:
        decode(WORKS, alone.append)
    records: list[SampleRecord | PlainRecord] = []
    victim = running.replicas.parts[0]

    def keep(record: SampleRecord | PlainRecord) -> None:
        if not records:
            kill(victim)
        records.append(record)

    running.replicas.decode(WORKS, keep)
    assert outcome(records) == outcome(alone)
    assert len(records) == 24
    assert victim not in running.replicas.parts
    assert len(running.said) == 1
    assert "decoded again" in running.said[0]


def test_replicas_that_die_again_and_again_end_the_evaluation(settings, monkeypatch):
    monkeypatch.setattr("trainer.replicas.RESTARTS_A_REPLICA", 1)
    running = Running(settings, 1)

    def kill_all(record: SampleRecord | PlainRecord) -> None:
        for part in running.replicas.parts:
            kill(part)

    try:
        running.replicas.wait_started()
        with pytest.raises(PartDiedError, match=r"more than 1 times within an hour.*decodes what is missing"):
            running.replicas.decode(WORKS, kill_all)
    finally:
        running.replicas.close()
    assert len(running.said) == 1


def test_drafter_that_cannot_be_loaded_is_named_by_the_replicas(settings, tmp_path):
    running = Running(settings.model_copy(update={"drafter": str(tmp_path)}), 1)
    try:
        with pytest.raises(CheckpointError, match="no drafter checkpoint"):
            running.replicas.wait_started()
    finally:
        running.replicas.close()
