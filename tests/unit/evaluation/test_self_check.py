from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from drafters import build_drafter, load_drafter, save_drafter
from drafters.drafter import Drafter
from evaluation.self_check import SelfCheckError, compare_drafters

KINDS = {
    "dspark": {"block_size": 4, "num_anchors": 6, "mask_token_id": 22, "markov_rank": 5, "num_draft_layers": 1},
    "dflash": {
        "block_size": 4,
        "num_anchors": 6,
        "mask_token_id": 22,
        "sample_from_anchor": False,
        "num_draft_layers": 1,
    },
    "eagle3": {"ttt_length": 3},
}


def make(algorithm: str) -> Drafter:
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return build_drafter(config, algorithm=algorithm, **KINDS[algorithm]).eval()


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafter_that_was_read_back_is_the_same(tmp_path: Path, algorithm: str, dtype: torch.dtype) -> None:
    drafter = make(algorithm).to(dtype)
    save_drafter(drafter, tmp_path)
    checked = compare_drafters(load_drafter(tmp_path, dtype), drafter)
    assert checked.max_logit_difference == 0
    assert checked.num_logits > 0
    assert checked.num_drafts >= 9


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("spoil", ["swapped", "slightly", "nan"])
def test_weights_that_went_astray_are_found(algorithm: str, spoil: str) -> None:
    drafter, other = make(algorithm), make(algorithm)
    layer = other.layers[0]
    with torch.no_grad():
        if spoil == "swapped":
            layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight = (
                layer.self_attn.v_proj.weight,
                layer.self_attn.k_proj.weight,
            )
        else:
            layer.mlp.down_proj.weight.mul_(1.01 if spoil == "slightly" else torch.nan)
    with pytest.raises(SelfCheckError, match="logits of what was written differ"):
        compare_drafters(other, drafter)


def test_another_draft_vocabulary_is_found() -> None:
    from drafters.export.cut import with_vocabulary

    drafter = make("eagle3")
    with pytest.raises(SelfCheckError, match="another vocabulary"):
        compare_drafters(with_vocabulary(drafter, [1, 2, 3]), with_vocabulary(drafter, [1, 2, 4]))
