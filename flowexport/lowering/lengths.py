"""One model at several static lengths: ``forward_<length>``, functions that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from flowexport.core.types import FORWARD, TensorSpec
from flowexport.lowering.program import LoweredProgram, lower


def forward_name(length: int) -> str:
    """Return the name of forward at a length."""
    return f"{FORWARD}_{length}"


def lower_each(
    model: nn.Module,
    shapes: Mapping[str, Sequence[TensorSpec]],
    output_names: Sequence[str],
    **arguments: Any,
) -> dict[str, LoweredProgram]:
    """Export a copy of the model once for each set of input shapes.

    Args:
        shapes: by function name.
        arguments: as :func:`lower` has them.
    """
    return {
        name: lower(copy.deepcopy(model), inputs, output_names, **arguments)
        for name, inputs in shapes.items()
    }


def lower_buckets(
    model: nn.Module,
    buckets: Mapping[int, Sequence[TensorSpec]],
    output_names: Sequence[str],
    **arguments: Any,
) -> LoweredProgram:
    """Export a model of variable length once for each bucket.

    Args:
        buckets: length -> the inputs' specs at that length.
        arguments: as :func:`lower` has them.

    Returns:
        The program of the longest bucket, ``forward_<length>`` by its ``entry``; the
        others are its ``functions``.

    Raises:
        LoweringError: ``torch.export`` refused the model at a length.
    """
    shapes = {forward_name(length): buckets[length] for length in sorted(buckets)}
    programs = lower_each(model, shapes, output_names, **arguments)
    entry, program = programs.popitem()
    return replace(program, entry=entry, functions=programs)
