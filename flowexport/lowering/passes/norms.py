"""Layer norms for runtimes that have none: scale and shift folded away, few operators left."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit, argument, calls

aten = torch.ops.aten


def fold_norm_affine(exported: ExportedProgram) -> ExportedProgram:
    """Fold W (γ n(x) + β) + b into (W γ) n(x) + (W β + b), n the plain normalisation.

    For runtimes that compute a layer norm operator by operator: two passes over
    the activations less a norm. Exact up to rounding; half weights are multiplied
    in float32 and rounded once.

    Before: ``layer_norm(x; γ, β) -> linear(W, b)`` once or more.
    After: ``layer_norm(x) -> linear(W γ, W β + b)``.
    Requires: nothing. Ensures: a norm over the last axis that linear layers
    alone read has no γ and β; any other is unchanged.
    """
    edit = GraphEdit(exported)
    for node in list(edit.graph.nodes):
        if not calls(node, aten.layer_norm.default) or not _folds(edit, node):
            continue
        gamma, beta = edit.weights[node.args[2]].detach(), argument(node, 3)
        shift = None if beta is None else edit.weights[beta].detach()
        with edit.graph.inserting_before(node):
            plain = edit.call(
                aten.layer_norm.default, *node.args[:2], None, None, *node.args[4:], like=node
            )
        for linear in list(node.users):
            _rewrite(edit, linear, plain, gamma, shift)
        edit.graph.erase_node(node)
    return edit.finish()


def spell_out_norms(exported: ExportedProgram) -> ExportedProgram:
    """Write a layer norm as c · rsqrt(mean(c²) + ε) with c = x − mean(x).

    litert-torch writes x · r + (−mean · r) with the variance beside it: a pass
    over the activations more.

    Before: ``layer_norm(x; γ, β)``. After: ``mean, sub, mul, mean, add, rsqrt, mul
    [, mul γ] [, add β]``.
    Requires: nothing. Ensures: no layer norm over the last axis is left.
    """
    edit = GraphEdit(exported)
    for node in list(edit.graph.nodes):
        if not calls(node, aten.layer_norm.default) or len(node.args[1]) != 1:
            continue
        x, gamma, beta = node.args[0], argument(node, 2), argument(node, 3)
        with edit.graph.inserting_before(node):
            mean = edit.call(aten.mean.dim, x, [-1], True, like=node)
            centred = edit.call(aten.sub.Tensor, x, mean, like=node)
            square = edit.call(aten.mul.Tensor, centred, centred, like=node)
            variance = edit.call(aten.mean.dim, square, [-1], True, like=node)
            raised = edit.call(aten.add.Tensor, variance, argument(node, 4, 1e-5), like=node)
            scale = edit.call(aten.rsqrt.default, raised, like=node)
            result = edit.call(aten.mul.Tensor, centred, scale, like=node)
            if gamma is not None:
                result = edit.call(aten.mul.Tensor, result, gamma, like=node)
            if beta is not None:
                result = edit.call(aten.add.Tensor, result, beta, like=node)
        node.replace_all_uses_with(result)
        edit.graph.erase_node(node)
    return edit.finish()


def _folds(edit: GraphEdit, node: Node) -> bool:
    gamma, beta = argument(node, 2), argument(node, 3)
    if gamma not in edit.weights or (beta is not None and beta not in edit.weights):
        return False
    if len(node.args[1]) != 1 or not node.users:
        return False
    for user in node.users:
        if not calls(user, aten.linear.default) or user.args[0] is not node:
            return False
        if any(w is not None and w not in edit.weights for w in (user.args[1], argument(user, 2))):
            return False
    return True


def _rewrite(
    edit: GraphEdit, linear: Node, plain: Node, gamma: Tensor, shift: Tensor | None
) -> None:
    weight, bias = edit.weights[linear.args[1]].detach(), argument(linear, 2)
    wide = torch.promote_types(weight.dtype, torch.float32)
    offset = None if bias is None else edit.weights[bias].detach().to(wide)
    if shift is not None:
        moved = weight.to(wide) @ shift.to(wide)
        offset = moved if offset is None else offset + moved
    scaled = (weight.to(wide) * gamma.to(wide)).to(weight.dtype)
    args = [plain, edit.parameter(linear.args[1], "normed", scaled)]
    if offset is not None:
        origin = linear.args[1] if bias is None else bias
        args.append(edit.parameter(origin, "normed", offset.to(weight.dtype)))
    with edit.graph.inserting_before(linear):
        result = edit.call(aten.linear.default, *args, like=linear)
    linear.replace_all_uses_with(result)
    edit.graph.erase_node(linear)
