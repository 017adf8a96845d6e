"""The demo with each drafter that is not its first one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from commands import SMALL, Command

from drafters import load_drafter

BATCH = 4


@pytest.mark.parametrize(("drafter", "wire_dtype"), [("dflash", "bf16"), ("eagle3", "fp8_e4m3")])
def test_demo_trains_and_decodes_with_another_drafter(
    slipstream: Callable[..., Command], drafter: str, wire_dtype: str
) -> None:
    summary = slipstream(
        "demo", "--drafter", drafter, "--steps", "6", "--no-dashboard", "--json", *SMALL,
        f"replay.wire_dtype={wire_dtype}",
    ).json()  # fmt: skip
    assert summary["ledger"]["balanced"]
    assert summary["ledger"]["trained"] == 6 * BATCH
    assert summary["lossless"] is True
    assert load_drafter(summary["checkpoint"]).algorithm == drafter
