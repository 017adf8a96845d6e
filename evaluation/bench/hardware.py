"""What a benchmark ran on, to be written beside its figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_hardware() -> str:
    """Processor, cores and memory of this machine, in one line."""
    cores = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{_processor()}, {cores} cores, {memory_bytes / 1024**3:.0f} GiB, Python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
