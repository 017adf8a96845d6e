"""Our exports for vLLM, loaded by the library whose format they are in, which must compute what our drafter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from drafters import FeatureBatch, build_drafter, copy_target_embeddings
from drafters.drafter import Drafter
from drafters.export.cut import with_vocabulary
from drafters.export.formats import ServedTarget
from drafters.export.speculators import to_speculators

speculators = pytest.importorskip(
    "speculators",
    reason="the speculators package is not installed: pip install speculators, in an environment of its own",
)

VOCAB, HIDDEN, LENGTH = 32, 16, 20
BLOCK: dict[str, Any] = {"num_draft_layers": 2, "block_size": 4, "num_anchors": 3, "mask_token_id": VOCAB - 1}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def new_drafter(target: Path, **settings: Any) -> Drafter:
    torch.manual_seed(7)
    drafter = build_drafter(Qwen3Config.from_pretrained(target), **settings)
    copy_target_embeddings(drafter, target)
    return drafter.eval()


def load(drafter: Drafter, target: Path, folder: Path) -> Any:
    to_speculators(drafter, ServedTarget(str(target), ("Qwen3ForCausalLM",))).save(folder)
    config = speculators.SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = speculators.SpeculatorModel.from_pretrained(folder, config=config)
    model.load_verifier_weights()
    return model.float().eval()


def make_batch(drafter: Drafter) -> FeatureBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB - 1, (1, LENGTH), generator=generator)
    width = len(drafter.settings.target_layer_ids or ()) * HIDDEN
    context = torch.randn(1, LENGTH, width, generator=generator)
    ones = torch.ones(1, LENGTH, dtype=torch.long)
    return FeatureBatch.from_tensors(ids, ones, ones, context, torch.randn(1, LENGTH, HIDDEN, generator=generator))


@pytest.mark.parametrize("layout", ["reference", "llama"])
@pytest.mark.parametrize("kept", [None, [0, 3, 4, 9, 17, 30]])
def test_eagle3_drafts_what_ours_drafts(target: Path, tmp_path: Path, layout: str, kept: list[int] | None) -> None:
    drafter = new_drafter(target, algorithm="eagle3", layout=layout, ttt_length=3)
    if kept:
        drafter = with_vocabulary(drafter, kept)
    model, batch = load(drafter, target, tmp_path), make_batch(drafter)
    assert model.target_layer_ids == [layer + 1 for layer in drafter.settings.target_layer_ids or ()]
    with torch.no_grad():
        steps = model(
            hidden_states=batch.target_hidden_states[:, :-1],
            input_ids=batch.input_ids[:, 1:],
            document_ids=torch.zeros(1, LENGTH - 1, dtype=torch.long),
            ttt_steps=3,
        )
        ours = drafter.training_forward(batch, return_logits=True).draft_logits
    assert ours is not None
    for step, theirs in enumerate(steps):
        drafted = theirs if model.d2t is None else theirs + model.d2t[theirs]
        live = LENGTH - 2 - step  # later positions embed padding
        assert drafted[0, :live].tolist() == ours[step, 0, :live].argmax(-1).tolist()
    assert (model.d2t is None) == (kept is None)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "dflash", "sample_from_anchor": False},
        {"algorithm": "dflash"},
        {"algorithm": "dspark", "markov_rank": 5},
        {"algorithm": "dspark", "markov_rank": 5, "confidence_head_with_markov": False, "sample_from_anchor": False},
    ],
)
def test_block_drafters_compute_what_ours_compute(target: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    drafter = new_drafter(target, **BLOCK, **settings)
    model, batch = load(drafter, target, tmp_path), make_batch(drafter)
    positions = torch.tensor([[2, 5, 9]])
    model._build_attention_mask = chosen_anchors(model, positions[0])
    with torch.no_grad():
        hidden, logits, *_, indices = model._backbone_forward(
            batch.target_hidden_states,
            batch.input_ids,
            batch.loss_mask.long(),
            batch.target_last_hidden_states,
            torch.zeros(1, LENGTH, dtype=torch.long),
            max_anchors=3,
        )
        theirs = logits.view(3, 4, VOCAB)
        if settings["algorithm"] == "dspark":
            tokens = batch.input_ids[0, indices].view(3, 4)
            previous = tokens if drafter.settings.sample_from_anchor else torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
            theirs = theirs + model.markov_head.block_bias(prev_token_ids=previous, hidden_states=hidden.view(3, 4, -1))
        anchors = (positions, torch.ones_like(positions, dtype=torch.bool))
        ours = drafter.training_forward(batch, anchors=anchors, return_logits=True).draft_logits
    assert ours is not None
    first = 0 if drafter.settings.sample_from_anchor else 1
    torch.testing.assert_close(theirs[:, first:], ours[0], rtol=1e-4, atol=1e-4)
    assert model.config.speculators_config.proposal_methods[0].speculative_tokens == 4 - first


def chosen_anchors(model: Any, positions: torch.Tensor) -> Any:
    """Their mask, over anchors that are given instead of drawn."""

    def build(loss_mask: torch.Tensor, max_anchors: int, document_ids: torch.Tensor, device: Any) -> Any:
        mask = model._create_attention_mask(
            document_ids=document_ids,
            total_seq_len=loss_mask.shape[1],
            anchor_positions=positions,
            device=device,
            sliding_window=None,
        )
        return mask, None, positions, torch.ones_like(positions, dtype=torch.bool)

    return build
