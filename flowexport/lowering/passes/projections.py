"""Rewrites of the linear layers in front of an attention node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit, argument, calls

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.contiguous.default)
_SPLITS = (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Projection:
    """One of q, k, v as rows ``start .. start + heads * width`` of a linear layer."""

    linear: Node
    start: int
    heads: int
    width: int

    @property
    def fused(self) -> bool:
        return bool(self.linear.args[1].meta["val"].shape[0] != self.heads * self.width)


@dataclass(frozen=True)
class NoMatch:
    """Why a node was left as it is."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def find_projection(edit: GraphEdit, value: Node) -> Projection | NoMatch:
    """Match ``linear [-> split -> getitem] -> view`` or ``linear -> view -> unbind -> getitem``."""
    shape = value.meta["val"].shape
    if len(shape) != 4 or not all(isinstance(s, int) for s in shape[2:]):
        return NoMatch(value.name, "its heads are not static")
    heads, width = int(shape[2]), int(shape[3])
    rows, node, start = heads * width, value, 0
    if calls(node, operator.getitem) and calls(node.args[0], aten.unbind.int):
        index, unbind = node.args[1], node.args[0]
        view = unbind.args[0]
        viewed = view.meta["val"].shape if isinstance(view, Node) else ()
        if not calls(view, *_VIEWS, aten.unflatten.int) or len(viewed) != 5:
            return NoMatch(unbind.name, "unbind of something else than a rank-5 view")
        if argument(unbind, 1, 0) not in (2, -3):
            return NoMatch(unbind.name, f"unbind on axis {argument(unbind, 1, 0)}; expected 2")
        node, start = view.args[0], index * rows
    elif calls(node, *_VIEWS, aten.unflatten.int):
        node = node.args[0]
        if calls(node, operator.getitem) and calls(node.args[0], *_SPLITS):
            index, split = node.args[1], node.args[0]
            axis = argument(split, 2, 0)
            rank = len(split.args[0].meta["val"].shape)
            if axis not in (-1, rank - 1):
                return NoMatch(split.name, f"split on axis {axis}; expected the last")
            parts = split.meta["val"]
            start = sum(int(p.shape[-1]) for p in parts[:index])
            node = split.args[0]
    else:
        return NoMatch(value.name, "not a view of a linear layer")
    if not calls(node, aten.linear.default):
        return NoMatch(getattr(node, "name", "input"), "not a linear layer")
    weight, bias = node.args[1], argument(node, 2)
    if weight not in edit.weights or (bias is not None and bias not in edit.weights):
        return NoMatch(node.name, "its weight is computed")
    x = node.args[0].meta["val"]
    if len(x.shape) != 3:
        return NoMatch(node.name, f"its input has rank {len(x.shape)}; expected 3 (B, N, C)")
    # A view that mixes tokens and channels has other sizes than (B, N, H, D).
    tokens = value.meta["val"].shape[:2]
    if not (str(tokens[0]) == str(x.shape[0]) and str(tokens[1]) == str(x.shape[1])):
        return NoMatch(value.name, "the view changes batch or tokens")
    if start + rows > weight.meta["val"].shape[0]:
        return NoMatch(value.name, "the view is not a slice of the layer's rows")
    return Projection(node, start, heads, width)


def _slices(edit: GraphEdit, p: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = slice(p.start, p.start + p.heads * p.width)
    bias = argument(p.linear, 2)
    weight = edit.weights[p.linear.args[1]].detach()[rows]
    return weight, None if bias is None else edit.weights[bias].detach()[rows]


def split_fused_projections(
    exported: ExportedProgram, attention: tuple[Any, ...]
) -> ExportedProgram:
    """Turn a fused qkv layer into three linear layers: no split, no rank-5 view.

    Before: ``linear(3C) -> view (B,N,3,H,D) -> unbind -> q, k, v`` (or chunk).
    After: ``linear(C) -> view (B,N,H,D)`` three times.
    Requires: attention nodes not decomposed. Ensures: q, k and v of a matched
    node come from their own linear layers; what does not match is unchanged.
    """
    edit = GraphEdit(exported)
    for node in [n for n in edit.graph.nodes if calls(n, *attention)]:
        found = [find_projection(edit, value) for value in node.args[:3]]
        if any(isinstance(f, NoMatch) or not f.fused for f in found):
            continue
        for position, (letter, p) in enumerate(zip("qkv", found, strict=True)):
            assert isinstance(p, Projection)
            weight, bias = _slices(edit, p)
            value = node.args[position]
            args = [p.linear.args[0], edit.parameter(p.linear.args[1], letter, weight)]
            if bias is not None:
                args.append(edit.parameter(p.linear.args[2], letter, bias))
            with edit.graph.inserting_before(node):
                linear = edit.call(aten.linear.default, *args, like=p.linear)
                heads = edit.call(aten.unflatten.int, linear, -1, [p.heads, p.width], like=value)
            node.update_arg(position, heads)
    return edit.finish()


def _rewrite_each(
    exported: ExportedProgram,
    attention: Collection[Any],
    wanted: Sequence[bool],
    match: Callable[[GraphEdit, Node], Sequence[Any]],
    rewrite: Callable[..., None],
) -> tuple[ExportedProgram, list[NoMatch | None]]:
    """Rewrite each wanted attention node of which every part matches.

    Args:
        match: what a node's rewrite needs; a NoMatch among it leaves the node as it is.
        rewrite: gets the edit, the node, and what matched.

    Returns:
        The program, and of each node the first NoMatch, or None.
    """
    edit = GraphEdit(exported)
    nodes = [n for n in edit.graph.nodes if calls(n, *attention)]
    misses: list[NoMatch | None] = []
    for node, asked in zip(nodes, wanted, strict=True):
        found = match(edit, node) if asked else ()
        misses.append(next((f for f in found if isinstance(f, NoMatch)), None))
        if asked and misses[-1] is None:
            rewrite(edit, node, *found)
    return edit.finish(), misses


def project_channel_first(
    exported: ExportedProgram, attention: tuple[Any, ...], wanted: Sequence[bool]
) -> tuple[ExportedProgram, list[NoMatch | None]]:
    """Compute q, k and v channels-first, as W xᵀ + b, for the channel-first form.

    Before: ``linear(x) -> view (B,N,H,D) -> flow_attention``.
    After: ``W @ xᵀ + b -> view (B,H,D,N) -> permute (B,N,H,D) -> flow_attention``;
    the form's own permute cancels this one (:func:`cancel_permutes`).
    Requires: attention nodes not decomposed. Ensures: each wanted node is
    rewritten, or its NoMatch says why not and the graph around it is unchanged.

    Args:
        attention: the attention operators' overloads.
        wanted: which attention nodes to rewrite, in execution order.
    """

    def match(edit: GraphEdit, node: Node) -> Sequence[Any]:
        return [find_projection(edit, value) for value in node.args[:3]]

    def rewrite(edit: GraphEdit, node: Node, *found: Projection) -> None:
        transposed: dict[Node, Node] = {}
        for position, (letter, p) in enumerate(zip("qkv", found, strict=True)):
            weight, bias = _slices(edit, p)
            x, like = p.linear.args[0], p.linear
            weight_node = edit.parameter(p.linear.args[1], letter, weight)
            column = None
            if bias is not None:
                column = edit.parameter(p.linear.args[2], f"{letter}_column", bias[:, None])
            with edit.graph.inserting_before(node):
                if x not in transposed:
                    transposed[x] = edit.call(aten.transpose.int, x, 1, 2, like=like)
                y = edit.call(aten.matmul.default, weight_node, transposed[x], like=like)
                if column is not None:
                    y = edit.call(aten.add.Tensor, y, column, like=like)
                y = edit.call(aten.unflatten.int, y, 1, [p.heads, p.width], like=like)
                y = edit.call(aten.permute.default, y, [0, 3, 1, 2], like=like)
            node.update_arg(position, y)

    return _rewrite_each(exported, attention, wanted, match, rewrite)


def absorb_projections(
    exported: ExportedProgram,
    attention: Mapping[Any, Any | None],
    wanted: Sequence[bool],
) -> tuple[ExportedProgram, list[NoMatch | None]]:
    """Make v's and the output's linear layers arguments of the attention.

    Before: ``v = linear(x) -> view (B,N,H,M); flow_attention(q, k, v) -> view (B,N,H*M) ->
    linear``. After: ``flow_attention_absorbed(q, k, x, weights and biases)``.
    Requires: attention nodes not decomposed. Ensures: as :func:`project_channel_first`.

    Args:
        attention: the operator with both layers, if it has one, by the operator's overload.
        wanted: which attention nodes to rewrite, in execution order; one whose operator
            has none is left without a NoMatch.
    """

    def match(edit: GraphEdit, node: Node) -> Sequence[Any]:
        return find_projection(edit, node.args[2]), _output_layer(edit, node)

    def rewrite(edit: GraphEdit, node: Node, value: Projection, output: Node) -> None:
        weight, bias = _slices(edit, value)
        layer = [edit.parameter(value.linear.args[1], "v", weight), None]
        if bias is not None:
            layer[1] = edit.parameter(value.linear.args[2], "v", bias)
        arguments = [*node.args[:2], value.linear.args[0], *layer]
        arguments += [output.args[1], argument(output, 2), *node.args[3:]]
        with edit.graph.inserting_before(output):
            y = edit.call(attention[node.target], *arguments, like=node)
        output.replace_all_uses_with(y)

    nodes = (n for n in exported.graph.nodes if calls(n, *attention))
    able = [w and attention[n.target] is not None for n, w in zip(nodes, wanted, strict=True)]
    return _rewrite_each(exported, attention, able, match, rewrite)


def _output_layer(edit: GraphEdit, attention: Node) -> Node | NoMatch:
    """Match ``attention -> [clone ->] view (B,N,H*M) -> linear``, each the only reader."""
    shape, node = attention.meta["val"].shape, attention
    for targets in (_COPIES, (*_VIEWS, aten.flatten.using_ints)):
        reader = next(iter(node.users), None)
        if len(node.users) == 1 and calls(reader, *targets):
            assert reader is not None
            node = reader
    merged = node.meta["val"].shape
    if len(merged) != 3 or merged[2] != shape[2] * shape[3] or str(merged[1]) != str(shape[1]):
        return NoMatch(attention.name, "its heads are not merged for a linear layer")
    reader = next(iter(node.users), None)
    if len(node.users) != 1 or not calls(reader, aten.linear.default):
        return NoMatch(attention.name, "its result is not read by one linear layer alone")
    assert reader is not None
    bias = argument(reader, 2)
    if reader.args[1] not in edit.weights or (bias is not None and bias not in edit.weights):
        return NoMatch(reader.name, "its weight is computed")
    return reader
