"""How glibc's malloc treats large blocks, in processes that make and free tensors and chunks all the time.

By default every block above 128 KiB or so is mapped from the kernel and given back when it is freed, so its pages fault
again each time. Keeping freed blocks costs resident memory up to the process's own peak, and no more.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees, for its own next blocks. Call it first thing.

    Returns:
        Whether that could be set: only glibc has mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 64 << 20}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
