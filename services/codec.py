"""Tensors to and from the bytes of chunks.

Rows travel C-contiguous and little-endian, which is how torch holds them on every platform it ships for, so that a
chunk's payload is a view of the tensor's own memory on both sides. A row is the hidden states of a token's layers, one
after another; in fp8 each of them is followed by its scale (`services.fp8`).
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from services.contracts import WireDtype, hidden_state_bytes
from services.errors import FeatureError, WireError
from services.fp8 import are_scales_good, dequantise_into, quantise_into, scales_of

TORCH_DTYPES: dict[WireDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Of the elements that travel."""


def byte_view(tensor: Tensor) -> memoryview:
    """A tensor's own memory as flat bytes, writable, without copying.

    Args:
        tensor: C-contiguous, on the CPU, any dtype.

    Raises:
        ValueError: The tensor is strided or on another device.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"only a contiguous CPU tensor has a byte view, not shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} on {tensor.device}: call .cpu().contiguous() first"
        )
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def encode_into(packed: Tensor, states: Tensor, dtype: WireDtype) -> None:
    """Write hidden states as they travel: converted and put in place at once.

    Args:
        packed: uint8 [N, `hidden_state_bytes`], rows may be strided; on the device of the states.
        states: [N, D], any float dtype.
        dtype: dtype on the wire.
    """
    if dtype == "fp8_e4m3":
        quantise_into(packed, states)
    else:
        packed.view(TORCH_DTYPES[dtype]).copy_(states)


def pack_rows(rows: Tensor, dtype: WireDtype, hidden_size: int) -> Tensor:
    """Rows as they travel, as a new tensor: what an engine hands out (`services.target.packing.CapturedFeatures`).

    Args:
        rows: [n, k·D], any float dtype: k hidden states a row.
        dtype: dtype on the wire.
        hidden_size: D.

    Returns:
        [n, k·D] in that dtype, the same tensor if it has it; fp8_e4m3 as uint8 [n, k·(D + 4)].
    """
    if dtype != "fp8_e4m3":
        return rows.to(TORCH_DTYPES[dtype])
    num_states = rows.shape[1] // hidden_size
    packed = torch.empty(
        len(rows), num_states * hidden_state_bytes(hidden_size, dtype), dtype=torch.uint8, device=rows.device
    )
    quantise_into(packed.view(len(rows) * num_states, -1), rows.reshape(-1, hidden_size))
    return packed


def decode_into(rows: Tensor, payload: Buffer, dtype: WireDtype, hidden_size: int) -> None:
    """Write a payload's rows into a tensor's, converting as needed; nothing of their size is allocated.

    Args:
        rows: [n, k·D] on the CPU, C-contiguous, bfloat16, float16 or float32: k hidden states a row, in place.
        payload: n rows, of one chunk or of several in a row.
        dtype: dtype on the wire. Where `rows` have the same one, bytes are copied.
        hidden_size: D.

    Raises:
        WireError: The payload is not n rows of that size.
        ValueError: The rows are strided, or not on the CPU.
    """
    destination = byte_view(rows)
    view = memoryview(payload).cast("B")
    num_rows, row_width = rows.shape
    row_bytes = _row_bytes(dtype, row_width, hidden_size)
    if view.nbytes != num_rows * row_bytes:
        raise WireError(f"payload of {view.nbytes} bytes is not {num_rows} rows of {row_bytes} bytes ({dtype})")
    if view.nbytes == 0:
        return
    if TORCH_DTYPES[dtype] == rows.dtype:
        destination[:] = view
    else:
        unpack_into(rows, _tensor_over(view).view(num_rows, row_bytes), dtype, hidden_size)


def unpack_into(rows: Tensor, packed: Tensor, dtype: WireDtype, hidden_size: int) -> None:
    """What `decode_into` does, between tensors on one device, whichever it is.

    Args:
        rows: [n, k·D], C-contiguous, bfloat16, float16 or float32.
        packed: uint8 [n, row bytes], C-contiguous.
        dtype: dtype on the wire.
        hidden_size: D.
    """
    if dtype == "fp8_e4m3":
        dequantise_into(rows.view(-1, hidden_size), packed.view(-1, hidden_state_bytes(hidden_size, dtype)))
    else:
        rows.copy_(packed.view(TORCH_DTYPES[dtype]))


def decode(
    payload: Buffer,
    dtype: WireDtype,
    row_width: int,
    *,
    hidden_size: int | None = None,
) -> Tensor:
    """Copy a payload into a new tensor of shape [rows, row_width]; fp8 comes out as float32, the others as they are.

    Args:
        payload: A whole number of rows.
        dtype: dtype on the wire.
        row_width: Elements of a row.
        hidden_size: D, which fp8 needs; `row_width` is a multiple of it.

    Raises:
        WireError: The payload is no whole number of rows.
        ValueError: fp8 without `hidden_size`.
    """
    if hidden_size is None:
        if dtype == "fp8_e4m3":
            raise ValueError("fp8_e4m3 has a scale behind each hidden state: give hidden_size")
        hidden_size = row_width
    row_bytes = _row_bytes(dtype, row_width, hidden_size)
    num_bytes = memoryview(payload).nbytes
    if row_bytes == 0 or num_bytes % row_bytes:
        raise WireError(f"payload of {num_bytes} bytes is no whole number of {row_bytes}-byte rows ({dtype})")
    rows_dtype = torch.float32 if dtype == "fp8_e4m3" else TORCH_DTYPES[dtype]
    rows = torch.empty(num_bytes // row_bytes, row_width, dtype=rows_dtype)
    decode_into(rows, payload, dtype, hidden_size)
    return rows


def check_finite(features: Tensor, name: str) -> None:
    """Refuse features that hold NaN or infinity.

    Args:
        features: [rows, width], any float dtype. Check after the conversion to the wire dtype, which can overflow.
        name: What the error calls them.

    Raises:
        FeatureError: Some value is not finite; names the first such row.
    """
    if features.numel() == 0:
        return
    lowest, highest = torch.aminmax(features)  # one pass; NaN wins both
    if bool(torch.isfinite(lowest)) and bool(torch.isfinite(highest)):
        return
    bad_rows = (~torch.isfinite(features)).any(dim=-1).nonzero().flatten()
    raise FeatureError(
        f"{name}: {len(bad_rows)} of {len(features)} rows hold NaN or infinity as {features.dtype}, first row "
        f"{int(bad_rows[0])}. Look at the target's dtype (float16 overflows at 65504) and at its weights."
    )


def check_packed(packed: Tensor, dtype: WireDtype, hidden_size: int, name: str) -> None:
    """Refuse rows as they travel that hold NaN or infinity: `check_finite`, and for fp8 a look at the scales alone.

    Args:
        packed: Rows as they travel, C-contiguous, on the CPU: of the wire dtype or of bytes.
        dtype: dtype on the wire.
        hidden_size: D.
        name: What the error calls them.

    Raises:
        FeatureError: Some value is not finite, or too large for bfloat16 where the dtype is fp8.
    """
    if dtype != "fp8_e4m3":
        check_finite(packed.view(TORCH_DTYPES[dtype]), name)
        return
    are_good = are_scales_good(scales_of(packed.view(-1, hidden_state_bytes(hidden_size, dtype))))
    if bool(are_good.all()):
        return
    bad_rows = (~are_good.view(len(packed), -1)).any(dim=-1).nonzero().flatten()
    raise FeatureError(
        f"{name}: {len(bad_rows)} of {len(packed)} rows hold NaN, infinity, or values that bfloat16 cannot hold, first "
        f"row {int(bad_rows[0])}. Look at the target's dtype (float16 overflows at 65504) and at its weights."
    )


def _row_bytes(dtype: WireDtype, row_width: int, hidden_size: int) -> int:
    num_states, rest = divmod(row_width, hidden_size)
    if rest:
        raise ValueError(f"rows of {row_width} elements are no whole number of hidden states of size {hidden_size}")
    return num_states * hidden_state_bytes(hidden_size, dtype)


def _tensor_over(view: memoryview) -> Tensor:
    """Bytes as uint8, without a copy; only to be read, and only while the view lives.

    torch makes no tensor of read-only memory without a warning, whatever is done with it.
    """
    address = np.frombuffer(view, np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_uint8 * view.nbytes).from_address(address), dtype=torch.uint8)
