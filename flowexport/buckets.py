"""Length buckets: a model of variable length exported at a few static lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flowexport.core.errors import RecipeError
from flowexport.core.types import Dataset, ModelSpec, TensorSpec

if TYPE_CHECKING:
    from flowexport.recipes import Recipe

Buckets = Mapping[int, Sequence[TensorSpec]]
"""Length -> the inputs' specs at that length, in increasing order."""


def bucket_inputs(recipe: Recipe, spec: ModelSpec) -> dict[int, tuple[TensorSpec, ...]] | None:
    """Return the inputs at each length that the recipe asks for, or None where it asks for none.

    Raises:
        RecipeError: the model is causal, or no input has the dimension behind its batch.
    """
    if recipe.buckets is None:
        return None
    ((dimension, lengths),) = recipe.buckets.items()
    where = recipe.where("buckets", dimension)
    asked = spec.streaming if recipe.streaming is None else recipe.streaming
    if asked is not False:
        raise RecipeError(
            f"{where}: {spec.name} is causal and exported with its step; expected no buckets.",
            fix=f"`streaming: {{lengths: {list(lengths)}}}`, or `streaming: false`",
        )
    if not any(dimension in s.shape[1:] for s in spec.inputs):
        have = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in spec.inputs)
        shown = ", ".join(f"{s.name}: {_with_length(s, dimension)}" for s in spec.inputs)
        raise RecipeError(
            f"{where}: buckets names the dimension {dimension!r}, but the inputs are {have};"
            " expected an input with that dimension behind its batch.",
            fix=f"where the model takes any length, name it: `inputs: {{{shown}}}`",
        )
    return {
        n: tuple(
            replace(s, shape=tuple(n if d == dimension else d for d in s.shape))
            for s in spec.inputs
        )
        for n in lengths
    }


def pad_dataset(recipe: Recipe, dataset: Dataset, spec: ModelSpec) -> Dataset:
    """Return a data set cut or zero-padded to the longest bucket.

    Raises:
        RecipeError: a sample is longer than the bucket.
    """
    from flowexport.parity import fit_lengths, real_steps

    fitted, kept = fit_lengths(dataset, spec.inputs)
    if len(kept) < len(dataset):
        ((dimension, lengths),) = (recipe.buckets or {"length": ()}).items()
        longest = int(real_steps(dataset).max())
        raise RecipeError(
            f"{recipe.where('buckets')}: {len(dataset) - len(kept)} of the {len(dataset)} samples"
            f" of {dataset.name} are longer than the longest bucket; expected one of"
            f" {longest} or more.",
            fix=f"buckets: {{{dimension}: {[*lengths, longest]}}}",
        )
    return fitted


def _with_length(spec: TensorSpec, dimension: str) -> str:
    """Show a spec with its second dimension named."""
    return "x".join(map(str, (*spec.shape[:1], dimension, *spec.shape[2:])))
