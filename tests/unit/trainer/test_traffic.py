from __future__ import annotations

from services.contracts import TableSignature, Traffic, WireDtype
from trainer.traffic import FeatureTraffic, measure_traffic

SIGNATURE = TableSignature(fingerprint="f", layer_ids=(1, 3, 5), hidden_size=8, dtype="bf16")


def counted(dtype: WireDtype, num_tokens: int, num_last: int) -> Traffic:
    """What the captures of so many tokens and rows of the last hidden state bring."""
    signature = SIGNATURE.model_copy(update={"dtype": dtype})
    return Traffic(num_tokens=num_tokens, num_bytes=signature.sample_bytes(num_tokens, num_last))


def test_rows_that_stay_behind_are_saved_in_bf16() -> None:
    found = measure_traffic({"bf16": counted("bf16", 100, 30)}, SIGNATURE)
    assert found == FeatureTraffic(
        streamed_bytes=100 * 3 * 16 + 30 * 16,
        all_rows_bytes=100 * 4 * 16,
        saved_by_rows_bytes=70 * 16,
        saved_by_dtype_bytes={"bf16": 0},
    )


def test_fp8_saves_half_of_what_travels_less_the_scales() -> None:
    found = measure_traffic({"fp8_e4m3": counted("fp8_e4m3", 100, 30)}, SIGNATURE)
    assert found.streamed_bytes == 330 * (8 + 4)
    assert found.saved_by_rows_bytes == 70 * 16
    assert found.saved_by_dtype_bytes == {"fp8_e4m3": 330 * (16 - 12)}
    assert found.streamed_bytes + found.saved_by_rows_bytes + 330 * 4 == found.all_rows_bytes


def test_wider_dtype_saves_less_than_nothing() -> None:
    found = measure_traffic({"fp32": counted("fp32", 10, 10)}, SIGNATURE)
    assert found.saved_by_rows_bytes == 0
    assert found.saved_by_dtype_bytes == {"fp32": -40 * 16}


def test_run_that_changed_its_dtype_adds_up() -> None:
    found = measure_traffic({"bf16": counted("bf16", 50, 5), "fp8_e4m3": counted("fp8_e4m3", 60, 20)}, SIGNATURE)
    assert found.all_rows_bytes == 110 * 4 * 16
    saved = found.saved_by_rows_bytes + sum(found.saved_by_dtype_bytes.values())
    assert found.streamed_bytes + saved == found.all_rows_bytes
    assert found.saved_by_rows_bytes == (45 + 40) * 16


def test_run_without_captures_streamed_nothing() -> None:
    assert measure_traffic({}, SIGNATURE) == FeatureTraffic()
