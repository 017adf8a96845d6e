"""The processes of `slipstream bench stream`, each as in a run: one target, one for each shard. Redis has its own.

A part waits for orders on a pipe, and ends when the pipe does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from services.contracts import TableSignature
from services.memory import keep_freed_memory
from services.replay.config import ReplayConfig

SAMPLES_IN_BUFFER = 8

PASS_S = 3600.0
"""Longer than any pass takes: nobody says again in its course that the target is alive."""


class TcpOrder(NamedTuple):
    """Have the target send its context features over a bare socket."""

    num_times: int


class FillOrder(NamedTuple):
    """Have a shard fill a table until the next order."""

    redis_url: str
    prefix: str
    config: ReplayConfig
    signature: TableSignature


class StopOrder(NamedTuple):
    """Have a shard end what it does; it answers when that is done."""


@dataclass(frozen=True)
class SampleShape:
    """One sample: T tokens of these layers and of the last hidden state, D wide."""

    num_tokens: int
    layer_ids: tuple[int, ...]
    hidden_size: int

    @property
    def num_values(self) -> int:
        """Of all its rows."""
        return self.num_tokens * (len(self.layer_ids) + 1) * self.hidden_size

    @property
    def bf16_bytes(self) -> int:
        """Of the sample as the trainer gets it."""
        return 2 * self.num_values


def serve_target(orders: Connection, shape: SampleShape, pause_s: float) -> None:
    """A target process: says its address, then takes `TcpOrder`s."""
    keep_freed_memory()
    from services.target.config import TargetConfig
    from services.target.server import serve
    from trainer.bench.limits import send_over_tcp, touched
    from trainer.bench.synthetic import SyntheticEngine

    engine = SyntheticEngine(shape.num_tokens, shape.layer_ids, shape.hidden_size, pause_s)
    config = TargetConfig(
        model="synthetic", num_gpus=0, batch_wait_ms=0, max_batch_samples=1, max_batch_tokens=shape.num_tokens
    )
    server = serve(engine, config)
    source = touched(shape.bf16_bytes)
    orders.send(server.address)
    with contextlib.suppress(EOFError):
        while True:
            order: TcpOrder = orders.recv()
            send_over_tcp(source, orders, order.num_times)
    server.stop()


def run_shard(orders: Connection) -> None:
    """A shard's process: takes `FillOrder` and `StopOrder` in turns."""
    keep_freed_memory()
    from services.replay.shard import ReplayShard

    with contextlib.suppress(EOFError):
        while True:
            order: FillOrder = orders.recv()
            shard = ReplayShard(order.redis_url, order.prefix, order.config, order.signature)
            filling = threading.Thread(target=shard.run)
            filling.start()
            try:
                orders.recv()
            finally:
                shard.stop()
                filling.join()
            orders.send(None)


class Process(NamedTuple):
    """A part's process and the pipe to it."""

    pid: int
    orders: Connection


@contextlib.contextmanager
def process(part: Callable[..., None], *args: Any) -> Iterator[Process]:
    """Run a part in a process of its own, which ends with the context, and with this process however that ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=part, args=(theirs, *args))
    child.start()
    theirs.close()
    assert child.pid is not None
    try:
        yield Process(child.pid, ours)
    finally:
        ours.close()
        child.join()
