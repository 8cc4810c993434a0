"""Fold layer scale into the linear layer before it."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit, argument, calls

aten = torch.ops.aten


def fold_layer_scale(exported: ExportedProgram) -> ExportedProgram:
    """Fold γ · linear(x; W, b) into linear(x; γ W, γ b).

    Before: ``linear -> mul(gamma) -> add``. After: ``linear -> add``.
    Requires: dropout gone. Ensures: no linear whose only user multiplies it by
    a vector of weights. Half weights are scaled in float32 and rounded once.
    """
    edit = GraphEdit(exported)
    for node in list(edit.graph.nodes):
        if not calls(node, aten.mul.Tensor):
            continue
        match = _match(edit, node)
        if match is None:
            continue
        linear, gamma = match
        weight, bias = edit.weights[linear.args[1]], argument(linear, 2)
        scale = edit.weights[gamma].detach().reshape(-1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        new_weight = (weight.to(wide) * scale.to(wide)[:, None]).to(weight.dtype)
        args = [linear.args[0], edit.parameter(linear.args[1], "scaled", new_weight)]
        if bias is not None:
            new_bias = (edit.weights[bias].to(wide) * scale.to(wide)).to(weight.dtype)
            args.append(edit.parameter(bias, "scaled", new_bias))
        with edit.graph.inserting_before(node):
            scaled = edit.call(aten.linear.default, *args, like=linear)
        node.replace_all_uses_with(scaled)
        edit.graph.erase_node(node)
        edit.graph.erase_node(linear)
    return edit.finish()


def _match(edit: GraphEdit, node: Node) -> tuple[Node, Node] | None:
    for linear, gamma in (node.args[:2], node.args[1::-1]):
        if not calls(linear, aten.linear.default) or gamma not in edit.weights:
            continue
        weight, bias = linear.args[1], argument(linear, 2)
        known = weight in edit.weights and (bias is None or bias in edit.weights)
        width = weight.meta["val"].shape[0]
        shape = tuple(gamma.meta["val"].shape)
        vector = shape[-1:] == (width,) and gamma.meta["val"].numel() == width
        same_rank = len(shape) <= len(linear.meta["val"].shape)
        if known and vector and same_rank and len(linear.users) == 1:
            return linear, gamma
    return None
