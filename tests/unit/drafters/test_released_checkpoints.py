"""Folders of the shape that the reference released its twelve drafters in: random weights, scaled down.

Configs begin as the reference wrote them for `tests/golden`; names and shapes of tensors stand here once more, so that
nothing of what is tested makes what it is tested with.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters import load_drafter, save_drafter
from drafters.checkpoint import CheckpointFormatError

GOLDEN = Path(__file__).parents[2] / "golden"
HIDDEN, VOCAB, MASK, RANK, WIDTH = 32, 199, 198, 8, 64

TARGETS = {  # layers of the target, captured layers
    "qwen3_4b": (36, [1, 9, 17, 25, 33]),
    "qwen3_8b": (36, [1, 9, 17, 25, 33]),
    "qwen3_14b": (40, [1, 10, 19, 28, 37]),
    "gemma4_12b": (48, [5, 17, 29, 41, 46]),
}
ALGORITHMS = {"dspark": "block7", "dflash": "block7", "eagle3": "ttt7"}
RELEASED = [f"{algorithm}_{target}_{tail}" for algorithm, tail in ALGORITHMS.items() for target in TARGETS]
TEMPLATES = {
    ("dspark", "qwen3"): "dspark_qwen3_vanilla",
    ("dspark", "gemma4"): "dspark_gemma4_vanilla",
    ("dflash", "qwen3"): "dflash_qwen3",
    ("dflash", "gemma4"): "dflash_gemma4",
    ("eagle3", "qwen3"): "eagle3_qwen3",
    ("eagle3", "gemma4"): "eagle3_gemma4",
}


def reference_config(name):
    algorithm, family, size, _ = name.split("_")
    num_target_layers, layer_ids = TARGETS[f"{family}_{size}"]
    config = json.loads((GOLDEN / TEMPLATES[algorithm, family] / "case.json").read_text())["draft_config"]
    num_layers = 1 if algorithm == "eagle3" else 5
    config |= {
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "num_target_layers": num_target_layers,
        "target_layer_ids": layer_ids,
        "dtype": "bfloat16",
    }
    if algorithm == "eagle3":
        return config | {"ttt_length": 7, "step_loss_decay": 0.8}
    return config | {"block_size": 7, "num_anchors": 512, "mask_token_id": MASK}


def reference_tensors(algorithm, family):
    """Names and shapes as the format's description has them."""
    heads, key_heads, size = 4, 2 if family == "qwen3" else 1, 16
    inputs = 2 * HIDDEN if algorithm == "eagle3" else HIDDEN
    layer = {
        "self_attn.q_proj.weight": (heads * size, inputs),
        "self_attn.k_proj.weight": (key_heads * size, inputs),
        "self_attn.v_proj.weight": (key_heads * size, inputs),
        "self_attn.o_proj.weight": (HIDDEN, heads * size),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
        "mlp.gate_proj.weight": (WIDTH, HIDDEN),
        "mlp.up_proj.weight": (WIDTH, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, WIDTH),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    if family == "gemma4":
        del layer["self_attn.v_proj.weight"]
        layer |= {
            "pre_feedforward_layernorm.weight": (HIDDEN,),
            "post_feedforward_layernorm.weight": (HIDDEN,),
            "layer_scalar": (1,),
        }
    if algorithm == "eagle3":
        layer["hidden_norm.weight"] = (HIDDEN,)
    shapes = {
        f"layers.{i}.{name}": shape for i in range(1 if algorithm == "eagle3" else 5) for name, shape in layer.items()
    }
    shapes |= {
        "embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "fc.weight": (HIDDEN, 5 * HIDDEN),
        "norm.weight": (HIDDEN,),
    }
    if algorithm != "eagle3":
        shapes["hidden_norm.weight"] = (HIDDEN,)
    if algorithm == "dspark":
        shapes |= {
            "markov_head.markov_w1.weight": (VOCAB, RANK),
            "markov_head.markov_w2.weight": (VOCAB, RANK),
            "confidence_head.proj.weight": (1, HIDDEN + RANK),
            "confidence_head.proj.bias": (1,),
        }
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_reference(folder, name):
    algorithm, family, *_ = name.split("_")
    return write(folder, reference_config(name), reference_tensors(algorithm, family))


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoint_loads_and_is_written_as_it_was(tmp_path, name):
    algorithm, family, *_ = name.split("_")
    folder = write_reference(tmp_path / "reference", name)
    drafter = load_drafter(folder, dtype=torch.bfloat16)
    assert (drafter.algorithm, drafter.family.name) == (algorithm, family)
    save_drafter(drafter, tmp_path / "ours")

    reference, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == reference.keys()
    for tensor in reference:
        assert ours[tensor].dtype == torch.bfloat16
        assert torch.equal(ours[tensor].view(torch.int16), reference[tensor].view(torch.int16)), tensor
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = reference_config(name)
    expected.pop("transformers_version")
    assert {key: config.get(key, "absent") for key in expected} == expected


@pytest.mark.parametrize("name", RELEASED)
def test_second_trip_changes_nothing_at_all(tmp_path, name):
    save_drafter(load_drafter(write_reference(tmp_path / "reference", name)), tmp_path / "first")
    save_drafter(load_drafter(tmp_path / "first"), tmp_path / "second")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("name", [name for name in RELEASED if "gemma4" in name])
@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_gemma_checkpoint_of_newer_transformers_loads_as_the_same_drafter(tmp_path, name, model_type):
    """Its head sizes stand in `per_layer_config`, under the target's layer numbers."""
    algorithm, family, *_ = name.split("_")
    config, tensors = reference_config(name) | {"model_type": model_type}, reference_tensors(algorithm, family)
    older = load_drafter(write(tmp_path / "older", config, tensors))
    heads = {"head_dim": config.pop("global_head_dim"), "num_key_value_heads": config.pop("num_global_key_value_heads")}
    config["per_layer_config"] = {str(layer): heads for layer in range(5, 48, 6)}
    newer = load_drafter(write(tmp_path / "newer", config, tensors))
    assert newer.config.to_dict() == older.config.to_dict()
    save_drafter(newer, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["global_head_dim"], written["num_global_key_value_heads"]) == (16, 1)
    assert written["model_type"] == model_type


@pytest.mark.parametrize("name", ["dspark_qwen3_4b_block7", "dflash_qwen3_8b_block7"])
def test_rope_theta_may_stand_at_the_top_alone(tmp_path, name):
    algorithm, family, *_ = name.split("_")
    config = reference_config(name)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"] * 100
    drafter = load_drafter(write(tmp_path / "older", config, reference_tensors(algorithm, family)))
    assert drafter.config.rope_parameters["rope_theta"] == 1_000_000.0
    save_drafter(drafter, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1_000_000.0


@pytest.mark.parametrize(
    ("config_of", "weights_of", "message"),
    [
        ("dspark_qwen3_4b_block7", "dflash_qwen3_4b_block7", r"missing tensors: confidence_head\.proj\.bias, .*markov"),
        ("dflash_qwen3_4b_block7", "dspark_qwen3_4b_block7", r"unknown tensors: confidence_head\.proj\.bias, .*markov"),
        (
            "dspark_qwen3_4b_block7",
            "eagle3_qwen3_4b_ttt7",
            r"unknown tensors: layers\.0\.hidden_norm\.weight; wrong shapes",
        ),
        ("eagle3_qwen3_4b_ttt7", "dspark_qwen3_4b_block7", r"missing tensors: layers\.0\.hidden_norm\.weight; unknown"),
        (
            "dspark_qwen3_4b_block7",
            "dspark_gemma4_12b_block7",
            r"missing tensors: .*v_proj\.weight.*unknown.*layer_scalar",
        ),
        ("dspark_gemma4_12b_block7", "dspark_qwen3_4b_block7", r"missing tensors: layers\.0\.layer_scalar"),
    ],
)
def test_weights_of_another_drafter_are_refused_by_name(tmp_path, config_of, weights_of, message):
    algorithm, family, *_ = weights_of.split("_")
    folder = write(tmp_path / "mixed", reference_config(config_of), reference_tensors(algorithm, family))
    with pytest.raises(CheckpointFormatError, match=message):
        load_drafter(folder)


def test_weights_of_another_width_are_refused_with_both_shapes(tmp_path):
    name = "dspark_qwen3_4b_block7"
    config = reference_config(name) | {"hidden_size": 40, "vocab_size": 210}
    folder = write(tmp_path / "wide", config, reference_tensors("dspark", "qwen3"))
    with pytest.raises(CheckpointFormatError, match=r"embed_tokens\.weight is \[199, 32\] instead of \[210, 40\]"):
        load_drafter(folder)
