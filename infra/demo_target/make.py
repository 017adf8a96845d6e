"""Make the demo's target: a tiny Qwen3-architecture model of Python's own standard library.

    python infra/demo_target/make.py --output trainer/demo/target --state build/demo_target

trains a byte-level BPE tokenizer and a causal language model on the source that ships with every Python, and writes
a Hugging Face folder (bfloat16, tokenizer with a chat template) and the curve of its held-out loss. It can be stopped
at any time: the same command goes on from the last saved state.

The vocabulary is small on purpose. With tokens of two or three characters the next token depends on more than the
last one, so a drafter must read the target's features and cannot live off a table of token pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from services.prompts.stdlib import SKIPPED_FOLDERS, LibraryFunction, library_functions

VOCAB_SIZE = 512
ROW_TOKENS = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION_COPIES = 3
"""How often a conversation stands in an epoch for each time a whole file does."""


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer and give it the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The architecture: 8 layers of width 160, 2.4 M parameters, 4.8 MB in bfloat16."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def library_files(heldout_modules: set[str]) -> list[str]:
    """Whole source files of the standard library, without held-out modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or module in heldout_modules:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def rendered(tokenizer: PreTrainedTokenizerFast, functions: list[LibraryFunction]) -> list[str]:
    """Conversations as the chat template writes them."""
    return [tokenizer.apply_chat_template(function.conversation(), tokenize=False) for function in functions]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of each text, an end-of-text token behind each."""
    end = tokenizer.pad_token_id
    return [torch.tensor([*ids, end], dtype=torch.int16) for ids in tokenizer(texts)["input_ids"]]


def pack(documents: list[torch.Tensor], order: random.Random) -> torch.Tensor:
    """[N, ROW_TOKENS] rows of one epoch: the documents in a new order, end to end."""
    shuffled = list(documents)
    order.shuffle(shuffled)
    stream = torch.cat(shuffled)
    return stream[: len(stream) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 200 steps, flat, then linear to zero over the last 40 %."""
    return min((step + 1) / 200, 1.0, max(0.0, (steps - step) / (0.4 * steps)))


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def heldout_loss(model: Qwen3ForCausalLM, rows: torch.Tensor) -> float:
    """Mean next-token loss in nats over the held-out rows."""
    model.eval()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in rows.long().split(16)]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    """Train, or go on training, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state to resume from and the curve")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-rows", type=int, default=8, help=f"rows of {ROW_TOKENS} tokens a step")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.state.mkdir(parents=True, exist_ok=True)

    functions = list(library_functions())
    heldout = [f for f in functions if f.split == "heldout"]
    train = [f for f in functions if f.split == "train"]
    files = library_files({f.module for f in heldout})
    tokenizer = make_tokenizer(f.given + f.rest for f in train)
    documents = encode(tokenizer, rendered(tokenizer, train) * CONVERSATION_COPIES + files)
    heldout_rows = pack(encode(tokenizer, rendered(tokenizer, heldout)), random.Random(0))[:128]
    epochs_rows = sum(map(len, documents)) // ROW_TOKENS
    print(f"{len(train)} functions, {len(files)} files, {epochs_rows} rows an epoch", flush=True)

    model = Qwen3ForCausalLM(make_config(tokenizer))
    optimizers = build_optimizers(model)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    state_file = arguments.state / "state.pt"
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    curve = (arguments.state / "curve.jsonl").open("a")
    rows, epoch = torch.empty(0), -1
    started, recent = time.monotonic(), []
    while step < arguments.steps:
        new_epoch, offset = divmod(step * arguments.batch_rows, epochs_rows - arguments.batch_rows)
        if new_epoch != epoch:
            epoch, rows = new_epoch, pack(documents, random.Random(new_epoch))
        batch = rows[offset : offset + arguments.batch_rows].long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(step, arguments.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise SystemExit(f"loss is {recent[-1]} at step {step}")
        if step % arguments.save_every == 0 or step == arguments.steps:
            record = {
                "step": step,
                "tokens": step * arguments.batch_rows * ROW_TOKENS,
                "train_loss": sum(recent) / len(recent),
                "heldout_loss": heldout_loss(model, heldout_rows),
                "seconds": round(time.monotonic() - started, 1),
            }
            print(json.dumps(record), flush=True)
            curve.write(json.dumps(record) + "\n")
            curve.flush()
            recent = []
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
            torch.save(saved, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    tokenizer.save_pretrained(arguments.output)
    model.to(torch.bfloat16).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
