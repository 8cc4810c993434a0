"""Cancel permutations that undo each other."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit, calls

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _order(node: object) -> list[int] | None:
    """Return a permute's or transpose's axis order, or None."""
    if calls(node, aten.permute.default):
        assert isinstance(node, Node)
        rank = len(node.args[1])
        return [a % rank for a in node.args[1]]
    if calls(node, aten.transpose.int):
        assert isinstance(node, Node)
        rank = len(node.meta["val"].shape)
        order = list(range(rank))
        a, b = node.args[1] % rank, node.args[2] % rank
        order[a], order[b] = order[b], order[a]
        return order
    return None


def cancel_permutes(exported: ExportedProgram) -> ExportedProgram:
    """Remove a permute of a permute where together they change nothing.

    Before: ``x -> permute (0,3,1,2) -> permute (0,2,3,1) -> sigmoid``.
    After: ``x -> sigmoid``.
    Requires: attention decomposed. Ensures: no two adjacent permutes are inverse.
    """
    edit = GraphEdit(exported)
    for node in list(edit.graph.nodes):
        outer = _order(node)
        inner = _order(node.args[0]) if outer is not None else None
        if outer is not None and inner is not None and [inner[a] for a in outer] == sorted(outer):
            node.replace_all_uses_with(node.args[0].args[0])
    return edit.finish()


def merge_heads_first(exported: ExportedProgram) -> ExportedProgram:
    """Merge heads before the transpose instead of after it: rank 3 in place of rank 4.

    Before: ``(B,H,M,N) -> permute (0,3,1,2) [-> clone] -> view (B,N,H*M)``.
    After: ``(B,H,M,N) -> flatten (B,H*M,N) -> transpose (1,2)``, which ONNX
    Runtime absorbs into the next matrix product.
    Requires: attention decomposed. Ensures: no such permute is left before a view.
    """
    edit = GraphEdit(exported)
    for node in list(edit.graph.nodes):
        if not calls(node, *_VIEWS, aten.flatten.using_ints):
            continue
        source = node.args[0]
        if calls(source, *_COPIES):
            source = source.args[0]
        if _order(source) != [0, 3, 1, 2]:
            continue
        wanted, have = node.meta["val"].shape, source.meta["val"].shape
        if len(wanted) != 3 or wanted[2] != have[2] * have[3] or str(wanted[1]) != str(have[1]):
            continue
        with edit.graph.inserting_before(node):
            merged = edit.call(aten.flatten.using_ints, source.args[0], 1, 2, like=node)
            result = edit.call(aten.transpose.int, merged, 1, 2, like=node)
        node.replace_all_uses_with(result)
    return edit.finish()
