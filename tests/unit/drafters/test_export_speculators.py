from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import KEPT, VOCAB, make
from safetensors.torch import load_file

from drafters.checkpoint import CheckpointFormatError
from drafters.export.formats import CannotExportError, ServedTarget, Tables
from drafters.export.speculators import load_speculators, to_speculators

TARGET = ServedTarget("Qwen/Tiny", ("Qwen3ForCausalLM",))
EXPRESSIBLE = [
    ("dspark", "qwen3"),
    ("dspark_bare", "qwen3"),
    ("dspark_masks", "qwen3"),
    ("dflash", "qwen3"),
    ("dflash_masks", "qwen3"),
    ("eagle3", "qwen3"),
    ("eagle3", "llama"),
    ("eagle3", "biased"),
    ("eagle3_llama", "gemma4"),
    ("eagle3_llama", "llama"),
    ("eagle3_cut", "qwen3"),
    ("eagle3_llama_cut", "qwen3"),
]


def written(tmp_path: Path, kind: str, target: str = "qwen3", **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    to_speculators(make(kind, target, **settings), TARGET).save(tmp_path)
    return json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("kind", "target"), EXPRESSIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_reads_back_as_the_same_drafter(
    tmp_path: Path, kind: str, target: str, dtype: torch.dtype
) -> None:
    drafter = make(kind, target).to(dtype)
    to_speculators(drafter, TARGET).save(tmp_path)
    loaded = load_speculators(tmp_path, Tables.of(drafter), dtype)
    before, after = drafter.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("target_layer_ids", "num_drafts", "sample_from_anchor", "mask_token_id", "layout"):
        assert getattr(loaded.settings, name) == getattr(drafter.settings, name)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("dspark", "aux_hidden_state_layer_ids"), ("dflash", "aux_hidden_state_layer_ids"),
     ("eagle3", "eagle_aux_hidden_state_layer_ids")],
)  # fmt: skip
def test_layer_ids_are_ours_plus_one(tmp_path: Path, kind: str, key: str) -> None:
    config, _ = written(tmp_path, kind, target_layer_ids=(0, 2, 3, 5, 6))
    assert config[key] == [1, 3, 4, 6, 7]


def test_embedding_output_is_their_layer_zero(tmp_path: Path) -> None:
    config, _ = written(tmp_path, "dspark", target_layer_ids=(-1, 3))
    assert config["aux_hidden_state_layer_ids"] == [0, 4]


@pytest.mark.parametrize(
    ("kind", "from_anchor", "tokens"),
    [("dspark", True, 4), ("dspark_masks", False, 3), ("dflash", True, 4), ("dflash_masks", False, 3)],
)
def test_sample_from_anchor_is_written_as_trained(tmp_path: Path, kind: str, from_anchor: bool, tokens: int) -> None:
    config, _ = written(tmp_path, kind)
    assert config["sample_from_anchor"] is from_anchor
    assert config["speculators_config"]["proposal_methods"] == [
        {"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    ]


def test_readers_of_dflash_from_the_anchor_are_warned_of() -> None:
    (warning,) = to_speculators(make("dflash"), TARGET).warnings
    assert "sample_from_anchor" in warning
    assert to_speculators(make("dflash_masks"), TARGET).warnings == ()
    assert to_speculators(make("dspark"), TARGET).warnings == ()


def test_soft_capped_targets_are_warned_of() -> None:
    (warning,) = to_speculators(make("eagle3_llama", "gemma4"), TARGET).warnings
    assert "soft-cap" in warning


def test_eagle3_has_every_key(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "eagle3")
    expected = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": VOCAB,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["speculators_version"]
    assert config["speculators_config"]["algorithm"] == "eagle3"
    assert config["speculators_config"]["default_proposal_method"] == "greedy"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "Qwen/Tiny",
        "architectures": ["Qwen3ForCausalLM"],
    }
    layers = config["transformer_layer_config"]
    assert (layers["model_type"], layers["num_hidden_layers"], layers["vocab_size"]) == ("qwen3", 1, VOCAB)
    assert layers["rope_theta"] == layers["rope_parameters"]["rope_theta"]
    assert {"lm_head.weight", "embed_tokens.weight"} <= set(tensors)
    assert not {"d2t", "t2d"} & set(tensors)


def test_cut_eagle3_maps_by_offsets(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "eagle3_cut")
    assert config["draft_vocab_size"] == len(KEPT)
    assert config["transformer_layer_config"]["vocab_size"] == VOCAB
    assert tensors["d2t"].tolist() == [1, 1, 3, 4, 18]
    assert tensors["t2d"].nonzero().squeeze(1).tolist() == KEPT
    assert len(tensors["lm_head.weight"]) == len(KEPT)


@pytest.mark.parametrize(("kind", "architecture"), [("dflash", "DFlashSpeculator"), ("dspark", "DSparkSpeculator")])
def test_block_drafters_have_every_key(tmp_path: Path, kind: str, architecture: str) -> None:
    config, tensors = written(tmp_path, kind)
    assert config["architectures"] == [architecture]
    assert config["sliding_window_non_causal"] is False
    assert (config["block_size"], config["mask_token_id"], config["draft_vocab_size"]) == (4, VOCAB - 1, VOCAB)
    heads = {
        "markov_rank": 5,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    assert {name: config.get(name) for name in heads} == (heads if kind == "dspark" else dict.fromkeys(heads))
    assert "lm_head.weight" in tensors
    assert "embed_tokens.weight" not in tensors, "servers of block drafters always take the target's"


@pytest.mark.parametrize("kind", ["dspark_gated", "dspark_rnn"])
def test_markov_heads_that_vllm_does_not_read_are_refused(kind: str) -> None:
    with pytest.raises(CannotExportError, match=r"markov_w1 and markov_w2 only.*drafter\.markov_head_type: vanilla"):
        to_speculators(make(kind), TARGET)


@pytest.mark.parametrize(
    ("kind", "target", "settings", "line"),
    [
        ("dspark_no_markov", "qwen3", {}, r"drafter\.markov_rank: 256"),
        ("dspark", "gemma4", {}, r"drafter\.algorithm: eagle3 with drafter\.layout: llama"),
        ("dflash", "llama", {}, r"drafter\.algorithm: eagle3 with drafter\.layout: llama"),
        ("eagle3", "gemma4", {}, r"drafter\.algorithm: eagle3 with drafter\.layout: llama"),
        ("eagle3", "qwen2", {}, r"drafter\.layout: llama"),
        ("eagle3", "qwen3", {"num_draft_layers": 2}, r"drafter\.num_draft_layers: 1"),
        ("dflash", "qwen3", {"permute_context": True}, r"drafter\.permute_context: false"),
    ],
)
def test_drafters_that_no_vllm_class_computes_are_refused_with_the_recipe_line(
    kind: str, target: str, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(CannotExportError, match=f"vLLM cannot express this drafter: .*{line}"):
        to_speculators(make(kind, target, **settings), TARGET)


@pytest.mark.parametrize(
    "change", [{"speculators_model_type": "mtp"}, {"norm_before_residual": True}, {"transformer_layer_config": None}]
)
def test_config_that_is_no_drafter_of_ours_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    drafter = make("eagle3")
    to_speculators(drafter, TARGET).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointFormatError):
        load_speculators(tmp_path, Tables.of(drafter))


@pytest.mark.parametrize("kind", ["dspark", "eagle3_cut"])
def test_only_uncut_eagle3_can_be_cut(kind: str) -> None:
    from drafters.export.cut import with_vocabulary

    with pytest.raises(CannotExportError, match="leave out --draft-vocab-size"):
        with_vocabulary(make(kind), KEPT)
