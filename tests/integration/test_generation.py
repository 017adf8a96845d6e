"""On-policy capture: the target answers a prompt and its features are taken in the same pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from waiting import WAIT_S

from services.codec import decode
from services.contracts import CaptureJob, Generation, LastRows
from services.errors import CaptureRequestError
from services.target.client import TargetClient
from services.target.config import TargetConfig
from services.target.engine import TransformersEngine
from services.target.generation import choose
from services.target.request import CaptureInputs, GenerateInputs
from services.target.server import serve

VOCAB, WIDTH, LAYER_IDS = 40, 16, (0, 2)
PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (8, 9), (10, 11, 12, 13), (14,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(TargetConfig(model=str(folder), dtype="float32", num_gpus=0, threads=1))


def inputs_of(prompt: Sequence[int], *, stop: Sequence[int] = (), **changes: object) -> CaptureInputs:
    settings = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0, "last_rows": LastRows.BETWEEN, **changes}
    generate = GenerateInputs(stop_token_ids=frozenset(stop), **settings)  # type: ignore[arg-type]
    return CaptureInputs(tuple(prompt), LAYER_IDS, (), "fp32", generate)


def greedy(folder: Path, prompt: Sequence[int], length: int) -> list[int]:
    """The model's own greedy continuation, one whole forward pass a token."""
    model = Qwen3ForCausalLM.from_pretrained(folder)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_the_models_own_greedy_continuations(folder: Path, engine: TransformersEngine) -> None:
    results = engine.capture([inputs_of(prompt) for prompt in PROMPTS])
    assert [list(result.answer) for result in results] == [greedy(folder, prompt, 12) for prompt in PROMPTS]


def test_features_are_those_of_prompt_and_answer_captured_afterwards(engine: TransformersEngine) -> None:
    for prompt, result in zip(PROMPTS, engine.capture([inputs_of(prompt) for prompt in PROMPTS]), strict=True):
        tokens = (*prompt, *result.answer)
        last_rows = range(len(prompt), len(tokens) - 1)  # both neighbours belong to the answer
        (again,) = engine.capture([CaptureInputs(tokens, LAYER_IDS, tuple(last_rows), "fp32")])
        torch.testing.assert_close(result.context, again.context, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.last, again.last, rtol=1e-4, atol=1e-4)


def test_rows_that_stop_early_leave_the_batch_and_change_nothing_for_the_others(
    folder: Path, engine: TransformersEngine
) -> None:
    own = [greedy(folder, prompt, 12) for prompt in PROMPTS]
    stops = [own[0][:1], own[1][1:2], own[2][:1], []]  # three of four end within two tokens
    results = engine.capture([inputs_of(p, stop=s) for p, s in zip(PROMPTS, stops, strict=True)])
    ended = [answer[: answer.index(stop[0]) + 1] if stop else answer for answer, stop in zip(own, stops, strict=True)]
    assert [list(result.answer) for result in results] == ended
    assert len(results[3].answer) == 12
    (alone,) = engine.capture([inputs_of(PROMPTS[3])])
    torch.testing.assert_close(results[3].context, alone.context, rtol=1e-4, atol=1e-4)


def test_each_row_has_its_own_limit(engine: TransformersEngine) -> None:
    lengths = (1, 5, 3, 2)
    batch = [inputs_of(p, max_new_tokens=n) for p, n in zip(PROMPTS, lengths, strict=True)]
    results = engine.capture(batch)
    assert tuple(len(result.answer) for result in results) == lengths
    assert [len(result.context) for result in results] == [8, 7, 7, 3]


@pytest.mark.parametrize(("last_rows", "expected"), [(LastRows.BETWEEN, 3), (LastRows.AFTER, 3)])
def test_wanted_last_rows_follow_from_the_answer(
    engine: TransformersEngine, last_rows: LastRows, expected: int
) -> None:
    (result,) = engine.capture([inputs_of((1, 2), max_new_tokens=4, last_rows=last_rows)])
    assert len(result.last) == expected


def test_sampling_depends_on_the_seed_and_not_on_the_batch(engine: TransformersEngine) -> None:
    hot = {"temperature": 2.0}
    (alone,) = engine.capture([inputs_of(PROMPTS[0], seed=5, **hot)])
    together = engine.capture([inputs_of(prompt, seed=5, **hot) for prompt in PROMPTS])
    others = {engine.capture([inputs_of(PROMPTS[0], seed=seed, **hot)])[0].answer for seed in range(6)}
    assert together[0].answer == alone.answer
    assert len(others) > 1


def test_choose_samples_the_tempered_distribution() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7]))
    hot = inputs_of((1,), temperature=0.5).generate
    assert hot is not None
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    counts = Counter(choose([hot] * 1000, draws, logits.expand(1000, 3)))
    # p ** (1 / 0.5) normalised: 0.01, 0.04, 0.49 over 0.54
    assert [counts[token] for token in range(3)] == pytest.approx([18.5, 74.1, 907.4], abs=1)


def test_answer_comes_through_the_service_before_its_features(folder: Path, engine: TransformersEngine) -> None:
    generation = Generation(max_new_tokens=6, stop_token_ids=(), last_rows=LastRows.AFTER)
    job = CaptureJob(
        capture=4, prompt=0, epoch=0, input_ids=(1, 2, 3), loss_mask=(0, 0, 0), last_rows=(), generate=generation
    )
    answers: list[tuple[int, ...]] = []
    rows: Counter[str] = Counter()
    context = []
    with TargetClient((server := serve(engine, TargetConfig(model=str(folder), num_gpus=0))).address) as client:
        for chunk, payload in client.capture(
            job,
            layer_ids=LAYER_IDS,
            wire_dtype="fp32",
            chunk_bytes=300,
            timeout_s=WAIT_S,
            on_answer=lambda answer: answers.append(tuple(answer)),
        ):
            assert answers, "features came before the answer"
            rows[chunk.tensor] += chunk.row_end - chunk.row_start
            if chunk.tensor == "context":
                context.append(decode(payload, "fp32", 2 * WIDTH))
        with pytest.raises(CaptureRequestError, match=r"last_rows .* cannot be named before the answer"):
            list(
                client.capture(
                    job.model_copy(update={"last_rows": (1,)}),
                    layer_ids=LAYER_IDS,
                    wire_dtype="fp32",
                    chunk_bytes=300,
                    timeout_s=WAIT_S,
                )
            )
    server.stop()
    assert [list(answer) for answer in answers] == [greedy(folder, (1, 2, 3), 6)]
    assert rows == {"context": 9, "last": 5}
    (again,) = engine.capture([CaptureInputs((1, 2, 3, *answers[0]), LAYER_IDS, (), "fp32")])
    torch.testing.assert_close(torch.cat(context), again.context, rtol=1e-4, atol=1e-4)
