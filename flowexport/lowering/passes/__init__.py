"""Graph rewrites, one rule a file; their order is here.

``clean`` runs once, when a model is lowered; ``before_decomposition`` and
``after_decomposition`` run around the choice of forms, for one target;
``fold_norm_affine`` and ``spell_out_norms`` are for runtimes that have no layer norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.export import ExportedProgram

from flowexport.lowering.passes.constants import fold_constants
from flowexport.lowering.passes.dropout import remove_dropout
from flowexport.lowering.passes.layer_scale import fold_layer_scale
from flowexport.lowering.passes.norms import fold_norm_affine, spell_out_norms
from flowexport.lowering.passes.permutes import cancel_permutes, merge_heads_first
from flowexport.lowering.passes.projections import (
    NoMatch,
    absorb_projections,
    project_channel_first,
    split_fused_projections,
)

CLEAN = (remove_dropout, fold_constants, fold_layer_scale)
"""Whatever the target: in this order, each ``ExportedProgram -> ExportedProgram``."""

DECOMPOSED = (cancel_permutes, merge_heads_first, fold_constants)
"""After the attention nodes became their forms."""

PROJECTED = "_projected"
"""A form of this suffix wants its projections channels-first."""


def clean(exported: ExportedProgram) -> ExportedProgram:
    """Run the passes that help every target."""
    for rewrite in CLEAN:
        exported = rewrite(exported)
    return exported


def before_decomposition(
    exported: ExportedProgram, overloads: Sequence[Any], forms: Sequence[str]
) -> tuple[ExportedProgram, list[NoMatch | None]]:
    """Rewrite the projections as each attention node's form wants them.

    Args:
        overloads: the attention operators.
        forms: the chosen form of each attention node, in execution order.

    Returns:
        The program, and for each node why its projections were left, or None.
    """
    wanted = [form.endswith(PROJECTED) for form in forms]
    exported, misses = project_channel_first(exported, tuple(overloads), wanted)
    return split_fused_projections(exported, tuple(overloads)), misses


def after_decomposition(exported: ExportedProgram) -> ExportedProgram:
    """Run the passes that tidy the decomposed graph."""
    for rewrite in DECOMPOSED:
        exported = rewrite(exported)
    return exported


__all__ = [
    "CLEAN",
    "DECOMPOSED",
    "NoMatch",
    "absorb_projections",
    "after_decomposition",
    "before_decomposition",
    "clean",
    "fold_norm_affine",
    "spell_out_norms",
]
