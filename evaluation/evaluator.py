"""The evaluator: holds the target, decodes the held-out prompts with one drafter checkpoint after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from drafters.drafter import Drafter
from evaluation.accept import is_greedy
from evaluation.config import EvaluationConfig
from evaluation.decode import SpeculativeOutput, plain_generate, speculative_generate
from evaluation.fitting import context_tokens
from evaluation.loading import load_drafter_of, load_target
from evaluation.lossless import find_divergence
from evaluation.origin import check_origin
from evaluation.report import Divergence, Report, summarize
from evaluation.weights import weights_digest
from services.contracts import HeldoutPrompt
from services.errors import CheckpointError, PromptError
from services.models import find_model
from services.stop_tokens import find_stop_token_ids

logger = logging.getLogger(__name__)


class Evaluator:
    """Measures drafters of one target on one set of prompts; an actor through `ray.remote(Evaluator)`.

    The target is loaded once, and its own greedy output is computed once for each prompt.
    """

    def __init__(
        self,
        model: str,
        prompts: Sequence[HeldoutPrompt],
        config: EvaluationConfig,
        stop_token_ids: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> None:
        """Load the target. Sets the process's torch threads if the config names them.

        Args:
            model: Folder or hub name of the target.
            prompts: The first `config.max_samples` are decoded.
            config: The recipe's evaluation section.
            stop_token_ids: None takes the target's own (`generation_config.json`, else the tokenizer's).
            dtype: Of target and drafter: float32, bfloat16 or float16; None takes the config's.

        Raises:
            PromptError: There is no prompt to decode, one is empty, or all are longer than the target's context.
            TargetError: The target cannot be loaded.
        """
        self._domains = [prompt.domain for prompt in prompts[: config.max_samples]]
        self._prompts = [prompt.token_ids for prompt in prompts[: config.max_samples]]
        if not self._prompts:
            raise PromptError(
                f"nothing to evaluate: {len(prompts)} held-out prompts, evaluation.max_samples={config.max_samples}. "
                "Give prompts.heldout at least one prompt, or switch evaluation off."
            )
        for index, prompt in enumerate(self._prompts):
            if not prompt:
                raise PromptError(f"held-out prompt {index} has no tokens")
        self._num_threads = torch.get_num_threads()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config
        self._dtype: torch.dtype = getattr(torch, dtype or config.dtype)
        self._device = torch.device("cuda" if config.num_gpus > 0 else "cpu")
        self._folder = folder = find_model(model, weights=True)
        self._target = load_target(folder, self._dtype, self._device)
        self._stop_token_ids = find_stop_token_ids(folder) if stop_token_ids is None else tuple(stop_token_ids)
        self._num_skipped = self._skip_too_long()
        self._references: list[list[int]] = []

    def evaluate(
        self, checkpoint: str, label: str, num_samples: int | None = None, threads: int | None = None
    ) -> Report:
        """Decode prompts with the drafter of a native checkpoint folder.

        Above temperature 0 the output is a sample and `lossless` is None. At temperature 0 it is compared with the
        target's own greedy output.

        Args:
            checkpoint: Folder with `config.json` and `model.safetensors`.
            label: Copied into the report.
            num_samples: How many prompts, the first; None decodes all.
            threads: Torch threads of this call; None takes the config's, or else torch's choice.

        Raises:
            CheckpointError: The folder holds no drafter, one of another target, or another than when it was loaded.
            PromptError: Every prompt ended at its first token, so no round was decoded.
        """
        drafter, weights = self._load_drafter(checkpoint)
        report = self.measure(drafter, checkpoint, label, num_samples, threads)
        return report.model_copy(update={"weights": weights})

    def measure(
        self,
        drafter: Drafter,
        checkpoint: str,
        label: str,
        num_samples: int | None = None,
        threads: int | None = None,
    ) -> Report:
        """`evaluate` with a drafter that is loaded already; the target's own device and dtype.

        Raises:
            PromptError: Every prompt ended at its first token, so no round was decoded.
        """
        config, prompts = self._config, self._prompts[:num_samples]
        torch.set_num_threads(threads or config.threads or self._num_threads)
        began_s = time.perf_counter()
        output = speculative_generate(
            self._target,
            drafter,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_token_ids=self._stop_token_ids,
            confidence_threshold=config.confidence_threshold,
            seed=config.seed,
            batch_size=config.batch_size,
        )
        seconds = time.perf_counter() - began_s
        if not any(output.accepted_lengths):
            raise PromptError(
                f"all {len(prompts)} held-out prompts end at their first token (stop tokens "
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
            num_tokens=sum(map(len, output.output_ids)) - sum(map(len, prompts)),
            seconds=seconds,
            divergences=self._divergences(output) if is_greedy(config.temperature) else None,
            num_skipped=self._num_skipped,
            domains=self._domains[:num_samples],
        )

    def _skip_too_long(self) -> int:
        """Leave out prompts longer than the target's context; returns how many there were."""
        longest = context_tokens(self._target)
        lengths = [len(prompt) for prompt in self._prompts]
        if longest is None or max(lengths) <= longest:
            return 0
        self._domains = [domain for domain, length in zip(self._domains, lengths, strict=True) if length <= longest]
        self._prompts = [prompt for prompt in self._prompts if len(prompt) <= longest]
        num_skipped = len(lengths) - len(self._prompts)
        if not self._prompts:
            raise PromptError(
                f"all {num_skipped} held-out prompts are longer than the target's context of {longest} tokens (the "
                f"longest has {max(lengths)}): give shorter ones"
            )
        logger.warning(
            "%d of %d held-out prompts are longer than the target's context of %d tokens and are skipped",
            num_skipped,
            len(lengths),
            longest,
        )
        return num_skipped

    def _load_drafter(self, checkpoint: str) -> tuple[Drafter, str]:
        """The drafter and the digest of what was loaded."""
        try:
            weights = weights_digest(Path(checkpoint))
        except OSError as error:
            raise CheckpointError(f"cannot load the drafter at {checkpoint}: {error}") from error
        check_origin(Path(checkpoint), self._folder, allow_other_target=False)
        drafter = load_drafter_of(self._target, checkpoint, self._dtype, self._device)
        if not _is_still(weights, Path(checkpoint)):
            raise CheckpointError(f"the drafter at {checkpoint} was replaced while it was being loaded")
        return drafter, weights

    def _divergences(self, output: SpeculativeOutput) -> list[Divergence]:
        own_output = self._own_output(len(output.output_ids))
        found = (
            find_divergence(self._target, ours, own, sample=sample, num_prompt_tokens=len(self._prompts[sample]))
            for sample, (ours, own) in enumerate(zip(output.output_ids, own_output, strict=True))
        )
        return [divergence for divergence in found if divergence is not None]

    def _own_output(self, count: int) -> list[list[int]]:
        """The target's own greedy output for the first prompts, each with its prompt."""
        if missing := self._prompts[len(self._references) : count]:
            self._references += plain_generate(
                self._target,
                missing,
                max_new_tokens=self._config.max_new_tokens,
                stop_token_ids=self._stop_token_ids,
                batch_size=self._config.batch_size,
            )
        return self._references[:count]


def _is_still(weights: str, checkpoint: Path) -> bool:
    try:
        return weights_digest(checkpoint) == weights
    except OSError:  # it has gone, and what was loaded before was whole
        return True
