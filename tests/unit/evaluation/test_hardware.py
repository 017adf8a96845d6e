from __future__ import annotations

import os
import platform
import re

from evaluation.bench.hardware import describe_hardware


def test_hardware_line_names_cores_memory_and_python() -> None:
    line = describe_hardware()
    match = re.fullmatch(r"(.+), (\d+) cores, (\d+) GiB, Python (\S+)", line)
    assert match, line
    assert int(match[2]) == len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert abs(int(match[3]) - memory_bytes / 1024**3) <= 0.5
    assert match[4] == platform.python_version()
