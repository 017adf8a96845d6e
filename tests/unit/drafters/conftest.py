"""Tiny drafters and batches: D 16, V 23, three captured layers of a six-layer Qwen3, γ 4."""

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import Qwen3Config

from drafters import FeatureBatch, attention, build_drafter, eagle3_attention, flex
from drafters.config import settings_of

HIDDEN, VOCAB, LAYER_IDS = 16, 23, (0, 2, 4)


@pytest.fixture
def target_config():
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )


@pytest.fixture
def make_drafter(target_config):
    """Drafter with weights large enough that outputs differ clearly."""

    def make(**settings):
        torch.manual_seed(7)
        target_config.initializer_range = 0.3
        defaults = {
            "num_draft_layers": 2,
            "block_size": 4,
            "num_anchors": 6,
            "target_layer_ids": LAYER_IDS,
            "mask_token_id": VOCAB - 1,
            "markov_rank": 5,
        }
        return build_drafter(target_config, **(settings_of(settings.get("algorithm", "dspark"), defaults) | settings))

    return make


@pytest.fixture
def make_batch():
    """Random rows of given lengths, padded at the end; the first five tokens of a row are its prompt."""

    def make(*lengths, seed=3, prompt=5, pad_to=None):
        generator = torch.Generator().manual_seed(seed)
        width = pad_to or max(lengths)
        rows = []
        for length in lengths:
            ids = torch.randint(VOCAB - 1, (length,), generator=generator)
            context = torch.randn(length, len(LAYER_IDS) * HIDDEN, generator=generator)
            last = torch.randn(length, HIDDEN, generator=generator)
            supervised = (torch.arange(length) >= prompt).long()
            rows.append((ids, supervised, torch.ones(length, dtype=torch.long), context, last))
        columns = zip(*rows, strict=True)
        return FeatureBatch.from_tensors(
            *(
                torch.stack([torch.cat([row, row.new_zeros(width - len(row), *row.shape[1:])]) for row in column])
                for column in columns
            )
        )

    return make


@pytest.fixture
def eager_flex(monkeypatch):
    """Drafters take the GPU's path on a CPU: FlexAttention uncompiled, which differentiates if it is let."""
    monkeypatch.setattr(flex, "_compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *rows: None)
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    for module in (attention, eagle3_attention):
        monkeypatch.setattr(module, "uses_flex", lambda device: True)
