"""How fast features get from a target's memory into a tensor of the trainer, beside what the machine can do at best.

Real parts, each in a process of its own as in a run, with a synthetic target: gRPC server → shard → Redis → reader.
Every round takes each way once, in turns, so that a slow moment of the machine hits all of them; medians are compared.
A way's rate counts the bytes of the ready bf16 tensors, whatever travelled; CPU seconds are those of all threads of a
process, by `/proc`, and are given per GB of the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil
import torch

from evaluation.bench.hardware import describe_hardware
from services.codec import byte_view
from services.contracts import DEFAULT_CHUNK_BYTES, CaptureJob, WireDtype
from services.errors import UsageError
from services.memory import keep_freed_memory
from services.replay.arena import Arena
from services.replay.config import ReplayConfig
from services.replay.connect import Client, connect
from services.replay.embedded import EmbeddedRedis
from services.replay.links import ShardLink, close_links, link_shards, sum_infos
from services.replay.raw_connection import RawConnections
from services.replay.reader import ReplayReader
from services.replay.resp import pack
from services.replay.urls import with_arena
from services.target.client import TargetClient
from trainer.assembly import Assembler
from trainer.bench.limits import receive_over_tcp, through_disk, touched
from trainer.bench.stream_parts import (
    PASS_S,
    SAMPLES_IN_BUFFER,
    FillOrder,
    SampleShape,
    StopOrder,
    TcpOrder,
    process,
    run_shard,
    serve_target,
)
from trainer.bench.synthetic import synthetic_job, synthetic_signature

QWEN3_4B = SampleShape(num_tokens=1024, layer_ids=(1, 9, 17, 25, 33), hidden_size=2560)
"""31.5 MB a sample, as bf16."""

MOST_BYTES_A_VALUE = 4
"""On the wire."""

TIERS = ("redis", "shm")
SHARDS = (1, 2)

PULLS = 2
"""Captures that a shard pulls at once: with more, on few cores, threads only take turns."""

SETTLE_S = 1.0
"""After the disk way the kernel still works on what was written and removed."""

WARM_SAMPLES = 2
LEASE_S = 600.0
WAIT_S = 300.0
MB = 1e6
GB = 1e9


class Way(NamedTuple):
    """One setting of the path."""

    tier: str
    wire_dtype: WireDtype
    shards: int


def choose_ways(
    tiers: Sequence[str] | None = None, wire_dtypes: Sequence[str] | None = None, shards: Sequence[int] | None = None
) -> list[Way]:
    """Every combination of what is given; of all that there is where nothing is.

    Raises:
        UsageError: One is unknown.
    """
    known_dtypes: tuple[WireDtype, ...] = get_args(WireDtype)
    for what, given, known in (("tier", tiers, TIERS), ("wire dtype", wire_dtypes, known_dtypes)):
        for name in given or ():
            if name not in known:
                raise UsageError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
    if shards and min(shards) < 1:
        raise UsageError(f"{min(shards)} shards carry nothing; give 1 or more")
    dtypes = [dtype for dtype in known_dtypes if wire_dtypes is None or dtype in wire_dtypes]
    return [Way(*way) for way in itertools.product(tiers or TIERS, dtypes, shards or SHARDS)]


class Pass(NamedTuple):
    """One pass of samples along a way."""

    mb_s: float
    cpu_s_per_gb: dict[str, float]
    peak_bytes: int
    capacity_bytes: int


@dataclass
class Limits:
    """Rates of the yardsticks, MB/s, one entry a round."""

    tcp: list[float] = field(default_factory=list)
    hop: list[float] = field(default_factory=list)
    hop_cpu: list[float] = field(default_factory=list)
    redis_set: list[float] = field(default_factory=list)
    redis_get: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    cold_disk: list[float] = field(default_factory=list)


class StreamBench:
    """The running parts; `round` takes every way once.

    Args:
        shape: Of the samples.
        num_samples: How many each way moves in a round.
        ways: Settings to measure.
        disk: Folder on the disk that the disk way writes to.
        parts: Ends what is started here.
    """

    def __init__(
        self,
        shape: SampleShape,
        num_samples: int,
        ways: Sequence[Way],
        disk: Path,
        parts: contextlib.ExitStack,
    ) -> None:
        self._shape = shape
        self._num_samples = num_samples
        self._disk = disk
        self._target = parts.enter_context(process(serve_target, shape, 0.0))
        logs = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-bench-")))
        capacity_bytes = SAMPLES_IN_BUFFER * MOST_BYTES_A_VALUE * shape.num_values
        self._redis: list[EmbeddedRedis] = []
        for number in range(max(way.shards for way in ways)):
            (logs / str(number)).mkdir()
            self._redis.append(parts.enter_context(EmbeddedRedis.start(logs / str(number), capacity_bytes)))
        self._shards = [parts.enter_context(process(run_shard)) for _ in self._redis]
        self._address: str = self._target.orders.recv()
        self._place = touched(shape.bf16_bytes)
        self._source = torch.randint(0, 256, (shape.bf16_bytes,), dtype=torch.uint8)
        self._captures = itertools.count(1)
        self.limits = Limits()
        self.passes: dict[Way, list[Pass]] = {way: [] for way in ways}

    def warm_up(self) -> None:
        """Have every page touched and every module loaded once."""
        for way in self.passes:
            self._pass(way, WARM_SAMPLES)
        self._hop(WARM_SAMPLES)

    def round(self) -> None:
        """Every yardstick and every way, once."""
        moved_bytes = self._num_samples * self._shape.bf16_bytes
        limits = self.limits
        disk_s, cold_disk_s = (
            through_disk(self._source, self._place, self._num_samples, self._disk, is_cold=is_cold)
            for is_cold in (False, True)
        )
        time.sleep(SETTLE_S)
        set_s, get_s = self._set_and_get()
        tcp_s = self._tcp()
        hop_s, hop_cpu_s = self._hop(self._num_samples)
        limits.hop_cpu.append(hop_cpu_s / (moved_bytes / GB))
        for rates, seconds in (
            (limits.tcp, tcp_s),
            (limits.hop, hop_s),
            (limits.redis_set, set_s),
            (limits.redis_get, get_s),
            (limits.disk, disk_s),
            (limits.cold_disk, cold_disk_s),
        ):
            rates.append(moved_bytes / MB / seconds)
        for way, passes in self.passes.items():
            passes.append(self._pass(way, self._num_samples))

    def _tcp(self) -> float:
        self._target.orders.send(TcpOrder(self._num_samples))
        return receive_over_tcp(self._target.orders.recv(), self._place, self._num_samples)

    def _hop(self, num_samples: int) -> tuple[float, float]:
        """Our client and our server, nothing kept: seconds, and CPU seconds of both."""
        with TargetClient(self._address) as client, CpuMeter({"both": [self._target.pid, None]}) as meter:
            client.describe()
            began_s = time.perf_counter()
            for _ in range(num_samples):
                for _ in client.capture(
                    self._job(),
                    layer_ids=self._shape.layer_ids,
                    wire_dtype="bf16",
                    chunk_bytes=DEFAULT_CHUNK_BYTES,
                    timeout_s=WAIT_S,
                ):
                    pass
            seconds = time.perf_counter() - began_s
        return seconds, sum(meter.cpu_s.values())

    def _set_and_get(self) -> tuple[float, float]:
        """Redis alone: chunks written from memory and read into memory, by the connections that the store uses."""
        source, place = byte_view(self._source), byte_view(self._place)
        begins = range(0, source.nbytes, DEFAULT_CHUNK_BYTES)
        set_s = get_s = 0.0
        with contextlib.closing(connect(self._redis[0].url)) as client:
            connections = RawConnections(client)
            with contextlib.closing(connections), connections.borrow() as connection:
                for _ in range(self._num_samples):
                    began_s = time.perf_counter()
                    for begin in begins:
                        connection.send(pack(("SET", f"bench:{begin}", source[begin : begin + DEFAULT_CHUNK_BYTES])), 1)
                    for _ in begins:
                        connection.reply()
                    set_s += time.perf_counter() - began_s
                    began_s = time.perf_counter()
                    for begin in begins:
                        connection.get_into(f"bench:{begin}", place[begin : begin + DEFAULT_CHUNK_BYTES])
                    get_s += time.perf_counter() - began_s
                    client.unlink(*(f"bench:{begin}" for begin in begins))
        return set_s, get_s

    def _pass(self, way: Way, num_samples: int) -> Pass:
        """Samples from the target's memory to packed bf16 tensors, which are given up at once."""
        shape = self._shape
        signature = synthetic_signature(shape.layer_ids, shape.hidden_size, way.wire_dtype)
        capacity_bytes = SAMPLES_IN_BUFFER * signature.reserved_bytes(synthetic_job(0, shape.num_tokens))
        config = ReplayConfig.model_validate(
            {"capacity": capacity_bytes, "wire_dtype": way.wire_dtype, "pulls": PULLS, "shards": way.shards}
        )
        prefix = f"slipstream:bench-{next(self._captures)}"
        urls = [redis.url for redis in self._redis[: way.shards]]
        with contextlib.ExitStack() as stack:
            if way.tier == "shm":
                arenas = [stack.enter_context(Arena(config.shard_capacity)) for _ in urls]
                urls = [with_arena(url, arena.place.text) for url, arena in zip(urls, arenas, strict=True)]
            reader = ReplayReader(urls, prefix, signature)
            stack.callback(reader.close)
            links = link_shards(urls, prefix)
            stack.callback(close_links, links)
            pids: dict[str, list[int | None]] = {"target": [self._target.pid], "trainer": [None]}
            pids |= {"shard": [shard.pid for shard in self._shards[: way.shards]], "redis": []}
            for link, shard, url in zip(links, self._shards, urls, strict=False):
                stack.callback(link.table.destroy)
                link.table.create(config.shard_capacity, signature, config.reuse, config.rate_limiter, config.sampling)
                link.registry.publish([self._address], time.time() + PASS_S)
                shard.orders.send(FillOrder(url, prefix, config.of_one_shard(), signature))
                stack.callback(shard.orders.recv)
                stack.callback(shard.orders.send, StopOrder())
                pids["redis"].append(_redis_pid(link.client))
            assembler = Assembler(reader.reading, signature, device=torch.device("cpu"), dtype=torch.bfloat16)
            self._move(links, reader, assembler, SAMPLES_IN_BUFFER)  # until connections and memory are in use
            with CpuMeter(pids) as meter:
                began_s = time.perf_counter()
                self._move(links, reader, assembler, num_samples)
                seconds = time.perf_counter() - began_s
            moved_bytes = num_samples * shape.bf16_bytes
            return Pass(
                moved_bytes / MB / seconds,
                {name: cpu_s / (moved_bytes / GB) for name, cpu_s in meter.cpu_s.items()},
                sum_infos([link.table.info() for link in links]).peak_bytes,
                capacity_bytes,
            )

    def _move(self, links: Sequence[ShardLink], reader: ReplayReader, assembler: Assembler, num_samples: int) -> None:
        for _, link in zip(range(num_samples), itertools.cycle(links), strict=False):
            link.queue.push(self._job())
        for _ in range(num_samples):
            leases = reader.lease(rank=0, generation=0, count=1, lease_s=LEASE_S, timeout_s=WAIT_S)
            micro_batch = assembler.assemble(leases, [0])
            reader.ack(leases, 0)
            assembler.release(micro_batch)

    def _job(self) -> CaptureJob:
        return synthetic_job(next(self._captures), self._shape.num_tokens)


class CpuMeter:
    """CPU seconds that processes spend while the context lasts; None is this process."""

    def __init__(self, pids: Mapping[str, Sequence[int | None]]) -> None:
        self._processes = {name: [psutil.Process(pid) for pid in group] for name, group in pids.items()}
        self.cpu_s: dict[str, float] = {}

    def __enter__(self) -> CpuMeter:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = {name: after - self._before[name] for name, after in self._now().items()}

    def _now(self) -> dict[str, float]:
        times = {name: [process.cpu_times() for process in group] for name, group in self._processes.items()}
        return {name: sum(used.user + used.system for used in group) for name, group in times.items()}


def _redis_pid(client: Client) -> int:
    return int(client.info("server")["process_id"])


def measure_stream(
    say: Callable[[str], None],
    *,
    ways: Sequence[Way],
    rounds: int,
    num_samples: int,
    disk: Path,
    shape: SampleShape = QWEN3_4B,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        say: Hears of progress.
        ways: Settings to measure.
        rounds: Each takes every way and every yardstick once.
        num_samples: How many each of them moves.
        disk: Folder on the disk that the disk way writes to.
        shape: Of a sample.

    Returns:
        Medians over the rounds, as specs/cli.md names them, and ratios, each the median of the rounds' own ratios.
    """
    keep_freed_memory()
    with contextlib.ExitStack() as parts:
        say("starting target, shards and Redis")
        bench = StreamBench(shape, num_samples, ways, disk, parts)
        bench.warm_up()
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            bench.round()
    limits = bench.limits
    return {
        "grpc_hop_mb_s": statistics.median(limits.hop),
        "grpc_hop_cpu_s_per_gb": statistics.median(limits.hop_cpu),
        "tcp_loopback_mb_s": statistics.median(limits.tcp),
        "redis_set_mb_s": statistics.median(limits.redis_set),
        "redis_get_mb_s": statistics.median(limits.redis_get),
        "disk_way_mb_s": statistics.median(limits.disk),
        "cold_disk_way_mb_s": statistics.median(limits.cold_disk),
        "hop_to_tcp": _ratio(limits.hop, limits.tcp),
        "results": [_result(way, passes, limits) for way, passes in bench.passes.items()],
        "sample_mb": shape.bf16_bytes / MB,
        "samples": num_samples,
        "rounds": rounds,
        "hardware": describe_hardware(),
    }


def _result(way: Way, passes: Sequence[Pass], limits: Limits) -> dict[str, Any]:
    rates = [each.mb_s for each in passes]
    return {
        **way._asdict(),
        "end_to_end_mb_s": statistics.median(rates),
        "to_hop": _ratio(rates, limits.hop),
        "to_disk_way": _ratio(rates, limits.disk),
        "to_cold_disk_way": _ratio(rates, limits.cold_disk),
        "cpu_s_per_gb": {
            part: statistics.median(each.cpu_s_per_gb[part] for each in passes) for part in passes[0].cpu_s_per_gb
        },
        "peak_bytes": max(each.peak_bytes for each in passes),
        "capacity_bytes": passes[0].capacity_bytes,
    }


def _ratio(rates: Sequence[float], yardstick: Sequence[float]) -> float:
    return statistics.median(rate / limit for rate, limit in zip(rates, yardstick, strict=True))
