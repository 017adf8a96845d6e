"""What the fused loss is worth: step time and memory of each drafter, with it and with the plain one, in one run.

A step is forward, backward and AdamW of a drafter with random weights on random features. The two ways of computing the
loss take turns, round after round, on the same weights and the same batches, and medians are compared.

The loss part is all that touches the vocabulary: from the backbone's output and the target's last hidden states, which
are there already, to the loss and back to their gradients and those of the Markov head's W2. It runs by itself, on rows
as many as the step has. On a CPU its peak is read from torch.profiler, to which torch's allocator reports every
allocation and every release, also of temporaries inside kernels; the highest sum of these is the peak. What MKL takes
for itself is not seen. On a GPU it is `torch.cuda.max_memory_allocated` less what was allocated before.

On a GPU there are model FLOPs too: only matrix products that the step needs, nothing computed again. See `step_flops`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config

from drafters import Drafter, DrafterConfig, FeatureBatch, build_drafter
from drafters.anchors import Anchors, draw_anchors, seeded_generators, supervise
from drafters.config import settings_of
from drafters.eagle3_loss import StepRows, fused_soft_loss, plain_soft_loss
from drafters.fused_loss import fused_loss
from drafters.losses import RowInputs, Vocabulary, plain_loss
from evaluation.bench.hardware import describe_hardware

DRAFTERS = ("dspark", "dflash", "eagle3")
LossKind = Literal["fused", "plain"]
KINDS: tuple[LossKind, ...] = ("fused", "plain")

LEARNING_RATE = 1e-5
"""Small, so that weights stay what they are while time is measured."""

PEAK_FLOPS: Mapping[str, float] = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s that a GPU's maker states, by a part of its name."""

FORMULA = (
    "FLOPs = 6·rows·in·out of each trained matrix (4 for W_fc, whose input needs no gradient, and for the head), "
    "2·rows·D·V for the target's head, 12·pairs·heads·head size for attention (query and key pairs that see each other)"
)


@dataclass(frozen=True)
class BenchSize:
    """Sizes of a target and of a micro-batch for its drafters.

    Attributes:
        name: What it is called in the result.
        hidden_size: D.
        intermediate_size: Of the MLP.
        num_heads: Query heads.
        num_key_heads: Key and value heads.
        head_dim: Head size.
        vocab_size: V.
        num_draft_layers: Of the block drafters; Eagle3 has one.
        num_anchors: A.
        num_samples: Samples of a micro-batch.
        num_tokens: Tokens of a sample.
        num_supervised: Supervised tokens at a sample's end.
        dtype: Of weights and features.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    vocab_size: int
    num_draft_layers: int
    num_anchors: int
    num_samples: int
    num_tokens: int
    num_supervised: int
    dtype: torch.dtype

    def target_config(self) -> Qwen3Config:
        """A Qwen3 of this width; its depth only bounds the layer ids."""
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=36,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.num_tokens,
            tie_word_embeddings=False,
        )


CPU_SIZE = BenchSize("d512_v32k", 512, 1536, 8, 4, 64, 32_768, 2, 64, 1, 192, 96, torch.float32)
GPU_SIZES = (
    BenchSize("qwen3_4b", 2560, 9728, 32, 8, 128, 151_936, 5, 512, 2, 4096, 3584, torch.bfloat16),
    BenchSize("qwen3_8b", 4096, 12_288, 32, 8, 128, 151_936, 5, 512, 2, 4096, 3584, torch.bfloat16),
)


class Measure(NamedTuple):
    """Of one drafter and one way of computing the loss.

    Attributes:
        step_s: Median seconds of a step.
        peak_loss_bytes: Most that the loss part held at once.
        tokens_per_s: Tokens of the micro-batch over `step_s`.
        mfu: Model FLOPs utilisation; None where the peak of the hardware is not known.
    """

    step_s: float
    peak_loss_bytes: int
    tokens_per_s: float
    mfu: float | None


def measure_training(
    say: Callable[[str], None], *, rounds: int, drafters: tuple[str, ...] = DRAFTERS
) -> dict[str, Any]:
    """Measure at the CPU's size, or at the GPU's sizes where there is one.

    Args:
        say: Where progress goes.
        rounds: Steps of each drafter and kind that count.
        drafters: Algorithms.

    Returns:
        One JSON object; ``drafters`` is of the last size, ``sizes`` has all.
    """
    sizes = GPU_SIZES if torch.cuda.is_available() else (CPU_SIZE,)
    results = {}
    for size in sizes:
        results[size.name] = {"drafters": measure_size(size, say, rounds=rounds, drafters=drafters)}
    return {
        "size": sizes[-1].name,
        "drafters": results[sizes[-1].name]["drafters"],
        "sizes": results,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "hardware": _hardware(),
        "formula": FORMULA,
    }


def measure_size(
    size: BenchSize, say: Callable[[str], None], *, rounds: int, drafters: tuple[str, ...] = DRAFTERS
) -> dict[str, dict[str, dict[str, Any]]]:
    """Both ways of each drafter, as `{drafter: {kind: fields of Measure}}`."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for algorithm in drafters:
        say(f"{size.name}: {algorithm}")
        steps = TrainingSteps(size, algorithm)
        times: dict[LossKind, list[float]] = {kind: [] for kind in KINDS}
        for round_number in range(rounds + 1):
            for kind in KINDS if round_number % 2 else reversed(KINDS):
                step_s = steps.time(kind, seed=round_number)
                if round_number:  # the first is a warm-up
                    times[kind].append(step_s)
        flops = steps.flops()
        num_rows = steps.loss_rows()
        del steps
        results[algorithm] = {
            kind: _measure(
                size, statistics.median(times[kind]), peak_loss_bytes(size, algorithm, kind, num_rows), flops
            )
            for kind in KINDS
        }
    return results


class TrainingSteps:
    """A drafter, its optimizer and a batch."""

    def __init__(self, size: BenchSize, algorithm: str) -> None:
        self._size = size
        self._device = _device()
        torch.manual_seed(0)
        drafter = build_drafter(size.target_config(), **_settings(size, algorithm))
        self._drafter: Drafter = drafter.to(self._device, size.dtype).train()
        trained = [parameter for parameter in self._drafter.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        self._batch = random_batch(size, self._drafter.settings).to(self._device)

    def time(self, kind: LossKind, *, seed: int) -> float:
        """Seconds of one step."""
        self._drafter.settings = self._drafter.settings.model_copy(update={"loss": kind})
        self._synchronize()
        started_s = time.perf_counter()
        out = self._drafter(self._batch, anchor_seeds=[seed] * self._size.num_samples)
        out.loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._synchronize()
        return time.perf_counter() - started_s

    def loss_rows(self) -> int:
        """Rows of the loss in one step; of Eagle3, in its first."""
        if self._drafter.algorithm == "eagle3":
            return self._size.num_samples * (self._size.num_supervised - 1)
        return int(self._slots()[1].sum())

    def flops(self) -> float:
        """Model FLOPs of one step."""
        if self._drafter.algorithm == "eagle3":
            return eagle3_flops(self._drafter, self._size)
        return block_flops(self._drafter, self._size, *self._slots())

    def _slots(self) -> tuple[Anchors, Tensor, Tensor]:
        """Anchors, evaluation mask and target rows of the first round."""
        batch, settings, samples = self._batch, self._drafter.settings, self._batch.samples
        masks = [batch.loss_mask.flatten()[slice(*sample)].cpu() for sample in samples]
        anchors = draw_anchors(masks, settings.num_anchors, seeded_generators([1] * len(samples), len(samples)))
        slots = supervise(batch.input_ids.cpu(), batch.loss_mask.cpu(), anchors, settings.num_drafts, samples)
        return anchors, slots.eval_mask, slots.target_rows

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def random_batch(size: BenchSize, settings: DrafterConfig) -> FeatureBatch:
    """Packed samples of random tokens and features."""
    assert settings.target_layer_ids is not None
    total = size.num_samples * size.num_tokens
    supervised = torch.arange(size.num_tokens) >= size.num_tokens - size.num_supervised
    return FeatureBatch.from_tensors(
        torch.randint(size.vocab_size, (1, total)),
        supervised.repeat(size.num_samples)[None],
        None,
        torch.randn(1, total, len(settings.target_layer_ids) * size.hidden_size, dtype=size.dtype),
        torch.randn(1, total, size.hidden_size, dtype=size.dtype),
        sample_lengths=[size.num_tokens] * size.num_samples,
    )


def block_flops(drafter: Drafter, size: BenchSize, anchors: Anchors, eval_mask: Tensor, target_rows: Tensor) -> float:
    """Model FLOPs of DSpark's or DFlash's step: `FORMULA` with the rows that each matrix sees.

    Context rows end at a sample's last anchor; query and key pairs are those of a block and what it sees; a row of the
    target counts once, however many slots are scored against it.
    """
    settings, width = drafter.settings, size.hidden_size
    num_blocks, block_size = int(anchors.keep.sum()), settings.block_size
    num_context = int((anchors.positions * anchors.keep).amax(1).sum())
    slots, rows = num_blocks * block_size, int(eval_mask.sum())
    pairs = block_size * int((anchors.positions * anchors.keep).sum()) + slots * block_size
    inner, keys = size.num_heads * size.head_dim, size.num_key_heads * size.head_dim
    layer = slots * (2 * width * inner + 3 * width * size.intermediate_size) + (slots + num_context) * 2 * width * keys
    fusing = num_context * width * len(settings.target_layer_ids or ()) * width
    head = rows * width * size.vocab_size
    target = int(target_rows[eval_mask].unique().numel()) * width * size.vocab_size
    markov = rows * settings.markov_rank * size.vocab_size
    attention = settings.num_draft_layers * pairs * inner
    return 6 * (settings.num_draft_layers * layer + markov) + 4 * (fusing + head) + 2 * target + 12 * attention


def eagle3_flops(drafter: Drafter, size: BenchSize) -> float:
    """Model FLOPs of Eagle3's step: `FORMULA` with the rows that each matrix sees.

    Step 0 has every position up to the last that is supervised as key and those that drafts begin at as queries; later
    steps have these alone, and see one more key each.
    """
    settings, width = drafter.settings, size.hidden_size
    steps, queries = settings.ttt_length, size.num_samples * (size.num_supervised - 1)
    context = size.num_samples * (size.num_tokens - 2)
    inner, keys = size.num_heads * size.head_dim, size.num_key_heads * size.head_dim
    first = size.num_tokens - size.num_supervised
    pairs = size.num_samples * sum(range(first + 1, size.num_tokens)) * steps + queries * sum(range(steps))
    rows_layer = queries * steps * (3 * width * inner + 3 * width * size.intermediate_size)
    rows_keys = (context + queries * (steps - 1)) * 4 * width * keys
    fusing = context * width * len(settings.target_layer_ids or ()) * width
    head = steps * queries * width * size.vocab_size
    target = queries * width * size.vocab_size
    return 6 * (rows_layer + rows_keys) + 4 * (fusing + head) + 2 * target + 12 * pairs * inner


def peak_loss_bytes(size: BenchSize, algorithm: str, kind: LossKind, num_rows: int) -> int:
    """Most bytes that the loss part holds at once beyond its inputs."""
    run = (
        _soft_loss_part(size, kind, num_rows) if algorithm == "eagle3" else _loss_part(size, algorithm, kind, num_rows)
    )
    return peak_bytes(run, _device())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors and temporaries that exist at once while something runs, beyond what there was before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    reports = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for report in sorted(reports, key=lambda event: event.start_ns()):
        held += report.nbytes()
        peak = max(peak, held)
    return peak


def _loss_part(size: BenchSize, algorithm: str, kind: LossKind, num_rows: int) -> Callable[[], object]:
    settings = DrafterConfig(**_settings(size, algorithm))
    vocabulary = Vocabulary(_head(size))
    latent = None
    if settings.markov_rank:
        latent = _random(size, num_rows, settings.markov_rank).requires_grad_()
        vocabulary = Vocabulary(vocabulary.head, _random(size, size.vocab_size, settings.markov_rank).requires_grad_())
    weights = torch.full((num_rows,), 1 / num_rows, device=_device())
    rows = RowInputs(
        hidden=_random(size, num_rows, size.hidden_size).requires_grad_(),
        latent=latent,
        labels=torch.randint(size.vocab_size, (num_rows,), device=_device()),
        target_states=_random(size, num_rows, size.hidden_size),
        ce_weights=settings.ce_loss_alpha * weights,
        l1_weights=settings.l1_loss_alpha * weights,
    )
    compute = fused_loss if kind == "fused" else plain_loss
    return lambda: compute(rows, vocabulary)[0].backward()


def _soft_loss_part(size: BenchSize, kind: LossKind, num_rows: int) -> Callable[[], object]:
    settings = DrafterConfig(**_settings(size, "eagle3"))
    vocabulary, target_states = Vocabulary(_head(size)), _random(size, num_rows, size.hidden_size)
    targets = torch.arange(num_rows, device=_device())
    steps = [
        StepRows(
            _random(size, num_rows - step, size.hidden_size).requires_grad_(),
            targets[step:],
            torch.full((num_rows - step,), 1 / num_rows, device=_device()),
        )
        for step in range(settings.ttt_length)
    ]
    compute = fused_soft_loss if kind == "fused" else plain_soft_loss
    return lambda: compute(steps, target_states, vocabulary)[0].backward()


def _head(size: BenchSize) -> Tensor:
    return _random(size, size.vocab_size, size.hidden_size) / size.hidden_size**0.5


def _random(size: BenchSize, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=size.dtype, device=_device())


def _settings(size: BenchSize, algorithm: str) -> dict[str, Any]:
    values = {
        "num_draft_layers": size.num_draft_layers,
        "num_anchors": size.num_anchors,
        "mask_token_id": size.vocab_size - 1,
    }
    if algorithm == "eagle3":
        values["num_draft_layers"] = 1
    return settings_of(algorithm, values)


def _measure(size: BenchSize, step_s: float, peak_loss: int, flops: float) -> dict[str, Any]:
    peak_flops = _peak_flops()
    num_tokens = size.num_samples * size.num_tokens
    return Measure(
        step_s=step_s,
        peak_loss_bytes=peak_loss,
        tokens_per_s=num_tokens / step_s,
        mfu=flops / step_s / peak_flops if peak_flops else None,
    )._asdict()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def _hardware() -> str:
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{describe_hardware()}, torch {torch.__version__}"
