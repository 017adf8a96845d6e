"""What the machine could do at best, and the plain way to do it: the yardsticks of `slipstream bench stream`.

Each function moves a number of bytes and says how long that took. All of them end with the bytes in one preallocated
tensor, except for Redis' writes.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from services.codec import byte_view

PIECE_BYTES = 1024**2
SOCKET_BUFFER_BYTES = 4 * 1024**2


def send_over_tcp(source: Tensor, orders: Connection, num_times: int) -> None:
    """The sending side of raw TCP: say the port, then send a tensor's bytes over and over.

    Args:
        source: Contiguous, on the CPU.
        orders: Takes the port.
        num_times: How often.
    """
    view = byte_view(source)
    with socket.create_server(("127.0.0.1", 0)) as server:
        orders.send(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
            for _ in range(num_times):
                for begin in range(0, view.nbytes, PIECE_BYTES):
                    connection.sendall(view[begin : begin + PIECE_BYTES])


def receive_over_tcp(port: int, place: Tensor, num_times: int) -> float:
    """The receiving side; seconds from the first byte asked for to the last one in `place`."""
    view = byte_view(place)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        began_s = time.perf_counter()
        for _ in range(num_times):
            filled = 0
            while filled < view.nbytes:
                num_bytes = connection.recv_into(view[filled : filled + PIECE_BYTES])
                if num_bytes == 0:
                    raise ConnectionError("the sender of the TCP measurement ended early")
                filled += num_bytes
        return time.perf_counter() - began_s


def through_disk(source: Tensor, place: Tensor, num_times: int, folder: Path, *, is_cold: bool = False) -> float:
    """What a feature cache does with a sample: write a file, fsync it, map it, copy it; seconds for all of them.

    Args:
        source: Contiguous, on the CPU.
        place: Of the same size.
        num_times: Number of samples; each is a file of its own.
        folder: Where, on the disk to be measured. The files are removed, outside the time measured.
        is_cold: Whether what was written leaves the kernel's page cache before it is read, as in a feature cache
            larger than memory.
    """
    view, target = byte_view(source), byte_view(place)
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix=".bench-stream-", dir=folder) as held:
        for number in range(num_times):
            path = Path(held) / str(number)
            began_s = time.perf_counter()
            with path.open("wb", buffering=0) as written:
                num_bytes = 0
                while num_bytes < view.nbytes:
                    num_bytes += written.write(view[num_bytes:])
                os.fsync(written.fileno())
            with path.open("rb") as read:
                if is_cold:
                    os.posix_fadvise(read.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with mmap.mmap(read.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    target[:] = memoryview(mapped)
            seconds += time.perf_counter() - began_s
            path.unlink()
    return seconds


def touched(num_bytes: int) -> Tensor:
    """Memory whose pages are there already: the first write to a fresh page costs more than all later ones."""
    return torch.zeros(num_bytes, dtype=torch.uint8)
