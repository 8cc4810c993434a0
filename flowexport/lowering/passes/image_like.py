"""Tokens as an image of one row: (B, N, C) -> (B, C, 1, N), linear layers as 1x1 convolutions.

The layout that Apple recommends for its Neural Engine (machinelearning.apple.com,
"Deploying Transformers on the Apple Neural Engine", 2022): channels in the second
of four dimensions, the tokens last and contiguous.

Before: ``linear -> gelu -> linear -> add -> layer_norm``. After: ``permute,
unsqueeze -> conv2d -> gelu -> conv2d -> add -> mean, sub, ...``: what lies between
linear layers stays in the layout; everything else gets its tokens back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from flowexport.lowering.passes._edit import GraphEdit, argument, calls

_aten = torch.ops.aten
_UNARY = (_aten.gelu.default, _aten.relu.default, _aten.sigmoid.default, _aten.silu.default)
_BINARY = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)


def image_like(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite a static decomposed program; batch first, tokens (B, N, C)."""
    return _Rewrite(exported).run()


class _Rewrite:
    def __init__(self, exported: ExportedProgram) -> None:
        self.edit = GraphEdit(exported)
        self.images: dict[Node, Node] = {}
        self.tokens: dict[Node, Node] = {}

    def run(self) -> ExportedProgram:
        linears = [n for n in self.edit.graph.nodes if calls(n, _aten.linear.default)]
        if not any(_rank(n) == 3 for n in linears):
            return self.edit.finish()
        for node in list(self.edit.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            build = self._builder(node)
            with self.edit.graph.inserting_before(node):
                if build is not None:
                    self.images[node] = build(node)
                    continue
                # Whatever cannot stay in the layout reads tokens.
                for source in node.all_input_nodes:
                    if source in self.images:
                        node.replace_input_with(source, self._as_tokens(source))
        return self.edit.finish()

    def _builder(self, node: Node) -> Callable[[Node], Node] | None:
        if _rank(node) != 3:
            return None
        if calls(node, _aten.linear.default) and node.args[1] in self.edit.weights:
            return self._linear
        if calls(node, _aten.layer_norm.default) and len(node.args[1]) == 1:  # type: ignore[arg-type]
            return self._layer_norm
        if calls(node, *_UNARY) and node.args[0] in self.images:
            return self._unary
        if calls(node, *_BINARY) and any(a in self.images for a in node.args[:2]):
            fits = all(self._fits(a, node) for a in node.args[:2])
            return self._binary if fits else None
        return None

    def _fits(self, value: Any, result: Node) -> bool:
        """Whether an operand is tokens of the result's shape, one number a channel, or a number."""
        if not isinstance(value, Node):
            return True
        shape, wanted = _shape(value), _shape(result)
        if value in self.edit.weights:
            return shape in (wanted[-1:], wanted[-2:]) or shape == (1, *wanted[1:])
        return shape == wanted

    def _call(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        return self.edit.call(target, *args, like=like, **kwargs)

    def _as_image(self, value: Node, like: Node) -> Node:
        if value in self.images:
            return self.images[value]
        # (B, C, N) that was transposed into tokens needs no second transposition.
        swapped = calls(value, _aten.transpose.int) and {value.args[1], value.args[2]} == {1, 2}
        if swapped or (calls(value, _aten.permute.default) and value.args[1] == [0, 2, 1]):
            plain = value.args[0]
        else:
            plain = self._call(_aten.permute.default, value, [0, 2, 1], like=like)
        self.images[value] = self._call(_aten.unsqueeze.default, plain, 2, like=like)
        return self.images[value]

    def _as_tokens(self, value: Node) -> Node:
        if value not in self.tokens:
            flat = self._call(_aten.squeeze.dim, self.images[value], 2, like=value)
            self.tokens[value] = self._call(_aten.permute.default, flat, [0, 2, 1], like=value)
        return self.tokens[value]

    def _channels(self, weight: Any) -> Node:
        """Return a vector of one number a channel as (C, 1, 1)."""
        value = self.edit.weights[weight]
        return self.edit.parameter(weight, "column", value[:, None, None])

    def _linear(self, node: Node) -> Node:
        source, weight = node.args[:2]
        assert isinstance(source, Node) and isinstance(weight, Node)
        kernel = self.edit.parameter(weight, "kernel", self.edit.weights[weight][:, :, None, None])
        image = self._as_image(source, node)
        return self._call(_aten.conv2d.default, image, kernel, argument(node, 2), like=node)

    def _layer_norm(self, node: Node) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        image = self._as_image(source, node)
        mean = self._call(_aten.mean.dim, image, [1], True, like=node)
        centred = self._call(_aten.sub.Tensor, image, mean, like=node)
        square = self._call(_aten.mul.Tensor, centred, centred, like=node)
        variance = self._call(_aten.mean.dim, square, [1], True, like=node)
        shifted = self._call(_aten.add.Tensor, variance, argument(node, 4, 1e-5), like=node)
        result = self._call(
            _aten.div.Tensor,
            centred,
            self._call(_aten.sqrt.default, shifted, like=node),
            like=node,
        )
        for index, target in ((2, _aten.mul.Tensor), (3, _aten.add.Tensor)):
            weight = argument(node, index)
            if weight is not None:
                result = self._call(target, result, self._channels(weight), like=node)
        return result

    def _unary(self, node: Node) -> Node:
        source = self.images[node.args[0]]  # type: ignore[index]
        return self._call(node.target, source, *node.args[1:], like=node, **node.kwargs)

    def _binary(self, node: Node) -> Node:
        operands: list[Any] = []
        for value in node.args[:2]:
            if not isinstance(value, Node):
                operands.append(value)
            elif value in self.edit.weights:
                operands.append(self._constant(value))
            else:
                operands.append(self._as_image(value, node))
        return self._call(node.target, *operands, like=node, **node.kwargs)

    def _constant(self, weight: Node) -> Node:
        """Return (C), (N, C) or (1, N, C) as what broadcasts over (B, C, 1, N)."""
        value: Tensor = self.edit.weights[weight]
        if value.dim() == 1:
            return self._channels(weight)
        rows = value.reshape(value.shape[-2:]).T
        return self.edit.parameter(weight, "image", rows[None, :, None, :])


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _rank(node: Node) -> int:
    return len(_shape(node))
