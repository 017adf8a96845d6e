"""What can be known, and refused, before anything is started: shapes, layer ids, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from drafters.config import DrafterConfig
from drafters.registry import check_target, find_algorithm
from services.contracts import LastRows, TableSignature
from services.errors import RecipeError
from services.models import ModelShape, find_model, read_shape, text_values
from services.prompts.sources import STDLIB
from trainer.depth import needed_buffer_bytes
from trainer.recipe import Recipe


class Preparation(NamedTuple):
    """A recipe that fits its target."""

    recipe: Recipe
    """With layer ids and mask token filled in."""
    target_folder: Path
    shape: ModelShape
    signature: TableSignature
    last_rows: LastRows
    needed_buffer_bytes: int
    """The least capacity that can hold the micro-batches in flight at the longest prompt, in each of its shards."""

    def for_actors(self) -> Recipe:
        """The recipe with absolute paths: actors on a cluster work in folders of their own."""
        prompts = self.recipe.prompts
        paths = {"source": _absolute(prompts.source), "heldout": _absolute(prompts.heldout)}
        return self.recipe.model_copy(
            update={
                "target": self.recipe.target.model_copy(update={"model": str(self.target_folder)}),
                "prompts": prompts.model_copy(update=paths),
            }
        )


def prepare(recipe: Recipe) -> Preparation:
    """Check a recipe against its target's config.

    Raises:
        TargetError: The target's config cannot be found or read.
        RecipeError: There is no drafter for such a target, layer ids or mask token do not fit it, prompts are longer
            than the target's context, or the buffer cannot hold what the trainer needs at once.
    """
    folder = find_model(recipe.target.model, weights=False)
    shape = read_shape(folder)
    try:
        check_target(text_values(folder))
        drafter: DrafterConfig = recipe.drafter.resolve(
            num_target_layers=shape.num_layers, vocab_size=shape.vocab_size, model_type=shape.model_type
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    longest = recipe.prompts.max_length
    if shape.max_tokens and longest > shape.max_tokens:
        raise RecipeError(
            f"prompts.max_length {longest} is more than the target's context of {shape.max_tokens} tokens; lower it"
        )
    assert drafter.target_layer_ids is not None
    signature = TableSignature(
        fingerprint=shape.fingerprint,
        layer_ids=drafter.target_layer_ids,
        hidden_size=shape.hidden_size,
        dtype=recipe.replay.wire_dtype,
    )
    if recipe.replay.chunk < signature.context_row_bytes:
        raise RecipeError(
            f"replay.chunk {recipe.replay.chunk} cannot hold one token's features: {len(signature.layer_ids)} layers "
            f"of width {signature.hidden_size} as {signature.dtype} are {signature.context_row_bytes} bytes; raise it"
        )
    # All that ranks have out at once may be of one shard, which must then still take what completes a micro-batch.
    shards = recipe.replay.shards
    needed = shards * needed_buffer_bytes(recipe, signature)
    if recipe.replay.capacity < needed:
        each = f", {needed // shards} on each of replay.shards {shards}," if shards > 1 else ""
        raise RecipeError(
            f"replay.capacity {recipe.replay.capacity} cannot hold the micro-batches in flight: {needed} bytes "
            f"({needed / 1024**2:.0f}MiB){each} with {recipe.trainer.layout.samples_per_pass} samples of up to "
            f"{longest} tokens in each. Raise replay.capacity, or lower prompts.max_length, trainer.micro_batch_size"
            f"{', replay.shards' if shards > 1 else ''} or trainer.prefetch"
        )
    return Preparation(
        recipe=recipe.model_copy(update={"drafter": drafter}),
        target_folder=folder.resolve(),
        shape=shape,
        signature=signature,
        last_rows=LastRows(find_algorithm(drafter.algorithm).last_rows),
        needed_buffer_bytes=needed,
    )


def _absolute(source: str | None) -> str | None:
    """A prompts file by its absolute path; what names no file stays as it is."""
    return source if source in (None, STDLIB) else str(Path(source).expanduser().resolve())
