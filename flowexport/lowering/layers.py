"""The weighted layers of a program, and how to find them again in a converter's file.

Converters rename, transpose, fold and merge weights, and few keep the module's
path. What survives is the values of an output channel, up to order and scale:
that is what layers are recognised by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import InputKind

from flowexport.core.errors import ConversionError
from flowexport.lowering.program import LoweredProgram, module_path

_LINEAR = {torch.ops.aten.linear.default}
_CONVOLUTION = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.convolution.default,
}
# Half precision rounds by 5e-4; scales folded into a weight by 1e-7.
_SAME = 1e-3
_ALIKE = 0.8


@dataclass(frozen=True)
class Layer:
    """One linear or convolution layer.

    Attributes:
        path: PyTorch module path, ``encoder.layers.0.fc1``.
        kind: ``linear``, ``convolution``, ``pointwise``: a convolution of one element, as linear
            a token, or ``depthwise``: one input channel for each output.
        weight: (output channels, values a channel).
    """

    path: str
    kind: str
    weight: np.ndarray

    @property
    def parameters(self) -> int:
        return int(self.weight.size)


def weighted_layers(program: LoweredProgram) -> tuple[Layer, ...]:
    """Return the linear and convolution layers of a program, in execution order.

    A module that is called twice is there once.
    """
    exported = program.exported
    stores = {**exported.constants, **exported.state_dict}
    targets = {
        spec.arg.name: spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target in stores
    }
    weights = {name: stores[target] for name, target in targets.items()}
    found: dict[tuple[str, int], Layer] = {}
    for node in exported.graph.nodes:
        kind = "linear" if node.target in _LINEAR else "convolution"
        if node.target not in _LINEAR | _CONVOLUTION:
            continue
        weight: Any = weights.get(getattr(node.args[1], "name", ""))
        if weight is None:
            continue
        values = weight.detach().float().numpy()
        if kind == "convolution" and values.shape[1] == 1:
            kind = "depthwise"
        elif kind == "convolution" and values[0, 0].size == 1:
            kind = "pointwise"
        path = module_path(node) or _owner(node, targets) or node.name
        layer = Layer(path, kind, values.reshape(len(values), -1))
        found.setdefault((layer.path, id(weight)), layer)
    return tuple(found.values())


def _owner(node: Any, targets: Mapping[str, Any]) -> str:
    """Return the module of a product's bias.

    A model that multiplies with a part of a layer's weight, as a head does at a shorter
    length, does so in its own forward: the product has no path, the bias has the layer's.
    """
    bias = targets.get(getattr(node.args[2], "name", ""), "") if len(node.args) > 2 else ""
    return str(bias).removeprefix("half_inside.").rpartition(".")[0]


class LayerIndex:
    """Tells which layers a weight found in a file came from."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)
        self._prints: dict[tuple[int, int], np.ndarray] = {}

    def find(self, weight: np.ndarray) -> tuple[str, ...]:
        """Return the module paths of a weight's channels, or nothing where it is unknown.

        Several are told where a converter merged layers that read the same input.

        Args:
            weight: (output channels, values a channel), in any order within a channel.
        """
        paths: list[str] = []
        row, total = 0, len(weight)
        while row < total:
            match = self._match(weight[row], total - row)
            if match is None:
                return self._alike(weight)
            path, size = match
            paths.append(path)
            row += size
        return tuple(dict.fromkeys(paths))

    def _alike(self, weight: np.ndarray) -> tuple[str, ...]:
        """Return the layer of a weight whose columns were scaled, as by a norm folded into it.

        Weights of different layers are all but orthogonal.
        """
        best: tuple[float, str] | None = None
        for layer in self._layers:
            if layer.weight.shape != weight.shape:
                continue
            length = np.linalg.norm(layer.weight) * np.linalg.norm(weight)
            cosine = float(np.vdot(layer.weight, weight) / length) if length > 0 else 0.0
            if cosine > _ALIKE and (best is None or cosine > best[0]):
                best = (cosine, layer.path)
        return () if best is None else (best[1],)

    def _match(self, channel: np.ndarray, room: int) -> tuple[str, int] | None:
        """Return the layer that a channel starts, or starts a part of, and the rows it takes."""
        looked_for = _fingerprint(channel)
        best: tuple[float, str, int] | None = None
        for i, layer in enumerate(self._layers):
            rows, size = layer.weight.shape
            if size != len(channel):
                continue
            # A layer whole, or one of the equal parts that a fused qkv was split into.
            parts = [(0, rows)] if rows <= room else []
            if rows > room and rows % room == 0:
                parts = [(start, room) for start in range(0, rows, room)]
            for start, taken in parts:
                if (i, start) not in self._prints:
                    self._prints[i, start] = _fingerprint(layer.weight[start])
                apart = float(np.abs(self._prints[i, start] - looked_for).max())
                if apart < _SAME and (best is None or apart < best[0]):
                    best = (apart, layer.path, taken)
        return None if best is None else best[1:]


class OperatorNames:
    """Unique names for a file's weighted operators, after the modules whose weights they hold.

    Attributes:
        paths: the module paths by the name given.
    """

    def __init__(self, layers: Sequence[Layer], where: str, taken: Iterable[str] = ()) -> None:
        """
        Args:
            where: the start of a message.
            taken: names that the file has already.
        """
        self.paths: dict[str, tuple[str, ...]] = {}
        self._index = LayerIndex(layers)
        self._where = where
        self._taken = set(taken)

    def name(self, operator: str, weight: np.ndarray, shape: Sequence[int]) -> str:
        """Return the name of an operator: ``path``, ``path.2`` where that is taken, ``a+b`` of two.

        Args:
            operator: what the file calls it, for messages.
            weight: (output channels, values a channel).
            shape: of the weight as the file has it, for messages.

        Raises:
            ConversionError: the weight is that of no layer.
        """
        paths = self._index.find(weight)
        if not paths:
            raise ConversionError(
                f"{self._where}: {operator} has a weight {list(shape)} of no known layer;"
                " expected one of the program's.",
                fix="--precision fp32 or fp16",
            )
        stem = name = "+".join(paths)
        count = 1
        while name in self._taken:
            count += 1
            name = f"{stem}.{count}"
        self._taken.add(name)
        self.paths[name] = paths
        return name


def _fingerprint(channel: np.ndarray) -> np.ndarray:
    """Return a channel's values over their largest, sorted: free of order, layout and scale."""
    values = np.sort(channel.astype(np.float64), axis=None)
    peak = np.abs(values).max()
    return values / peak if peak > 0 else values
