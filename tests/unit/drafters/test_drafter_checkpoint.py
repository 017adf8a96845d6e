import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters import build_drafter, copy_target_embeddings, load_drafter, save_drafter
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
        {"markov_rank": 0, "enable_confidence_head": False},
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


def test_weights_are_stored_in_the_dtype_asked_for_and_loaded_in_another(make_drafter, tmp_path):
    drafter = make_drafter()
    save_drafter(drafter, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_drafter(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.fc.weight, drafter.fc.weight.bfloat16().float())


def test_given_state_dict_is_what_is_written(make_drafter, tmp_path):
    drafter = make_drafter()
    gathered = {name: torch.full_like(tensor, 0.25) for name, tensor in drafter.state_dict().items()}
    save_drafter(drafter, tmp_path, state_dict=gathered)
    assert load_drafter(tmp_path).fc.weight.unique().tolist() == [0.25]


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
        ({"architectures": ["Qwen3Eagle3Model"]}, "'Qwen3Eagle3Model'; there is: Qwen3DSparkModel"),
        ({"model_type": "llama"}, "model type 'llama'; there is: qwen3"),
        ({"block_size": None}, "lacks 'block_size'"),
        ({"architectures": None}, "lacks 'architectures'"),
        ({"target_layer_ids": [0, 2, 5]}, "the last is never captured"),
        ({"markov_head_type": "lstm"}, "markov_head_type"),
    ],
)
def test_config_of_no_known_drafter_is_refused_by_name(make_drafter, tmp_path, changes, message):
    save_drafter(make_drafter(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointFormatError, match=message):
        load_drafter(tmp_path)


def test_missing_and_broken_files_are_named(make_drafter, tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"cannot read .*config\.json"):
        load_drafter(tmp_path)
    save_drafter(make_drafter(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointFormatError, match=r"cannot read .*model\.safetensors"):
        load_drafter(tmp_path)


def write_target(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_embedding_and_head_are_copied_from_the_target(make_drafter, tmp_path, prefix):
    drafter = make_drafter()
    embedding, head = torch.randn(23, 16), torch.randn(23, 16)
    write_target(
        tmp_path,
        {f"{prefix}embed_tokens.weight": embedding, "lm_head.weight": head},
        tie_word_embeddings=False,
    )
    copy_target_embeddings(drafter, tmp_path)
    assert torch.equal(drafter.embed_tokens.weight, embedding)
    assert torch.equal(drafter.lm_head.weight, head)
    assert not drafter.lm_head.weight.requires_grad


def test_tied_target_gives_its_embedding_twice(make_drafter, tmp_path):
    drafter, embedding = make_drafter(), torch.randn(23, 16)
    write_target(tmp_path, {"model.embed_tokens.weight": embedding}, tie_word_embeddings=True)
    copy_target_embeddings(drafter, tmp_path)
    assert torch.equal(drafter.lm_head.weight, embedding)
    assert drafter.lm_head.weight.data_ptr() != drafter.embed_tokens.weight.data_ptr()


def test_embeddings_in_several_files_are_found(make_drafter, tmp_path):
    drafter = make_drafter()
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    save_file({"model.embed_tokens.weight": torch.ones(23, 16)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": torch.full((23, 16), 2.0)}, tmp_path / "model-00002-of-00002.safetensors")
    copy_target_embeddings(drafter, tmp_path)
    assert drafter.embed_tokens.weight.unique().tolist() == [1.0]
    assert drafter.lm_head.weight.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(1)}, r"one tensor named embed_tokens\.weight, it has: none"),
        ({"model.embed_tokens.weight": torch.zeros(23, 16)}, r"no lm_head\.weight, though"),
        (
            {"model.embed_tokens.weight": torch.zeros(24, 16), "lm_head.weight": torch.zeros(23, 16)},
            r"embed_tokens\.weight is \[24, 16\], but the drafter's is \[23, 16\]",
        ),
    ],
)
def test_target_without_fitting_embeddings_is_refused(make_drafter, tmp_path, tensors, message):
    write_target(tmp_path, tensors, tie_word_embeddings=False)
    with pytest.raises(CheckpointFormatError, match=message):
        copy_target_embeddings(make_drafter(), tmp_path)


def test_target_without_safetensors_is_refused(make_drafter, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointFormatError, match=r"has no \*\.safetensors"):
        copy_target_embeddings(make_drafter(), tmp_path)


def test_a_loaded_drafters_config_builds_nothing_it_was_not(make_drafter, target_config, tmp_path):
    save_drafter(make_drafter(), tmp_path)
    loaded = load_drafter(tmp_path)
    rebuilt = build_drafter(
        target_config, **loaded.settings.model_dump()
    )  # settings survive the trip, so a resumed run can build from them
    assert rebuilt.state_dict().keys() == loaded.state_dict().keys()
