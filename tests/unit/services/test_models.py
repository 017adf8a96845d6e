from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.errors import TargetError
from services.models import ModelShape, find_model, read_shape

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder with one empty weights file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_shape_is_read_from_the_config(tmp_path: Path) -> None:
    shape = read_shape(write_model(tmp_path, CONFIG))
    assert shape == ModelShape("qwen3", 36, 2560, 151936, 40960, shape.fingerprint)


def test_shape_is_the_text_configs_when_there_is_one(tmp_path: Path) -> None:
    config = {"model_type": "gemma4", "hidden_size": 1, "text_config": {**CONFIG, "model_type": "gemma4_text"}}
    shape = read_shape(write_model(tmp_path, config))
    assert (shape.model_type, shape.num_layers, shape.hidden_size) == ("gemma4_text", 36, 2560)


def test_model_type_is_the_outer_one_when_the_text_config_has_none(tmp_path: Path) -> None:
    text = {key: value for key, value in CONFIG.items() if key != "model_type"}
    assert read_shape(write_model(tmp_path, {"model_type": "outer", "text_config": text})).model_type == "outer"


def test_context_length_is_zero_when_the_config_has_none(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}
    assert read_shape(write_model(tmp_path, config)).max_tokens == 0


@pytest.mark.parametrize("missing", ["model_type", "num_hidden_layers", "hidden_size", "vocab_size"])
def test_config_without_a_number_names_file_and_key(tmp_path: Path, missing: str) -> None:
    folder = write_model(tmp_path, {key: value for key, value in CONFIG.items() if key != missing})
    with pytest.raises(TargetError, match=f"config.json has no '{missing}'"):
        read_shape(folder)


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=rf"cannot read {tmp_path}/config.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_config_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(TargetError, match=r"cannot read .*config\.json"):
        read_shape(tmp_path)


def test_fingerprint_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one", CONFIG), write_model(tmp_path / "other", CONFIG)
    assert read_shape(one).fingerprint == read_shape(other).fingerprint
    assert len(read_shape(one).fingerprint) == 32


def test_fingerprint_changes_with_the_config(tmp_path: Path) -> None:
    before = write_model(tmp_path / "before", CONFIG)
    after = write_model(tmp_path / "after", {**CONFIG, "rope_theta": 1})
    assert read_shape(before).fingerprint != read_shape(after).fingerprint


def test_fingerprint_is_the_same_where_the_weights_were_not_downloaded(tmp_path: Path) -> None:
    """The driver reads a hub model's config alone; its target has the weights too."""
    folder = write_model(tmp_path, CONFIG)
    with_weights = read_shape(folder).fingerprint
    (folder / "model.safetensors").unlink()
    assert read_shape(folder).fingerprint == with_weights


def test_fingerprint_reads_the_index_of_sharded_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path, CONFIG)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    before = read_shape(folder).fingerprint
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"b": "model.safetensors"}}')
    assert read_shape(folder).fingerprint != before


def test_folder_is_found_as_it_is_given(tmp_path: Path) -> None:
    assert find_model(str(tmp_path), weights=True) == tmp_path


@pytest.mark.parametrize("name", ["slipstream-tests/absent", "./no/such/folder", "no spaces allowed"])
def test_model_that_is_neither_folder_nor_on_the_hub_is_refused(name: str) -> None:
    """The tests' environment is offline, so the hub has nothing."""
    with pytest.raises(TargetError, match="neither a folder here nor a model the hub gives") as caught:
        find_model(name, weights=False)
    assert repr(name) in str(caught.value)
    assert "target.model" in str(caught.value)
