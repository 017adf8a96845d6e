"""The group of ranks and the DeepSpeed engine. Nothing here compiles, and DeepSpeed's chatter goes to a log file."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.recipe import TrainerConfig

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"

MEETING_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other where none of them waits for the buffer: long enough to load a large drafter."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

NEVER = 2**62
"""Steps between DeepSpeed's own progress lines: telemetry tells the same."""

MOST_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own bucket size for reductions; a smaller drafter needs no larger bucket than itself."""


def open_store(host: str, world_size: int) -> dist.TCPStore:
    """The store where the ranks of a group find each other, listening on `host` and a port that the system chose."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=MEETING_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def connect_store(address: str, world_size: int) -> dist.TCPStore:
    """The store that rank 0 opened at `host:port`."""
    host, _, port = address.rpartition(":")
    return dist.TCPStore(host, int(port), world_size, is_master=False, timeout=MEETING_TIMEOUT)


def training_device(config: TrainerConfig) -> torch.device:
    """Where a rank computes: the first GPU that Ray gave it, or the CPU."""
    return torch.device("cuda", 0) if config.num_gpus else torch.device("cpu")


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for a device, so that it neither probes for accelerators nor compiles anything."""
    # Both are read from the environment only, the first at import.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = "0"
    import deepspeed

    if device.type == "cpu":
        # Its shared-memory collectives would be compiled when the group starts: a minute of g++, and gloo does as well.
        # setdefault, because reading the table first would run compilers to probe every op.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return cast(ModuleType, deepspeed)


@contextlib.contextmanager
def process_group(store: dist.TCPStore, rank: int, config: TrainerConfig, device: torch.device) -> Iterator[None]:
    """The group of all ranks, for torch and for DeepSpeed, until the context ends."""
    # One rank's wait for the buffer is a wait of all: its own deadline must pass first, because it says why.
    timeout = MEETING_TIMEOUT + timedelta(seconds=config.wait_s)
    if store.host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=config.world_size, timeout=timeout)
    try:
        load_deepspeed(device).init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks; the group's only rank gets it back as it is."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_over_neighbours(num_ranks: int) -> Callable[[Tensor], Tensor]:
    """What sums a tensor over the `num_ranks` consecutive ranks that this one is among: 0, 1, … or the next as many.

    All ranks call it at the same time.
    """
    world_size = dist.get_world_size()
    num_groups, mine = world_size // num_ranks, dist.get_rank() // num_ranks
    if num_groups == 1:
        return sum_over_ranks

    def reduce(values: Tensor) -> Tensor:
        if num_ranks == 1:
            return values
        of_groups = values.new_zeros(num_groups, *values.shape)
        of_groups[mine] = values
        return sum_over_ranks(of_groups)[mine]

    return reduce


def deepspeed_config(config: TrainerConfig, num_trainable: int) -> dict[str, Any]:
    """DeepSpeed's settings for a recipe.

    bf16 without ZeRO would add gradients up in bf16 and start Adam one step late, so bf16 runs at least stage 1,
    which for one rank is the same: fp32 masters, gradients added up in fp32. Ranks send each other bf16, except in
    deterministic mode, where a sum must not depend on how many ranks its parts come from.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(num_trainable, MOST_BUCKET_ELEMENTS)}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.layout.samples_per_pass,
        "gradient_accumulation_steps": config.layout.num_passes,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
    }
    if config.precision == "bf16":
        zero["stage"] = max(1, config.zero_stage)
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if config.deterministic:
            settings["communication_data_type"] = "fp32"
    return settings


def build_engine(drafter: nn.Module, config: TrainerConfig) -> Any:
    """A DeepSpeed engine that trains the drafter's trainable parameters with AdamW.

    torch's own AdamW: DeepSpeed's would be compiled on first use. The learning rate is set step by step.
    """
    import deepspeed

    trainable = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    settings = deepspeed_config(config, sum(parameter.numel() for parameter in trainable))
    engine, *_ = deepspeed.initialize(model=drafter, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


@contextlib.contextmanager
def library_output_to(path: Path) -> Iterator[None]:
    """Send what libraries print, warn and log to a file while the context lasts; errors are raised, not logged.

    DeepSpeed must be loaded: its logger gets its own handler at import.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    loggers = [logging.getLogger("DeepSpeed"), logging.getLogger("py.warnings")]
    with path.open("a", buffering=1) as log, contextlib.redirect_stdout(log), warnings.catch_warnings():
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
        logging.captureWarnings(True)
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate
