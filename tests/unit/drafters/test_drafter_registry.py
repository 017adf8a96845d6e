import subprocess
import sys
from typing import get_args

import pytest
import torch

from drafters.config import DrafterConfig
from drafters.registry import ALGORITHMS, FAMILIES, algorithm_of_architecture, find_algorithm, find_family
from services.contracts import LastRows


def test_every_algorithm_of_the_settings_loads_under_its_own_name():
    assert set(ALGORITHMS) == set(get_args(DrafterConfig.model_fields["algorithm"].annotation))
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.load().algorithm == name


def test_every_family_loads_under_its_model_type():
    for model_type in FAMILIES:
        assert find_family(model_type).name == model_type


def test_architecture_names_its_algorithm():
    assert algorithm_of_architecture("Qwen3DSparkModel", "qwen3") == "dspark"


@pytest.mark.parametrize("loss_mask", [[0, 1, 1, 1, 0, 1, 0, 1, 1], [1, 1, 0], [0, 0], [1], [1, 1, 1, 1]])
def test_needed_rows_are_the_rows_that_the_contract_captures(make_drafter, loss_mask):
    rows = LastRows(find_algorithm("dspark").last_rows).select(loss_mask)
    needed = make_drafter().needed_rows(torch.tensor([loss_mask]))
    assert needed[0].nonzero().flatten().tolist() == rows


def test_driver_can_ask_without_importing_torch():
    code = (
        "import sys, drafters, drafters.config, drafters.registry as r; "
        "assert r.find_algorithm('dspark').last_rows == 'between'; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
