"""Layers put straight into the rows that travel, whatever the dtype; memory goes back when its reader is done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.buffers import BufferPool
from services.codec import TORCH_DTYPES, check_packed, decode, pack_rows
from services.contracts import TableSignature, WireDtype
from services.errors import FeatureError
from services.target.packing import CapturedFeatures, Packing, PackingRoom

T, L, D, ROWS = 5, 3, 8, (1, 4)
DTYPES: tuple[WireDtype, ...] = ("bf16", "fp16", "fp32", "fp8_e4m3")


def layers(device: str = "cpu", seed: int = 0) -> Tensor:
    """[L + 1, T, D]: L layers, of different size, and the last hidden state."""
    states = torch.randn(L + 1, T, D, generator=torch.Generator().manual_seed(seed))
    return (states * torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None]).to(device)


def packed(room: PackingRoom, dtype: WireDtype, states: Tensor) -> CapturedFeatures:
    packing = Packing(room, num_tokens=T, num_last=len(ROWS), num_layers=L, hidden_size=D, dtype=dtype)
    for place in (2, 0, 1):  # a forward pass comes to them in the order of the model, not in that of the request
        packing.put_layer(place, states[place])
    packing.put_last(states[-1, list(ROWS)])
    return packing.finish(answer=(7,))


def expected(dtype: WireDtype, states: Tensor) -> tuple[Tensor, Tensor]:
    context = states[:L].transpose(0, 1).flatten(1).cpu()
    return pack_rows(context, dtype, D), pack_rows(states[-1, list(ROWS)].cpu(), dtype, D)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_land_in_their_columns(dtype: WireDtype) -> None:
    states = layers()
    features = packed(PackingRoom(torch.device("cpu")), dtype, states)
    context, last = expected(dtype, states)
    assert torch.equal(features.context.view(torch.uint8), context.view(torch.uint8))
    assert torch.equal(features.last.view(torch.uint8), last.view(torch.uint8))
    assert features.answer == (7,)
    signature = TableSignature(fingerprint="f", layer_ids=(0, 1, 2), hidden_size=D, dtype=dtype)
    assert features.context.nbytes + features.last.nbytes == signature.sample_bytes(T, len(ROWS))


def test_fp8_rows_have_a_scale_a_layer() -> None:
    states = layers()
    features = packed(PackingRoom(torch.device("cpu")), "fp8_e4m3", states)
    back = decode(features.context.numpy().data, "fp8_e4m3", L * D, hidden_size=D).view(T, L, D)
    for layer in range(L):
        largest = states[layer].abs().amax(-1, keepdim=True)
        assert ((back[:, layer] - states[layer]).abs() <= largest * 2**-4).all()
        assert back[:, layer].any(dim=-1).all()


def test_memory_is_used_again_once_it_is_released() -> None:
    room = PackingRoom(torch.device("cpu"), BufferPool())
    first = packed(room, "fp8_e4m3", layers())
    second = packed(room, "bf16", layers(seed=1))
    assert first.context.data_ptr() != second.context.data_ptr()
    place = first.context.data_ptr()
    first.release()
    third = packed(room, "bf16", layers(seed=2))
    assert third.context.data_ptr() == place
    context, last = expected("bf16", layers(seed=2))
    assert torch.equal(third.context, context)
    assert torch.equal(third.last, last)


def test_no_wanted_rows_are_an_empty_tensor() -> None:
    room = PackingRoom(torch.device("cpu"))
    packing = Packing(room, num_tokens=1, num_last=0, num_layers=1, hidden_size=D, dtype="fp8_e4m3")
    packing.put_layer(0, torch.ones(1, D))
    packing.put_last(torch.empty(0, D))
    features = packing.finish()
    assert features.last.shape == (0, D + 4)
    check_packed(features.last, "fp8_e4m3", D, "last")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_found_in_every_dtype(dtype: WireDtype) -> None:
    states = layers()
    states[1, 3, 2] = float("nan")
    features = packed(PackingRoom(torch.device("cpu")), dtype, states)
    with pytest.raises(FeatureError, match=r"context: 1 of 5 rows hold NaN.* first row 3"):
        check_packed(features.context, dtype, D, "context")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_rows_come_home_to_pinned_memory_beside_the_next_pass(dtype: WireDtype) -> None:
    device = torch.device("cuda")
    room = PackingRoom(device)
    busy = torch.randn(2048, 2048, device=device)
    samples = [layers("cuda", seed) for seed in range(8)]
    captured = []
    for states in samples:
        captured.append(packed(room, dtype, states))
        busy = busy @ busy / 2048  # what the next pass would be; the copies do not wait for it
    for states, features in zip(samples, captured, strict=True):
        features.wait()
        assert features.context.is_pinned()
        context, last = expected(dtype, states)
        if dtype == "fp8_e4m3":  # the GPU divides with another rounding
            for found, wanted, width in ((features.context, context, L * D), (features.last, last, D)):
                found_rows, wanted_rows = (
                    decode(rows.numpy().data, dtype, width, hidden_size=D) for rows in (found, wanted)
                )
                torch.testing.assert_close(found_rows, wanted_rows, rtol=2**-3, atol=1e-6)
        else:
            assert torch.equal(features.context, context)
            assert torch.equal(features.last, last)
        features.release()
    assert torch.isfinite(busy).all()
    assert room.pool.num_bytes > 0


def test_rows_of_the_wire_dtype_are_packed_without_a_copy() -> None:
    rows = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert pack_rows(rows, "bf16", 4).data_ptr() == rows.data_ptr()
    assert TORCH_DTYPES["bf16"] == pack_rows(rows, "bf16", 4).dtype
