"""On-policy capture: the target answers a batch of prompts, and its features are taken in the same pass.

The prompt's features come out of the prefill, those of the answer out of the decode steps, one row a step. The last
token of an answer is fed back once more, since only then its own features exist. Prompts are padded on the left, so
that all rows of a step lie in one column; rows whose answer has ended leave the batch once they are half of it.

Shape letters: B batch, T columns of the longest prompt and answer, D hidden size, S bytes of one hidden state on the
wire, L captured layers, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from services.codec import pack_rows
from services.contracts import WireDtype, hidden_state_bytes
from services.target.request import CaptureInputs, GenerateInputs
from services.target.tap import tapped


class Answered(NamedTuple):
    """What came of one prompt; T tokens of prompt and answer together."""

    answer: tuple[int, ...]
    context_TLS: Tensor
    """The wanted layers' outputs as they travel, uint8, on the decoder's device."""
    last_TD: Tensor
    """The last hidden state after the final norm, all rows, in the decoder's dtype."""


@torch.inference_mode()
def answer_prompts(
    decoder: nn.Module, logits_of: Callable[[Tensor], Tensor], batch: Sequence[CaptureInputs], dtype: WireDtype
) -> list[Answered]:
    """Generate one answer to each prompt.

    Args:
        decoder: The target's decoder stack.
        logits_of: Its head: last hidden states [B, D] to logits [B, V].
        batch: Prompts that share their layer ids, each with `generate`.
        dtype: Of the features on the wire.
    """
    run = _Run(decoder, batch, dtype)
    hidden_BD = run.prefill()
    while run.under_way:
        tokens = choose([row.settings for row in run.rows], [row.draw() for row in run.rows], logits_of(hidden_BD))
        for row, token in zip(run.rows, tokens, strict=True):
            row.take(token)
        hidden_BD = run.drop_ended(run.feed(tokens))
    return run.results()


def choose(settings: Sequence[GenerateInputs], draws: Sequence[float], logits_BV: Tensor) -> list[int]:
    """The next token of each row: the most probable one at temperature 0, else a sample.

    Args:
        settings: Of each row.
        draws: A uniform number in [0, 1) for each row: where in its cumulative distribution the sample lies.
        logits_BV: Any float dtype.
    """
    logits_BV = logits_BV.float()
    greedy_B = logits_BV.argmax(-1)
    temperatures = [row.temperature for row in settings]
    if not any(temperatures):
        return greedy_B.tolist()
    temperature_B = torch.tensor(temperatures, device=logits_BV.device)
    scaled_BV = logits_BV / temperature_B.where(temperature_B > 0, 1.0)[:, None]
    cumulative_BV = scaled_BV.softmax(-1).cumsum(-1)
    mass_B = torch.tensor(draws, device=logits_BV.device) * cumulative_BV[:, -1]  # rounding may leave less than 1
    sampled_B = torch.searchsorted(cumulative_BV, mass_B[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
    return torch.where(temperature_B > 0, sampled_B, greedy_B).tolist()


class _Row:
    """One prompt and its answer so far."""

    def __init__(self, index: int, inputs: CaptureInputs) -> None:
        assert inputs.generate is not None
        self.index = index
        self.prompt = inputs.input_ids
        self.settings = inputs.generate
        self.answer: list[int] = []
        self._random = random.Random(inputs.generate.seed)

    @property
    def has_ended(self) -> bool:
        has_stopped = bool(self.answer) and self.answer[-1] in self.settings.stop_token_ids
        return has_stopped or len(self.answer) == self.settings.max_new_tokens

    def draw(self) -> float:
        return self._random.random() if self.settings.temperature else 0.0

    def take(self, token: int) -> None:
        """Add a token; an ended row keeps its answer."""
        if not self.has_ended:
            self.answer.append(token)


class _Run:
    """Rows, KV cache and features of one batch; `rows` are those that still take part in the steps."""

    def __init__(self, decoder: nn.Module, batch: Sequence[CaptureInputs], dtype: WireDtype) -> None:
        self._decoder: Any = decoder
        config: Any = decoder.config
        parameter = next(decoder.parameters())
        self._device = parameter.device
        self._dtype = dtype
        self._hidden_size: int = config.hidden_size
        self._layer_ids = batch[0].layer_ids
        self._all_rows = [_Row(index, inputs) for index, inputs in enumerate(batch)]
        self.rows = self._all_rows
        self._num_prompt_columns = max(len(row.prompt) for row in self.rows)
        num_columns = self._num_prompt_columns + max(row.settings.max_new_tokens for row in self.rows)
        shape = (len(batch), num_columns)
        state_bytes = hidden_state_bytes(self._hidden_size, dtype)
        self._context_BTLS = torch.empty(
            *shape, len(self._layer_ids), state_bytes, dtype=torch.uint8, device=self._device
        )
        self._last_BTD = torch.empty(*shape, self._hidden_size, dtype=parameter.dtype, device=self._device)
        self._mask_BT = torch.zeros(shape, dtype=torch.long, device=self._device)
        self._cache = DynamicCache(config=config)
        self._num_columns = 0

    @property
    def under_way(self) -> bool:
        return any(not row.has_ended for row in self.rows)

    def prefill(self) -> Tensor:
        """Run the prompts; returns the hidden states [B, D] after each one's last token."""
        width = self._num_prompt_columns
        input_ids_BT = torch.zeros(len(self.rows), width, dtype=torch.long)
        for row in self.rows:
            input_ids_BT[row.index, width - len(row.prompt) :] = torch.tensor(row.prompt)
            self._mask_BT[row.index, width - len(row.prompt) : width] = 1
        return self._forward(input_ids_BT)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Run one more token of each row; returns their hidden states [B, D]."""
        self._mask_BT[:, self._num_columns] = 1
        return self._forward(torch.tensor(tokens)[:, None])

    def drop_ended(self, hidden_BD: Tensor) -> Tensor:
        """Go on without the ended rows if they are half of the batch; returns what is left of `hidden_BD`."""
        kept = [position for position, row in enumerate(self.rows) if not row.has_ended]
        if not kept or 2 * len(kept) > len(self.rows):
            return hidden_BD
        kept_B = torch.tensor(kept, device=self._device)
        self._cache.batch_select_indices(kept_B)
        self._mask_BT = self._mask_BT[kept_B]
        self.rows = [self.rows[position] for position in kept]
        return hidden_BD[kept_B]

    def results(self) -> list[Answered]:
        """Each prompt's answer and features, in the order of the batch."""
        return [
            Answered(tuple(row.answer), self._context_BTLS[row.index, columns], self._last_BTD[row.index, columns])
            for row in self._all_rows
            for columns in [self._columns_of(row)]
        ]

    def _columns_of(self, row: _Row) -> slice:
        width = self._num_prompt_columns
        return slice(width - len(row.prompt), width + len(row.answer))

    def _forward(self, input_ids_BT: Tensor) -> Tensor:
        begin, end = self._num_columns, self._num_columns + input_ids_BT.shape[1]
        mask_BT = self._mask_BT[:, :end]
        rows_B = torch.tensor([row.index for row in self.rows], device=self._device)

        def put(place: int, layer_BTD: Tensor) -> None:
            packed = pack_rows(layer_BTD.flatten(0, 1), self._dtype, self._hidden_size).view(torch.uint8)
            self._context_BTLS[rows_B, begin:end, place] = packed.view(*layer_BTD.shape[:2], -1)

        with tapped(self._decoder, self._layer_ids, put):
            output = self._decoder(
                input_ids=input_ids_BT.to(self._device),
                attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0)[:, begin:],
                past_key_values=self._cache,
                use_cache=True,
            )
        self._last_BTD[rows_B, begin:end] = output.last_hidden_state
        self._num_columns = end
        return output.last_hidden_state[:, -1]
