"""What runs the target's forward pass.

Shape letters: B batch, T sequence length, D hidden size, L captured layers, R wanted rows of the last hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from services.contracts import TargetDescription
from services.errors import TargetError, TargetUnavailableError
from services.models import find_model, read_shape
from services.target.config import TargetConfig
from services.target.generation import Answered, answer_prompts
from services.target.packing import CapturedFeatures, Packing, PackingRoom
from services.target.request import CaptureInputs
from services.target.tap import decoder_of, tapped


class Engine(Protocol):
    """Runs a frozen target. One thread calls `capture`."""

    def describe(self) -> TargetDescription:
        """What this target is."""
        ...

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        """One pass over checked requests of one group (`CaptureInputs.group`).

        Whoever gets the features releases them.
        """
        ...

    def check(self) -> None:
        """Raise TargetError if the device can no longer compute, so that only a new process helps."""
        ...


class TransformersEngine:
    """A Hugging Face causal LM: its decoder stack, and its head and a KV cache only where it has to answer a prompt.

    Raises:
        TargetError: There is no GPU although one is asked for; the model cannot be found or loaded, or its files lack
            weights.
    """

    def __init__(self, config: TargetConfig) -> None:
        self._device = _choose_device(config.num_gpus)
        folder = find_model(config.model, weights=True)
        shape = read_shape(folder)
        model = _load_model(str(folder), getattr(torch, config.dtype))
        self._decoder = decoder_of(model).to(self._device)
        self._head: nn.Module = model.get_output_embeddings()
        self._room = PackingRoom(self._device)
        self._description = TargetDescription(
            model_name=config.model,
            fingerprint=shape.fingerprint,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            dtype=config.dtype,
            max_tokens=min(shape.max_tokens or config.max_batch_tokens, config.max_batch_tokens),
            engine=config.engine,
        )

    def describe(self) -> TargetDescription:
        """What this target is."""
        return self._description

    def capture(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        """One forward pass, right-padded; each sample's rows equal those of a pass of its own.

        On CUDA it returns before the features are there (`CapturedFeatures.wait`), so that the next pass can begin.

        Args:
            batch: Requests of one group, each within the target's bounds.

        Raises:
            TargetError: The device has not enough memory for this batch.
            TargetUnavailableError: The device failed.
        """
        if any(inputs.group != batch[0].group for inputs in batch):
            raise ValueError("the requests of one pass must share their layer ids, and all or none of them generate")
        try:
            with torch.inference_mode():
                return self._answer(batch) if batch[0].generate else self._capture(batch, batch[0].layer_ids)
        except torch.OutOfMemoryError as error:
            lengths = [inputs.num_tokens for inputs in batch]
            raise TargetError(
                f"{self._device} has not enough memory for a batch of {lengths} tokens: lower "
                f"target.max_batch_tokens ({error})"
            ) from error
        except torch.AcceleratorError as error:
            raise TargetUnavailableError(f"{self._device} failed, and this target must restart: {error}") from error

    def _capture(self, batch: list[CaptureInputs], layer_ids: tuple[int, ...]) -> list[CapturedFeatures]:
        input_ids_BT, attention_mask_BT = self._pad(batch)
        packings = [self._packing(inputs, inputs.num_tokens, len(inputs.last_rows)) for inputs in batch]

        def put(place: int, layer_BTD: Tensor) -> None:
            for packing, inputs, layer_TD in zip(packings, batch, layer_BTD, strict=True):
                packing.put_layer(place, layer_TD[: inputs.num_tokens])

        with tapped(self._decoder, layer_ids, put):
            output = self._decoder(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        for packing, inputs, last_TD in zip(packings, batch, output.last_hidden_state, strict=True):
            packing.put_last(_select(last_TD, inputs.last_rows))
        return [packing.finish() for packing in packings]

    def _answer(self, batch: list[CaptureInputs]) -> list[CapturedFeatures]:
        self._head.to(self._device)  # not before: most targets never answer
        answered = answer_prompts(self._decoder, self._logits, batch, batch[0].dtype)
        return [self._pack_answered(inputs, result) for inputs, result in zip(batch, answered, strict=True)]

    def _pack_answered(self, inputs: CaptureInputs, result: Answered) -> CapturedFeatures:
        last_rows = _rows_of_answer(inputs, result.answer)
        packing = self._packing(inputs, len(result.context_TLS), len(last_rows))
        packing.put_packed_context(result.context_TLS)
        packing.put_last(_select(result.last_TD, last_rows))
        return packing.finish(result.answer)

    def _packing(self, inputs: CaptureInputs, num_tokens: int, num_last: int) -> Packing:
        return Packing(
            self._room,
            num_tokens=num_tokens,
            num_last=num_last,
            num_layers=len(inputs.layer_ids),
            hidden_size=self._description.hidden_size,
            dtype=inputs.dtype,
        )

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        """The head, with the soft-capping of those families that have it."""
        logits_BV: Tensor = self._head(hidden_BD)
        cap = getattr(self._decoder.config, "final_logit_softcapping", None)
        return logits_BV if cap is None else cap * torch.tanh(logits_BV / cap)

    def _pad(self, batch: list[CaptureInputs]) -> tuple[Tensor, Tensor | None]:
        """Token ids and attention mask, both [B, T]; no mask if nothing is padded."""
        longest = max(inputs.num_tokens for inputs in batch)
        input_ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        attention_mask_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, inputs in enumerate(batch):
            input_ids_BT[row, : inputs.num_tokens] = torch.tensor(inputs.input_ids)
            attention_mask_BT[row, : inputs.num_tokens] = 1
        if all(inputs.num_tokens == longest for inputs in batch):
            return input_ids_BT.to(self._device), None
        return input_ids_BT.to(self._device), attention_mask_BT.to(self._device)

    def check(self) -> None:
        """Raise TargetError if the device can no longer compute, so that only a new process helps."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            raise TargetError(f"{self._device} no longer computes: {error}") from error


def _choose_device(num_gpus: float) -> torch.device:
    if num_gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TargetError(
            f"target.num_gpus is {num_gpus:g}, but torch {torch.__version__} finds no GPU here: install a torch built "
            "for it, or set target.num_gpus to 0 to run on the CPU"
        )
    return torch.device("cuda")


def _load_model(folder: str, dtype: torch.dtype) -> Any:
    """The model in evaluation mode, weights converted to `dtype`."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds, all meaning this
        raise TargetError(f"target {folder} cannot be loaded: {type(error).__name__}: {error}") from error
    model, loading = loaded
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise TargetError(
            f"target {folder} lacks {len(names)} weights of its config, {names[0]} first: are all its files there?"
        )
    return model.eval().requires_grad_(False)


def _select(last_TD: Tensor, last_rows: Sequence[int]) -> Tensor:
    return last_TD.index_select(0, torch.tensor(last_rows, dtype=torch.long, device=last_TD.device))


def _rows_of_answer(inputs: CaptureInputs, answer: Sequence[int]) -> list[int]:
    assert inputs.generate is not None
    return inputs.generate.last_rows.select([0] * len(inputs.input_ids) + [1] * len(answer))
