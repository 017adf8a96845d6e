import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters import build_drafter, load_drafter, save_drafter
from drafters.checkpoint import CheckpointFormatError


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"markov_head_type": "gated", "confidence_head_with_markov": False},
        {"markov_head_type": "rnn", "ce_loss_alpha": 0.3, "loss_decay_gamma": 2.5, "permute_context": True},
        {"markov_rank": 0, "confidence_head_with_markov": False},
        {"algorithm": "dflash"},
        {"algorithm": "dflash", "sample_from_anchor": False},
    ],
)
def test_saved_drafter_loads_with_the_same_weights_settings_and_loss(make_drafter, make_batch, tmp_path, settings):
    drafter, batch = make_drafter(**settings), make_batch(20)
    save_drafter(drafter, tmp_path / "new" / "step_1")
    loaded = load_drafter(tmp_path / "new" / "step_1", dtype=torch.float32)
    assert not loaded.training
    before, after = drafter.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours = drafter.training_forward(batch, anchor_seeds=[5])
    theirs = loaded.training_forward(batch, anchor_seeds=[5])
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.metrics == theirs.metrics
    assert loaded.settings.model_dump(exclude_defaults=True) == drafter.settings.model_dump(exclude_defaults=True)


def test_frozen_and_trained_weights_stay_so_after_loading(make_drafter, tmp_path):
    drafter = make_drafter()
    save_drafter(drafter, tmp_path)
    frozen = {name for name, weight in load_drafter(tmp_path).named_parameters() if not weight.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight"}


def test_config_says_what_the_native_format_asks_for(make_drafter, tmp_path):
    save_drafter(make_drafter(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_target_layers": 6,
        "layer_types": ["full_attention"] * 2,
        "target_layer_ids": [0, 2, 4],
        "tie_word_embeddings": False,
        "block_size": 4,
        "mask_token_id": 22,
        "num_anchors": 6,
        "markov_rank": 5,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "permute_context" not in config


def test_config_does_not_say_where_the_target_lay(make_drafter, target_config, tmp_path):
    target_config.name_or_path = "/models/somewhere"
    save_drafter(make_drafter(), tmp_path)
    assert "somewhere" not in (tmp_path / "config.json").read_text()


def test_config_leaves_out_what_heads_that_are_not_there_would_have(make_drafter, tmp_path):
    save_drafter(make_drafter(markov_rank=0, enable_confidence_head=False), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "markov_head_type" not in config
    assert "confidence_head_with_markov" not in config


def test_weights_are_stored_in_their_own_dtype_and_loaded_in_another(make_drafter, tmp_path):
    drafter = make_drafter().bfloat16()
    save_drafter(drafter, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_drafter(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.fc.weight, drafter.fc.weight.float())


def test_missing_and_unknown_tensors_are_named(make_drafter, tmp_path):
    save_drafter(make_drafter(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update(extra=tensors.pop("hidden_norm.weight")))
    with pytest.raises(CheckpointFormatError, match=r"missing tensors: hidden_norm\.weight; unknown tensors: extra"):
        load_drafter(tmp_path)


def test_tensor_of_another_shape_is_named_with_both_shapes(make_drafter, tmp_path):
    save_drafter(make_drafter(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"norm.weight": torch.ones(5)}))
    with pytest.raises(CheckpointFormatError, match=r"norm\.weight is \[5\] instead of \[16\]"):
        load_drafter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3MedusaModel"]}, "'Qwen3MedusaModel'; there is: Qwen3DSparkModel, Qwen3Eagle3Model"),
        ({"architectures": ["Qwen3Eagle3Model"]}, "lacks 'ttt_length'"),
        ({"model_type": "llama"}, "no llama drafter architecture 'Qwen3DSparkModel'"),
        ({"block_size": None}, "lacks 'block_size'"),
        ({"architectures": None}, "lacks 'architectures'"),
        ({"target_layer_ids": [0, 2, 5]}, "the last is never captured"),
        ({"markov_head_type": "lstm"}, "markov_head_type"),
        ({"architectures": []}, "no qwen3 drafter architecture 'None'"),
        ({"architectures": "Qwen3DSparkModel"}, "'architectures' must be of type list, not 'Qwen3DSparkModel'"),
        ({"num_target_layers": "6"}, "'num_target_layers' must be of type int, not '6'"),
        ({"hidden_size": "16"}, "(?s)describes no draft layers: .*hidden_size"),
        ({"num_attention_heads": 0}, "describes no draft layers"),
        ({"hidden_act": "relish"}, "describes no draft layers: .*relish"),
        ({"num_hidden_layers": 3}, "(?s)describes no draft layers: .*layer_types"),
    ],
)
def test_config_of_no_known_drafter_is_refused_by_name(make_drafter, tmp_path, changes, message):
    save_drafter(make_drafter(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointFormatError, match=message):
        load_drafter(tmp_path)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("dspark", "target_layer_ids"),
        ("dspark", "mask_token_id"),
        ("dspark", "markov_rank"),
        ("dspark", "num_target_layers"),
        ("dspark", "architectures"),
        ("eagle3", "target_layer_ids"),
        ("eagle3", "ttt_length"),
    ],
)
def test_nothing_is_guessed_where_the_config_says_null(target_config, tmp_path, algorithm, name):
    """For a target of 36 layers and Qwen3's vocabulary there would be defaults."""
    target_config.update({"num_hidden_layers": 36, "layer_types": ["full_attention"] * 36, "vocab_size": 151936})
    target_config.hidden_size = 4
    save_drafter(build_drafter(target_config, algorithm, num_draft_layers=1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: None}))
    with pytest.raises(CheckpointFormatError, match=f"lacks '{name}'"):
        load_drafter(tmp_path)


def test_missing_and_broken_files_are_named(make_drafter, tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"cannot read .*config\.json"):
        load_drafter(tmp_path)
    save_drafter(make_drafter(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointFormatError, match=r"cannot read .*model\.safetensors"):
        load_drafter(tmp_path)


def test_a_loaded_drafters_config_builds_nothing_it_was_not(make_drafter, target_config, tmp_path):
    save_drafter(make_drafter(), tmp_path)
    loaded = load_drafter(tmp_path)
    rebuilt = build_drafter(
        target_config, **loaded.settings.model_dump()
    )  # settings survive the trip, so a resumed run can build from them
    assert rebuilt.state_dict().keys() == loaded.state_dict().keys()
