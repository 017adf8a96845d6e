"""Where the hidden states of a forward pass go: straight into the rows that travel.

One buffer holds one sample as its stream does: the T rows of context, then the R rows of the last hidden state. Each
captured layer is converted and put into its columns at once, while the forward pass goes on with the next layer; there
is no concatenation and no copy of the whole.

    CPU   layer output ─convert─► buffer
    CUDA  layer output ─convert─► rows on the device ─copy engine─► pinned buffer, while the next pass computes

Passes over a sample's bytes from here to the socket: the one above (two on CUDA, the second without the CPU), the
checksum and the look for NaN, which only read, the join of header and payload in `framing.pack`, and gRPC's own copies.

Shape letters: T tokens, R wanted rows of the last hidden state, L captured layers, D hidden size, S bytes of one hidden
state on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from services.buffers import Buffer, BufferPool
from services.codec import TORCH_DTYPES, encode_into
from services.contracts import WireDtype, hidden_state_bytes
from services.errors import TargetUnavailableError


class CapturedFeatures(NamedTuple):
    """One sample's features as they travel, C-contiguous, on the CPU.

    Call `wait` before they are read, and `release` when they are read no more.
    """

    context: Tensor
    """[T, L·D] in the wire dtype: the wanted layers' outputs, side by side in the order asked for. fp8_e4m3 has a scale
    behind each hidden state: then uint8 [T, L·(D + 4)] (`services.codec.pack_rows`)."""
    last: Tensor
    """[R, D], or uint8 [R, D + 4]: the wanted rows of the last hidden state, after the final norm."""
    answer: tuple[int, ...] = ()
    """The target's own answer, if one was asked for; `context` goes on over it."""
    buffer: Buffer | None = None
    """The memory of both, if it is on loan."""
    arrival: Callable[[], None] | None = None
    """Returns once the features are in that memory; None: they are."""

    def wait(self) -> None:
        """Wait until the features are there to be read.

        Raises:
            TargetUnavailableError: The device failed.
        """
        if self.arrival is not None:
            self.arrival()

    def release(self) -> None:
        """Give the memory back; context and last must not be used any more."""
        if self.buffer is not None:
            self.buffer.release()


class Packing:
    """The rows of one sample, on the device of the model while it computes.

    One that is dropped unfinished needs no more.

    Args:
        origin: What the memory comes from.
        num_tokens: T.
        num_last: R.
        num_layers: L.
        hidden_size: D.
        dtype: dtype on the wire.
    """

    def __init__(
        self,
        origin: PackingRoom,
        *,
        num_tokens: int,
        num_last: int,
        num_layers: int,
        hidden_size: int,
        dtype: WireDtype,
    ) -> None:
        state_bytes = hidden_state_bytes(hidden_size, dtype)
        self._origin = origin
        self._dtype = dtype
        self._context_bytes = num_tokens * num_layers * state_bytes
        self._buffer = origin.pool.take(self._context_bytes + num_last * state_bytes)
        self._rows = origin.device_rows(self._buffer)
        self._context_TLS = self._rows[: self._context_bytes].view(num_tokens, num_layers, state_bytes)
        self._last_RS = self._rows[self._context_bytes :].view(num_last, state_bytes)

    def put_layer(self, position: int, states_TD: Tensor) -> None:
        """Write one layer's outputs into its columns, in any float dtype."""
        encode_into(self._context_TLS[:, position], states_TD, self._dtype)

    def put_packed_context(self, context_TLS: Tensor) -> None:
        """Write all layers' columns, as they travel already."""
        self._context_TLS.copy_(context_TLS)

    def put_last(self, states_RD: Tensor) -> None:
        """Write the wanted rows of the last hidden state, in any float dtype."""
        encode_into(self._last_RS, states_RD, self._dtype)

    def finish(self, answer: tuple[int, ...] = ()) -> CapturedFeatures:
        """Hand the rows over; on CUDA they may still be on their way to the buffer."""
        arrival = self._origin.bring_home(self._rows, self._buffer)
        context_T = self._buffer.bytes_N[: self._context_bytes].view(len(self._context_TLS), -1)
        last_R = self._buffer.bytes_N[self._context_bytes :].view(self._last_RS.shape)
        if self._dtype != "fp8_e4m3":
            context_T, last_R = (rows.view(TORCH_DTYPES[self._dtype]) for rows in (context_T, last_R))
        return CapturedFeatures(context_T, last_R, answer, self._buffer, arrival)


class PackingRoom:
    """Memory of a device's captures, and on CUDA the stream that brings them to the host."""

    def __init__(self, device: torch.device, pool: BufferPool | None = None) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self.pool = pool or BufferPool(pinned=is_cuda)
        self._copying = torch.cuda.Stream(device) if is_cuda else None

    def device_rows(self, buffer: Buffer) -> Tensor:
        """uint8, as many bytes as the buffer's, for the model's device to write: on the CPU the buffer itself."""
        if self._copying is None:
            return buffer.bytes_N
        return torch.empty(buffer.bytes_N.nbytes, dtype=torch.uint8, device=self._device)

    def bring_home(self, rows: Tensor, buffer: Buffer) -> Callable[[], None] | None:
        """Begin to copy rows to their buffer, behind the work that makes them; returns what waits for it.

        The copy runs on a stream of its own, so that the next forward pass need not wait for it, and the buffer's next
        copy cannot overtake it.
        """
        if self._copying is None:
            return None
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            buffer.bytes_N.copy_(rows, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._copying)
        rows.record_stream(self._copying)  # the next pass must not be given this memory before it is copied

        def arrive() -> None:
            try:
                copied.synchronize()
            except torch.AcceleratorError as error:
                raise TargetUnavailableError(f"{self._device} failed, and this target must restart: {error}") from error

        return arrive
