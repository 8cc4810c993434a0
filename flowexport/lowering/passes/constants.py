"""Fold what depends on weights alone (position embeddings, reshaped scales)."""

from __future__ import annotations

import hashlib

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit

aten = torch.ops.aten

# A folded tensor may be this much larger than what it was computed from.
LARGEST_GROWTH = 2
LARGEST_CONSTANT = 1 << 20  # elements, of one computed from no weights

_FACTORIES = (
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.full.default,
    aten.ones.default,
    aten.zeros.default,
)

# A symbolic size is none of these: it is not known before the program runs.
_PLAIN = (Node, int, float, bool, str, torch.dtype, torch.device, torch.layout, type(None))
_PLAIN += (torch.memory_format,)


def fold_constants(exported: ExportedProgram) -> ExportedProgram:
    """Evaluate calls on weights and constants alone; each result becomes a parameter.

    Before: ``pe -> slice -> transpose -> add(x)``, ``ones -> tril -> mul(x)``.
    After: ``pe_transpose -> add(x)``, ``tril -> mul(x)``; equal results are kept once.
    Requires: nothing. Ensures: no pure call on weights alone is left, save one
    whose result is over twice the size of its inputs (an ``expand``).
    """
    edit = GraphEdit(exported)
    values: dict[Node, torch.Tensor] = dict(edit.weights)
    for node in edit.graph.nodes:
        inputs = node.all_input_nodes
        if (
            node.op != "call_function"
            or not isinstance(node.target, torch._ops.OpOverload)
            or node.target._schema.is_mutable
            or any(n not in values for n in inputs)
            or (not inputs and node.target not in _FACTORIES)
            or any(not isinstance(a, _PLAIN) for a in _leaves(node))
        ):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        largest = max(LARGEST_CONSTANT, LARGEST_GROWTH * sum(values[n].numel() for n in inputs))
        if isinstance(value, torch.Tensor) and value.numel() <= largest:
            values[node] = value
    kept: dict[tuple[object, ...], Node] = {}
    for node in list(edit.graph.nodes):
        needed = (
            node in values
            and node.op == "call_function"
            and any(u not in values for u in node.users)
        )
        if not needed or not values[node].is_floating_point():
            continue
        value = values[node].contiguous()
        digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().data).digest()
        key = (value.dtype, tuple(value.shape), digest)
        if key not in kept:
            kept[key] = edit.parameter(_origin(edit, node), node.name, value.clone())
        node.replace_all_uses_with(kept[key])
    return edit.finish()


def _leaves(node: Node) -> list[object]:
    leaves: list[object] = []
    torch.fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


def _origin(edit: GraphEdit, node: Node) -> Node | None:
    """Return the first weight that a node is computed from."""
    while node not in edit.weights:
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node
