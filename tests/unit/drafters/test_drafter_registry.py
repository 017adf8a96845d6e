import subprocess
import sys
from typing import get_args

import pytest
import torch

from drafters import build_drafter
from drafters.config import DrafterConfig
from drafters.registry import (
    ALGORITHMS,
    FAMILIES,
    algorithm_of_architecture,
    check_target,
    find_algorithm,
    find_family,
)
from services.contracts import LastRows


def test_every_algorithm_of_the_settings_loads_under_its_own_name():
    assert set(ALGORITHMS) == set(get_args(DrafterConfig.model_fields["algorithm"].annotation))
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.load().algorithm == name


def test_every_family_loads_and_has_an_architecture_of_its_own():
    families = {find_family(model_type) for model_type in FAMILIES}
    assert {family.name for family in families} == {"gemma4", "llama", "qwen2", "qwen3"}
    assert len({family.architecture_prefix for family in families}) == len(families)


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("qwen3", "qwen3"),
        ("qwen3_moe", "qwen3"),
        ("gemma4_text", "gemma4"),
        ("gemma4_unified_text", "gemma4"),
        ("qwen2", "qwen2"),
        ("llama", "llama"),
        ("mistral", "llama"),
        ("deepseek_v3", "llama"),
        ("something_of_next_year", "llama"),
    ],
)
def test_model_type_names_its_family(model_type, family):
    assert find_family(model_type).name == family


@pytest.mark.parametrize(
    ("architecture", "model_type", "has_heads", "algorithm"),
    [
        ("Qwen3DSparkModel", "qwen3", True, "dspark"),
        ("Qwen3DSparkModel", "qwen3", False, "dflash"),
        ("Gemma4DSparkModel", "gemma4_text", True, "dspark"),
        ("Gemma4Eagle3Model", "gemma4_unified_text", False, "eagle3"),
        ("LlamaDSparkModel", "llama", False, "dflash"),
    ],
)
def test_architecture_names_its_algorithm(architecture, model_type, has_heads, algorithm):
    assert algorithm_of_architecture(architecture, model_type, has_heads=has_heads) == algorithm


def test_architecture_of_another_family_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'Qwen3DSparkModel'; there is: Gemma4DSparkModel, Gemma4Eagle3Model"):
        algorithm_of_architecture("Qwen3DSparkModel", "gemma4_text", has_heads=True)


DENSE = {
    "model_type": "new",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-6,
}


def test_targets_of_known_families_and_llama_like_ones_are_accepted():
    check_target({"model_type": "qwen3"})
    check_target(DENSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": None, "rms_norm_eps": None}, "'new'.*no number for num_attention_heads, rms_norm_eps"),
        ({"intermediate_size": [32, 32]}, "no number for intermediate_size"),
        ({"is_encoder_decoder": True}, "encoder and decoder"),
        ({"logits_scaling": 8.0}, r"scales its logits \(logits_scaling 8.0\)"),
    ],
)
def test_target_that_is_no_llama_like_decoder_is_refused_by_what_it_lacks(changes, message):
    with pytest.raises(ValueError, match=message):
        check_target(DENSE | changes)


@pytest.mark.parametrize("loss_mask", [[0, 1, 1, 1, 0, 1, 0, 1, 1], [1, 1, 0], [0, 0], [1], [1, 1, 1, 1]])
@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_needed_rows_are_the_rows_that_the_contract_captures(target_config, algorithm, loss_mask):
    rows = LastRows(find_algorithm(algorithm).last_rows).select(loss_mask)
    drafter = build_drafter(target_config, algorithm, target_layer_ids=(0, 2), mask_token_id=1, num_draft_layers=1)
    needed = drafter.needed_rows(torch.tensor([loss_mask]))
    assert needed[0].nonzero().flatten().tolist() == rows


def test_driver_can_ask_without_importing_torch():
    code = (
        "import sys, drafters, drafters.config, drafters.registry as r; "
        "r.check_target({'model_type': 'gemma4_text'}); "
        "assert r.find_algorithm('dspark').last_rows == 'between'; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
