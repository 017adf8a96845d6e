"""The evaluator: holds the target, decodes the held-out prompts with one drafter checkpoint after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafters.checkpoint import load_drafter
from drafters.drafter import Drafter
from drafters.registry import find_family
from evaluation.accept import is_greedy
from evaluation.config import EvaluationConfig
from evaluation.decode import SpeculativeOutput, greedy_generate, speculative_generate
from evaluation.lossless import find_divergence
from evaluation.report import Divergence, Report, summarize
from services.errors import CheckpointError, PromptError, TargetError
from services.models import find_model
from services.stop_tokens import find_stop_token_ids


class Evaluator:
    """Measures drafters of one target on one set of prompts; an actor through `ray.remote(Evaluator)`.

    The target is loaded once, and its own greedy output is computed once for each prompt.
    """

    def __init__(
        self,
        model: str,
        prompts: list[list[int]],
        config: EvaluationConfig,
        stop_token_ids: Sequence[int] | None = None,
        dtype: str = "float32",
    ) -> None:
        """Load the target. Sets the process's torch threads if the config names them.

        Args:
            model: Folder or hub name of the target.
            prompts: Token ids with the generation prompt; the first `config.max_samples` are decoded.
            config: The recipe's evaluation section.
            stop_token_ids: None takes the target's own (`generation_config.json`, else the tokenizer's).
            dtype: Of target and drafter: float32, bfloat16 or float16.

        Raises:
            PromptError: There is no prompt to decode, or one is empty.
            TargetError: The target cannot be loaded.
        """
        self._prompts = prompts[: config.max_samples]
        if not self._prompts:
            raise PromptError(
                f"nothing to evaluate: {len(prompts)} held-out prompts, evaluation.max_samples={config.max_samples}. "
                "Give prompts.heldout at least one prompt, or switch evaluation off."
            )
        for index, prompt in enumerate(self._prompts):
            if not prompt:
                raise PromptError(f"held-out prompt {index} has no tokens")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = torch.device("cuda" if config.num_gpus > 0 else "cpu")
        folder = find_model(model, weights=True)
        self._target = _load_target(folder, self._dtype, self._device)
        self._stop_token_ids = find_stop_token_ids(folder) if stop_token_ids is None else tuple(stop_token_ids)
        self._references: dict[int, list[int]] = {}

    def evaluate(self, checkpoint: str, label: str) -> Report:
        """Decode every prompt with the drafter of a native checkpoint folder.

        Above temperature 0 the output is a sample and `lossless` is None. At temperature 0 it is compared with the
        target's own greedy output.

        Args:
            checkpoint: Folder with `config.json` and `model.safetensors`.
            label: Copied into the report.

        Raises:
            CheckpointError: The folder holds no drafter, or one of another target.
            PromptError: Every prompt ended at its first token, so no round was decoded.
        """
        drafter = self._load_drafter(checkpoint)
        config = self._config
        began_s = time.perf_counter()
        output = speculative_generate(
            self._target,
            drafter,
            self._prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_token_ids=self._stop_token_ids,
            confidence_threshold=config.confidence_threshold,
            seed=config.seed,
        )
        seconds = time.perf_counter() - began_s
        if not any(output.accepted_lengths):
            raise PromptError(
                f"all {len(self._prompts)} held-out prompts end at their first token (stop tokens "
                f"{list(self._stop_token_ids)}): do they end with the chat template's generation prompt?"
            )
        return summarize(
            output.accepted_lengths,
            output.proposal_lengths,
            output.accepted_draft_lengths,
            label=label,
            checkpoint=checkpoint,
            temperature=config.temperature,
            seed=config.seed,
            num_tokens=sum(map(len, output.output_ids)) - sum(map(len, self._prompts)),
            seconds=seconds,
            divergences=self._divergences(output) if is_greedy(config.temperature) else None,
        )

    def _load_drafter(self, checkpoint: str) -> Drafter:
        try:
            drafter = load_drafter(checkpoint, dtype=self._dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the drafter at {checkpoint}: {error}") from error
        _check_fits(drafter, self._target, checkpoint)
        return drafter.to(self._device)

    def _divergences(self, output: SpeculativeOutput) -> list[Divergence]:
        found = (
            find_divergence(
                self._target, ours, self._reference(sample), sample=sample, num_prompt_tokens=len(self._prompts[sample])
            )
            for sample, ours in enumerate(output.output_ids)
        )
        return [divergence for divergence in found if divergence is not None]

    def _reference(self, sample: int) -> list[int]:
        """The target's own greedy output for one prompt, prompt included."""
        if sample not in self._references:
            self._references[sample] = greedy_generate(
                self._target,
                self._prompts[sample],
                max_new_tokens=self._config.max_new_tokens,
                stop_token_ids=self._stop_token_ids,
            )
        return self._references[sample]


def _load_target(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TargetError(f"cannot load the target at {folder} for evaluation: {error}") from error
    nn.Module.to(model, device)  # transformers wraps its own `to` in a type that mypy cannot call
    return model.eval()


def _check_fits(drafter: Drafter, target: PreTrainedModel, checkpoint: str) -> None:
    config = target.config.get_text_config()
    if find_family(drafter.target_model_type) is not find_family(config.model_type):
        raise CheckpointError(
            f"the drafter at {checkpoint} was made for a {drafter.target_model_type} target, this one is a "
            f"{config.model_type}: drafters serve the family that they were trained with"
        )
    for name in ("vocab_size", "hidden_size"):
        ours, targets = getattr(drafter.config, name), getattr(config, name)
        if ours != targets:
            raise CheckpointError(
                f"the drafter at {checkpoint} has {name} {ours}, the target has {targets}: "
                "it was made for another target"
            )
    layer_ids = drafter.settings.target_layer_ids or ()
    if max(layer_ids) > config.num_hidden_layers - 1:
        raise CheckpointError(
            f"the drafter at {checkpoint} reads target layers {list(layer_ids)}, the target has "
            f"{config.num_hidden_layers} layers: it was made for another target"
        )
