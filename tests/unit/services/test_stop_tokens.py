import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from services.errors import TargetError
from services.stop_tokens import find_stop_token_ids


def write_generation_config(folder, eos):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def write_tokenizer(folder, **special):
    vocabulary = {"a": 0, "b": 1, "<end>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.parametrize(("eos", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (0, (0,))])
def test_generation_config_comes_first(tmp_path, eos, expected):
    write_tokenizer(tmp_path, eos_token="<end>")
    write_generation_config(tmp_path, eos)
    assert find_stop_token_ids(tmp_path) == expected


def test_tokenizer_answers_when_generation_config_does_not(tmp_path):
    write_tokenizer(tmp_path, eos_token="<end>")
    write_generation_config(tmp_path, None)
    assert find_stop_token_ids(tmp_path) == (2,)


def test_tokenizer_answers_without_generation_config(tmp_path):
    write_tokenizer(tmp_path, eos_token="<end>")
    assert find_stop_token_ids(tmp_path) == (2,)


def test_target_without_end_token_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(TargetError, match="names no end-of-text token"):
        find_stop_token_ids(tmp_path)
