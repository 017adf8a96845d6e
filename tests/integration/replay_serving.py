"""What tests of the replay service share: a service on a real Redis, small samples, and who puts them in."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from services.codec import byte_view, decode
from services.contracts import TableSignature
from services.replay.audit import audit_table
from services.replay.config import ReplayConfig
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.service import RunningService, serve
from services.replay.service_client import Producer, ReplayClient, ServedSample
from services.replay.service_config import ServiceConfig
from services.replay.table import RedisTable
from services.security import Credentials

SIGNATURE = TableSignature(fingerprint="f00d", layer_ids=(1, 3), hidden_size=8, dtype="bf16")
"""32 bytes a context row, 16 bytes a last row."""

TOKENS = 6
SAMPLE_BYTES = TOKENS * 32 + 2 * 16
WAIT_S = 120.0
PATIENT = ServiceConfig(progress_s=WAIT_S, max_wait_s=WAIT_S)

_numbers = itertools.count()


class Serving:
    """A running service, and a look behind it."""

    def __init__(self, service: RunningService, redis: Client, prefix: str) -> None:
        self.service = service
        self.redis = redis
        self.prefix = prefix
        self.address = service.address
        self.table = RedisTable(redis, prefix)

    def problems(self) -> list[str]:
        """What the audit finds."""
        return audit_table(self.redis, self.prefix)

    def assert_at_rest(self, resident_bytes: int = 0) -> None:
        """Fail unless nothing is on its way or leased, and only these bytes are taken."""
        info = self.table.info()
        assert (info.resident_bytes, info.num_inserting, info.num_leased) == (resident_bytes, 0, 0)
        assert self.problems() == []
        assert self.redis.hlen(f"{self.prefix}:work:jobs") == 0


@contextlib.contextmanager
def serving(
    embedded: EmbeddedRedis,
    *,
    samples: float = 4,
    config: ServiceConfig = PATIENT,
    credentials: Credentials | None = None,
    prefix: str = "",
    address: str = "127.0.0.1:0",
    owner: str = "here",
    **replay: Any,
) -> Iterator[Serving]:
    """Run a service whose table holds so many of `rows`' samples."""
    prefix = prefix or f"slipstream:service-{next(_numbers)}"
    settings = ReplayConfig(capacity=int(samples * SAMPLE_BYTES), **replay)  # type: ignore[arg-type]
    service = serve(embedded.url, prefix, settings, SIGNATURE, config, address, credentials, owner=owner)
    client = connect(embedded.url)
    try:
        yield Serving(service, client, prefix)
    finally:
        service.stop()
        client.close()


def features(sample_id: int, tokens: int = TOKENS, last: int = 2) -> tuple[Tensor, Tensor]:
    """Context and last rows that follow from the id."""
    generator = torch.Generator().manual_seed(sample_id)
    context = torch.randn(tokens, 2 * SIGNATURE.hidden_size, generator=generator).to(torch.bfloat16)
    return context, torch.randn(last, SIGNATURE.hidden_size, generator=generator).to(torch.bfloat16)


def insert(producer: Producer, sample_id: int, tokens: int = TOKENS, **more: Any) -> bool:
    context, last = features(sample_id, tokens)
    return producer.insert(
        sample_id,
        token_ids=range(100, 100 + tokens),
        loss_mask=[0] * (tokens - 3) + [1] * 3,
        last_rows=[tokens - 3, tokens - 2],
        context=byte_view(context),
        last=byte_view(last),
        **more,
    )


def take(client: ReplayClient, count: int = 1, *, wait_s: float = WAIT_S, **more: Any) -> list[ServedSample]:
    return client.take(count=count, lease_s=600.0, wait_s=wait_s, **more)


def assert_equal(sample: ServedSample) -> None:
    """Fail unless a sample's features are, bit for bit, those that its id gives."""
    context, last = features(sample.lease.sample.job.capture, sample.lease.sample.job.num_tokens)
    assert torch.equal(decode(sample.context, "bf16", context.shape[1]), context)
    assert torch.equal(decode(sample.last, "bf16", last.shape[1]), last)


def ids(samples: Sequence[ServedSample]) -> list[int]:
    return [sample.lease.sample.job.capture for sample in samples]
