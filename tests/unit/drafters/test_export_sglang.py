from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import HIDDEN, KEPT, VOCAB, make
from safetensors.torch import load_file, save_file

from drafters.checkpoint import CheckpointFormatError
from drafters.export.formats import CannotExportError, Tables
from drafters.export.sglang import load_sglang, to_sglang

EXPRESSIBLE = [
    ("dspark", "qwen3"),
    ("dspark_bare", "qwen3"),
    ("dspark_gated", "qwen3"),
    ("dspark_rnn", "qwen3"),
    ("dflash_masks", "qwen3"),
    ("eagle3_llama", "qwen3"),
    ("eagle3_llama", "llama"),
    ("eagle3_llama", "qwen2"),
    ("eagle3_llama", "gemma4"),
    ("eagle3_llama", "biased"),
    ("eagle3_llama_cut", "qwen3"),
]


def written(tmp_path: Path, kind: str, target: str = "qwen3", **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    to_sglang(make(kind, target, **settings)).save(tmp_path)
    return json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("kind", "target"), EXPRESSIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_reads_back_as_the_same_drafter(
    tmp_path: Path, kind: str, target: str, dtype: torch.dtype
) -> None:
    drafter = make(kind, target).to(dtype)
    to_sglang(drafter).save(tmp_path)
    loaded = load_sglang(tmp_path, Tables.of(drafter), dtype)
    before, after = drafter.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.settings.target_layer_ids == drafter.settings.target_layer_ids
    assert loaded.settings.num_drafts == drafter.settings.num_drafts
    assert loaded.logit_softcap == drafter.logit_softcap


def test_eagle3_is_written_as_its_class_reads_it(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "eagle3_llama")
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": VOCAB,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    midlayer = {
        "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight",
        "midlayer.self_attn.o_proj.weight", "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight",
        "midlayer.mlp.down_proj.weight", "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight",
        "midlayer.post_attention_layernorm.weight",
    }  # fmt: skip
    assert set(tensors) == midlayer | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert tensors["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape[1] == 2 * HIDDEN


def test_uncut_eagle3_maps_every_token_to_itself(tmp_path: Path) -> None:
    _, tensors = written(tmp_path, "eagle3_llama")
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["d2t"].tolist() == [0] * VOCAB
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["t2d"].tolist() == [True] * VOCAB


def test_cut_eagle3_maps_by_offsets(tmp_path: Path) -> None:
    drafter = make("eagle3_llama_cut")
    config, tensors = written(tmp_path, "eagle3_llama_cut")
    assert config["draft_vocab_size"] == len(KEPT)
    assert config["vocab_size"] == VOCAB
    assert tensors["d2t"].tolist() == [1, 1, 3, 4, 18]
    assert tensors["t2d"].nonzero().squeeze(1).tolist() == KEPT
    assert torch.equal(tensors["lm_head.weight"], drafter.lm_head.weight[KEPT])


def test_dflash_is_written_as_its_class_reads_it(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "dflash_masks")
    assert config["architectures"] == ["DFlashDraftModel"]
    assert (config["model_type"], config["block_size"], config["num_target_layers"]) == ("qwen3", 4, 8)
    assert config["dflash_config"] == {"mask_token_id": VOCAB - 1, "target_layer_ids": [1, 2, 3, 4, 5]}
    assert "auto_map" not in config
    assert {name.partition(".")[0] for name in tensors} == {"fc", "hidden_norm", "norm", "layers"}


def test_dspark_is_written_as_its_class_reads_it(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "dspark_rnn")
    expected = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "markov_rank": 5,
        "markov_head_type": "rnn",
        "enable_confidence_head": True,
        "confidence_head_with_markov": False,
        "block_size": 4,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["dflash_config"]["projector_type"] == "dspark"
    assert "auto_map" not in config
    assert "speculators_model_type" not in config, "that class refuses drafters of the other format by it"
    heads = {name for name in tensors if name.partition(".")[0] in ("markov_head", "confidence_head")}
    assert heads == {
        "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "markov_head.joint_proj.weight",
        "markov_head.joint_proj.bias", "confidence_head.proj.weight", "confidence_head.proj.bias",
    }  # fmt: skip
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(tensors)


def test_layer_ids_count_layer_outputs(tmp_path: Path) -> None:
    config, _ = written(tmp_path, "dspark", target_layer_ids=(0, 2, 6))
    assert config["dflash_config"]["target_layer_ids"] == [0, 2, 6]


@pytest.mark.parametrize(
    ("kind", "target", "settings", "line"),
    [
        ("eagle3", "qwen3", {}, r"drafter\.layout: llama"),
        ("eagle3", "llama", {}, r"drafter\.layout: llama"),
        ("eagle3", "gemma4", {}, r"drafter\.algorithm: eagle3 with drafter\.layout: llama"),
        ("eagle3_llama", "qwen3", {"num_draft_layers": 2}, r"drafter\.num_draft_layers: 1"),
        ("dflash", "qwen3", {}, r"drafter\.sample_from_anchor: false"),
        ("dspark_masks", "qwen3", {}, r"drafter\.sample_from_anchor: true"),
        ("dspark_no_markov", "qwen3", {}, r"drafter\.markov_rank: 256"),
        ("dspark", "llama", {}, r"drafter\.algorithm: eagle3 with drafter\.layout: llama"),
        ("dflash_masks", "gemma4", {}, r"drafter\.algorithm: eagle3 with drafter\.layout: llama"),
        ("dspark", "qwen3", {"target_layer_ids": (-1, 3)}, r"drafter\.target_layer_ids from 0 on"),
        ("dspark", "qwen3", {"permute_context": True}, r"drafter\.permute_context: false"),
        ("dspark", "gelu", {}, r"its MLPs use silu.*drafter\.algorithm: eagle3 with drafter\.layout: llama"),
    ],
)
def test_drafters_that_no_sglang_class_computes_are_refused_with_the_recipe_line(
    kind: str, target: str, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(CannotExportError, match=f"SGLang cannot express this drafter: .*{line}"):
        to_sglang(make(kind, target, **settings))


def spoil(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()} | tensors, path)


def test_ids_where_offsets_belong_are_refused(tmp_path: Path) -> None:
    drafter = make("eagle3_llama_cut")
    to_sglang(drafter).save(tmp_path)
    spoil(tmp_path, d2t=torch.tensor(KEPT))
    with pytest.raises(CheckpointFormatError, match="d2t must be offsets"):
        load_sglang(tmp_path, Tables.of(drafter))


def test_two_maps_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    drafter = make("eagle3_llama_cut")
    to_sglang(drafter).save(tmp_path)
    spoil(tmp_path, t2d=torch.ones(VOCAB, dtype=torch.bool))
    with pytest.raises(CheckpointFormatError, match="t2d must be bool, true for exactly"):
        load_sglang(tmp_path, Tables.of(drafter))


@pytest.mark.parametrize("change", [{"architectures": ["Other"]}, {"dflash_config": None}, {"block_size": 0}])
def test_config_that_is_no_drafters_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    drafter = make("dflash_masks")
    to_sglang(drafter).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointFormatError, match=r"config\.json"):
        load_sglang(tmp_path, Tables.of(drafter))


def test_eagle3_with_biases_is_refused() -> None:
    drafter = make("eagle3_llama")
    drafter.config.attention_bias = True  # a version that took the target's biases could have written it
    with pytest.raises(CannotExportError, match="no biases"):
        to_sglang(drafter)


@pytest.mark.parametrize("target", ["gemma4", "biased", "gelu"])
def test_servable_layout_is_servable_whatever_the_target_is(target: str) -> None:
    config = make("eagle3_llama", target).config
    assert (config.hidden_act, config.attention_bias, config.mlp_bias) == ("silu", False, False)
