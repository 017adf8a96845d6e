"""The tokens that a run's drafter can draft, where `drafter.draft_vocab_size` cuts its vocabulary.

They are chosen once, before the first step, and kept in the output directory: ranks of every attempt read them there.
This module imports no torch: the driver chooses.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from drafters.vocabulary import check_tokens, most_frequent, share_of
from services.contracts import Record
from services.errors import CheckpointError, RecipeError
from services.files import replace_text
from services.models import read_shape
from services.prompts.token_counts import TokenCounts, count_answer_tokens
from services.reading import first_fault
from services.stop_tokens import find_stop_token_ids
from trainer.export_source import ANSWERS
from trainer.recipe import Recipe

FILE = "draft_vocabulary.json"
WEIGHTS = "model.safetensors"


class DraftVocabulary(Record):
    """The file."""

    tokens: tuple[int, ...]
    """Ids of the target's, ascending."""
    share: float | None = Field(None, ge=0, le=1)
    """Part of the counted answer tokens that these are; None where the file was made from a checkpoint."""
    num_conversations: int = Field(0, ge=0)
    """How many were counted."""

    @property
    def text(self) -> str:
        """For people."""
        known = "" if self.share is None else f": {self.share:.2%} of the answer tokens of {self.num_conversations:,}"
        return f"draft vocabulary of {len(self.tokens):,} tokens{known and known + ' conversations'}"


def ensure_vocabulary(
    recipe: Recipe, target_folder: Path, output_dir: Path, resume_from: Path | None
) -> DraftVocabulary | None:
    """The run's draft vocabulary: as it is there, as a checkpoint has it, or chosen now. None where nothing is cut.

    A run that trains on the target's own answers has none before its first step: then the data's answers are counted.

    Args:
        recipe: With the drafter's settings resolved.
        target_folder: Its tokenizer encodes what is counted.
        output_dir: The run's directory.
        resume_from: The checkpoint to go on from.

    Raises:
        RecipeError: So few tokens cannot be kept.
        PromptError: There is nothing to count.
        CheckpointError: What is there is no vocabulary of this recipe.
    """
    size = recipe.drafter.draft_vocab_size
    if size is None:
        return None
    path = output_dir / FILE
    if path.exists():
        return read_vocabulary(recipe, output_dir)
    if resume_from is not None:
        vocabulary = DraftVocabulary(tokens=_tokens_of(resume_from / WEIGHTS))
    else:
        vocabulary = choose(
            size, target_folder, count_answer_tokens(recipe.prompts, target_folder, output_dir / ANSWERS)
        )
    replace_text(path, vocabulary.model_dump_json() + "\n")
    return vocabulary


def choose(size: int, target_folder: Path, counted: TokenCounts) -> DraftVocabulary:
    """The most frequent tokens of what was counted, and always those that end an answer.

    Raises:
        RecipeError: So few tokens cannot be kept.
    """
    try:
        tokens = most_frequent(
            counted.counts,
            size,
            vocab_size=read_shape(target_folder).vocab_size,
            always=find_stop_token_ids(target_folder),
        )
    except ValueError as error:
        raise RecipeError(f"draft_vocab_size {size}: {error}") from error
    return DraftVocabulary(
        tokens=tokens, share=share_of(counted.counts, tokens), num_conversations=counted.num_conversations
    )


def read_vocabulary(recipe: Recipe, output_dir: Path) -> DraftVocabulary:
    """Read what `ensure_vocabulary` left.

    Raises:
        CheckpointError: It is missing, broken, or of another size.
    """
    path, size = output_dir / FILE, recipe.drafter.draft_vocab_size
    try:
        vocabulary = DraftVocabulary.model_validate_json(path.read_text(encoding="utf-8"))
        check_tokens(vocabulary.tokens, size or 0, vocab_size=2**32)
    except (OSError, ValueError, ValidationError) as error:
        fault = first_fault(error) if isinstance(error, ValueError) else error
        raise CheckpointError(
            f"{path} is no draft vocabulary of {size} tokens: {fault}; remove it, and it is made again"
        ) from error
    return vocabulary


def _tokens_of(weights: Path) -> tuple[int, ...]:
    try:
        with safe_open(weights, "np") as file:
            offsets = file.get_tensor("d2t").tolist()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} has no draft vocabulary: {error}") from error
    return tuple(place + offset for place, offset in enumerate(offsets))
