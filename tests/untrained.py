"""The demo's target with a drafter of it that nobody has trained: what evaluations of a test decode with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import trainer.demo
from drafters.build import build_drafter
from drafters.checkpoint import save_drafter
from drafters.target_weights import copy_target_embeddings

DEMO_TARGET = Path(trainer.demo.__file__).parent / "target"

SMALL = {
    "num_draft_layers": 1, "block_size": 3, "mask_token_id": 3, "markov_rank": 4, "target_layer_ids": (1, 5),
}  # fmt: skip


def save_untrained(folder: Path, *, provenance: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A drafter checkpoint; `provenance` becomes the `target` entry of its file."""
    target = AutoModelForCausalLM.from_pretrained(DEMO_TARGET, dtype=torch.float32)
    torch.manual_seed(0)
    drafter = build_drafter(target.config, **{**SMALL, **settings})
    copy_target_embeddings(drafter, DEMO_TARGET)
    save_drafter(drafter.eval(), folder)
    if provenance is not None:
        (folder / "provenance.json").write_text(json.dumps({"target": provenance}))
    return folder


def write_turns(folder: Path, **tasks: list[str]) -> Path:
    """A folder with a JSONL file a task; underscores in names stand for dashes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in tasks.items():
        lines = [json.dumps({"turns": [prompt, "and then?"]}) for prompt in prompts]
        (folder / f"{name.replace('_', '-')}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
