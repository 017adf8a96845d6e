"""Export a drafter: read, write, read back, compare; then, and only then, the folder appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from drafters.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointFormatError,
    load_drafter,
    save_drafter,
    stored_dtype,
)
from drafters.drafter import Drafter
from drafters.export.cut import with_vocabulary
from drafters.export.formats import CannotExportError, ServedTarget, Tables, Written
from drafters.export.sglang import load_sglang, to_sglang
from drafters.export.speculators import load_speculators, to_speculators
from drafters.registry import find_algorithm
from drafters.target_weights import TargetWeightsError, differing_tables
from evaluation.confidence.temperatures import TEMPERATURES_NAME
from evaluation.origin import PROVENANCE_FILE
from evaluation.self_check import SelfCheck, compare_drafters
from services.contracts import Record
from services.errors import CheckpointError, UsageError
from services.prompts.token_counts import count_answer_tokens
from trainer.draft_vocabulary import choose
from trainer.export_source import ANSWERS, ExportSource, SourceTarget, find_source, find_target, has_thinking_modes
from trainer.model_card import model_card
from trainer.new_folder import check_new_folder, new_folder

Format = Literal["sglang", "vllm", "native"]
CARD = "README.md"
CARRIED = (PROVENANCE_FILE, TEMPERATURES_NAME)
"""What our own commands read beside a drafter; servers do not."""
FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD, *CARRIED)

LOCAL_NAME_WARNING = (
    "config.json names the target as {name}, a folder of this machine: to publish the drafter, export it with "
    "--target OWNER/MODEL"
)


class ExportResult(Record):
    """What `slipstream export --json` prints."""

    format: Format
    output_dir: str
    checkpoint: str
    algorithm: str
    architecture: str
    target: str | None
    target_fingerprint: str | None
    draft_vocab_size: int
    enable_thinking: bool | None
    accepted_length: float | None
    max_logit_difference: float
    num_drafts_compared: int
    files: dict[str, int]
    """Bytes by name."""
    warnings: tuple[str, ...]


class _Way(NamedTuple):
    """How a format is written and read back."""

    write: Callable[[Path], None]
    read: Callable[[Path], Drafter]
    architecture: str
    warnings: tuple[str, ...] = ()


def export_drafter(
    checkpoint: Path,
    kind: Format,
    output_dir: Path,
    *,
    say: Callable[[str], None],
    target: str | None = None,
    draft_vocab_size: int | None = None,
    thinking: bool | None = None,
    force: bool = False,
) -> ExportResult:
    """Write a drafter in another format, checked, with a model card.

    Args:
        checkpoint: Folder of a checkpoint, or a link to one.
        kind: Which format.
        output_dir: Where to.
        say: Told what is being done.
        target: Folder or hub name of the target, instead of what the recipe says.
        draft_vocab_size: Cut Eagle3's vocabulary to this size.
        thinking: Chat-template mode in which it will be served, if that is known.
        force: Replace an earlier export.

    Raises:
        UsageError: There is no such checkpoint, or the format cannot express it.
        CheckpointError: The checkpoint is broken, or of another target.
        SelfCheckError: What was written computes something else; nothing is left of it.
        SlipstreamError: Target or prompts cannot be read, or the place not be written to.
    """
    source = find_source(checkpoint)
    output_dir = output_dir.expanduser().absolute()
    check_new_folder(output_dir, force=force, ours=FILES)
    say(f"reading {source.checkpoint}")
    try:
        drafter = load_drafter(source.checkpoint, stored_dtype(source.checkpoint))
    except CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error
    found = find_target(source, target)
    warnings = _target_warnings(drafter, found) + _mode_warnings(source, found, thinking)
    try:
        if draft_vocab_size is not None:
            drafter = _cut(drafter, draft_vocab_size, source, found, say)
        way = _way(kind, drafter, found)
    except CannotExportError as error:
        raise UsageError(str(error)) from error
    warnings += way.warnings
    with new_folder(output_dir) as folder:
        say(f"writing {way.architecture} to {output_dir}")
        way.write(folder)
        if kind == "native":
            _carry(source.checkpoint, folder)
        say("checking: reading it back, comparing logits and greedy drafts")
        checked = _check(way, folder, drafter)
        card = model_card(
            kind=kind, source=source, target=found, settings=drafter.settings, checked=checked, warnings=warnings
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    return ExportResult(
        format=kind,
        output_dir=str(output_dir),
        checkpoint=str(source.checkpoint),
        algorithm=drafter.algorithm,
        architecture=way.architecture,
        target=found.name if found else None,
        target_fingerprint=found.shape.fingerprint if found else None,
        draft_vocab_size=drafter.settings.draft_vocab_size or drafter.config.vocab_size,
        enable_thinking=source.recipe.prompts.enable_thinking if source.recipe else None,
        accepted_length=source.measured[-1].accepted_length if source.measured else None,
        max_logit_difference=checked.max_logit_difference,
        num_drafts_compared=checked.num_drafts,
        files={path.name: path.stat().st_size for path in sorted(output_dir.iterdir())},
        warnings=warnings,
    )


def _carry(checkpoint: Path, folder: Path) -> None:
    for name in CARRIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _way(kind: Format, drafter: Drafter, target: SourceTarget | None) -> _Way:
    dtype = drafter.lm_head.weight.dtype
    if kind == "native":
        architecture = drafter.family.architecture_prefix + find_algorithm(drafter.algorithm).architecture
        return _Way(partial(save_drafter, drafter), partial(load_drafter, dtype=dtype), architecture)
    tables = Tables.of(drafter)
    if kind == "sglang":
        return _of_written(to_sglang(drafter), partial(load_sglang, tables=tables, dtype=dtype))
    if target is None:
        raise UsageError(
            "vLLM's format names the target, and this checkpoint does not: say which, --target FOLDER|NAME"
        )
    if not target.architectures:
        raise UsageError(f"{target.folder / CONFIG_NAME} names no architectures, which vLLM's format repeats: add them")
    written = to_speculators(drafter, ServedTarget(target.name, target.architectures))
    way = _of_written(written, partial(load_speculators, tables=tables, dtype=dtype))
    if target.is_folder:
        return way._replace(warnings=(*way.warnings, LOCAL_NAME_WARNING.format(name=target.name)))
    return way


def _of_written(written: Written, read: Callable[[Path], Drafter]) -> _Way:
    return _Way(written.save, read, written.config["architectures"][0], written.warnings)


def _check(way: _Way, folder: Path, drafter: Drafter) -> SelfCheck:
    try:
        return compare_drafters(way.read(folder), drafter)
    except CheckpointFormatError as error:
        raise CheckpointError(f"what was written cannot be read back: {error}") from error


def _target_warnings(drafter: Drafter, target: SourceTarget | None) -> tuple[str, ...]:
    """Refuse a drafter of another target; say what could not be checked."""
    if target is None:
        return ("which target it is for is not known: it is only good for the one it was trained with",)
    shape, config = target.shape, drafter.config
    pairs: dict[str, tuple[Any, Any]] = {
        "hidden size": (config.hidden_size, shape.hidden_size),
        "vocabulary": (config.vocab_size, shape.vocab_size),
        "layers": (config.num_target_layers, shape.num_layers),
    }
    wrong = [f"{name} {ours}, the target's is {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        raise CheckpointError(
            f"this is no drafter of {target.name}: it is for {'; '.join(wrong)}. Name its own with --target"
        )
    if not any(target.folder.glob("*.safetensors")):
        return (
            f"the weights of {target.name} are not here: that its embedding and head are the drafter's is unchecked",
        )
    try:
        differing = differing_tables(drafter, target.folder)
    except TargetWeightsError as error:
        raise CheckpointError(f"cannot compare the drafter with its target: {error}") from error
    if differing:
        raise CheckpointError(
            f"this is no drafter of {target.name}: its {' and '.join(differing)} differ from the target's, which a "
            "server drafts with. Name its own with --target"
        )
    return ()


def _mode_warnings(source: ExportSource, target: SourceTarget | None, thinking: bool | None) -> tuple[str, ...]:
    if source.recipe is None:
        return ("in which chat-template mode it was trained, thinking or not, is not known",)
    trained = source.recipe.prompts.enable_thinking
    if thinking == trained or (thinking is None and (target is None or not has_thinking_modes(target))):
        return ()
    mode = "thinking" if trained else "non-thinking"
    advice = f'serve it with chat_template_kwargs {{"enable_thinking": {str(trained).lower()}}}'
    if thinking is None:
        return (f"it was trained in {mode} mode: {advice}, or acceptance falls",)
    return (f"it was trained in {mode} mode and will be served in the other one: acceptance falls. Better {advice}",)


def _cut(
    drafter: Drafter, size: int, source: ExportSource, target: SourceTarget | None, say: Callable[[str], None]
) -> Drafter:
    """Keep the most frequent tokens of what the run trained on."""
    if source.recipe is None or target is None:
        raise UsageError(
            "--draft-vocab-size counts the tokens that the drafter's run trained on, and this checkpoint has no recipe "
            "that says which: export a run's step_<N>"
        )
    say("counting the tokens of the answers it was trained on")
    answers = source.run / ANSWERS if source.run else None
    vocabulary = choose(size, target.folder, count_answer_tokens(source.recipe.prompts, target.folder, answers))
    say(vocabulary.text)
    return with_vocabulary(drafter, vocabulary.tokens)
