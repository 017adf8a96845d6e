"""Tensors to and from the bytes of chunks.

Rows travel C-contiguous and little-endian, which is how torch holds them on every platform it ships for, so that a
chunk's payload is a view of the tensor's own memory on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.contracts import WireDtype
from services.errors import FeatureError, WireError

TORCH_DTYPES: dict[WireDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def decode(payload: bytes | bytearray | memoryview, dtype: WireDtype, row_width: int) -> Tensor:
    """Copy a payload into a new tensor of shape [rows, row_width].

    Raises:
        WireError: The payload is no whole number of rows.
    """
    view = memoryview(payload)
    torch_dtype = TORCH_DTYPES[dtype]
    row_bytes = row_width * torch_dtype.itemsize
    if row_bytes == 0 or view.nbytes % row_bytes:
        raise WireError(f"payload of {view.nbytes} bytes is no whole number of {row_bytes}-byte rows ({dtype})")
    rows = torch.empty(view.nbytes // row_bytes, row_width, dtype=torch_dtype)
    byte_view(rows)[:] = view
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
