"""Removes the copies that litert-torch's reshapes and transposes cost in XNNPACK.

XNNPACK renames a tensor instead of copying it only where the reshape is its sole
reader and has one reader itself. Profiles of one attention layer show the rest
as copies of the whole tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

# They change no shape, so the shape of their input is that of their result.
_ELEMENTWISE = ("LOGISTIC", "RELU", "TANH", "GELU")
_BROADCASTING = ("ADD", "SUB", "MUL", "DIV")
_REDUCTIONS = ("SUM", "MEAN", "REDUCE_MAX", "REDUCE_MIN")
_FLOAT32 = 0  # schema.fbs: TensorType


def without_copies(model: Any) -> None:
    """Rewrite the graphs of a model, in place; every float32 result stays the same number.

    * A fully connected layer keeps its input's dimensions: with a flat result XNNPACK
      copies the input.
    * A matrix product reads what only a leading 1 was dropped from.
    * A matrix product reads a transposed right side itself.
    * A reduction keeps the axes that a reshape behind it puts back as ones.

    Args:
        model: of the TFLite schema, as :func:`flatbuffer.read_model` returns it.
    """
    from flowexport.targets.tflite.flatbuffer import operator_names

    codes = operator_names(model)
    for graph in model.subgraphs:
        if graph.operators is not None:
            _Graph(model, graph, codes).rewrite()


class _Graph:
    """One subgraph with its readers and writers."""

    def __init__(self, model: Any, graph: Any, codes: list[str]) -> None:
        self.model, self.graph, self.codes = model, graph, codes
        self.kept = {int(i) for i in (*graph.inputs, *graph.outputs)}
        self.index()

    def index(self) -> None:
        self.writer: dict[int, Any] = {}
        self.readers: dict[int, list[Any]] = defaultdict(list)
        for op in self.graph.operators:
            for i in op.outputs:
                self.writer[int(i)] = op
            for i in op.inputs:
                self.readers[int(i)].append(op)

    def name(self, op: Any) -> str:
        return self.codes[op.opcodeIndex]

    def shape(self, tensor: int) -> tuple[int, ...]:
        found = self.graph.tensors[tensor].shape
        return tuple(int(d) for d in (found if found is not None else ()))

    def reshaped(self, tensor: int) -> int | None:
        """Return what a tensor was reshaped from, or None."""
        op = self.writer.get(tensor)
        return int(op.inputs[0]) if op is not None and self.name(op) == "RESHAPE" else None

    def rewrite(self) -> None:
        for op in self.graph.operators:
            if self.name(op) == "FULLY_CONNECTED":
                self.keep_dimensions(op)
            elif self.name(op) in _REDUCTIONS:
                self.keep_reduced(op)
        products = [
            op
            for op in self.graph.operators
            if self.name(op) == "BATCH_MATMUL"
            and all(self.graph.tensors[int(i)].type == _FLOAT32 for i in (*op.inputs, *op.outputs))
        ]
        for op in products:
            self.read_unreshaped(op)
        self.drop_dead()
        for op in products:
            self.read_untransposed(op)
        self.drop_dead()
        self.renumber()

    def set_shape(self, tensor: int, shape: tuple[int, ...]) -> None:
        self.graph.tensors[tensor].shape = np.array(shape, np.int32)
        self.graph.tensors[tensor].shapeSignature = None

    def keep_dimensions(self, op: Any) -> None:
        options, given = op.builtinOptions, self.shape(int(op.inputs[0]))
        result = int(op.outputs[0])
        flat = self.shape(result)
        wanted = (*given[:-1], *flat[1:])
        if options.keepNumDims or len(flat) != 2 or np.prod(wanted) != np.prod(flat):
            return
        if len(given) < 3:
            return
        chain, reshapes = self.up_to_reshapes(
            result, lambda reader, _: self.name(reader) in _ELEMENTWISE
        )
        if not reshapes:
            return
        options.keepNumDims = True
        self.give_shape(chain, reshapes, wanted)

    def keep_reduced(self, op: Any) -> None:
        """Keep reduced axes where only scalars stand between and the reshapes that restore them."""
        given, axes = self.shape(int(op.inputs[0])), self.constant(int(op.inputs[1]))
        reduced = {axis % len(given) for axis in axes}
        wanted = tuple(1 if i in reduced else d for i, d in enumerate(given))
        if op.builtinOptions.keepDims or not reduced:
            return
        chain, reshapes = self.up_to_reshapes(int(op.outputs[0]), self.with_scalar)
        restoring = [r for r in reshapes if self.shape(int(r.outputs[0])) == wanted]
        if not restoring or any(int(r.outputs[0]) in self.kept for r in restoring):
            return
        op.builtinOptions.keepDims = True
        self.give_shape(chain, restoring, wanted)

    def up_to_reshapes(
        self, tensor: int, between: Callable[[Any, int], bool]
    ) -> tuple[list[int], list[Any]]:
        """Return a tensor and what operators that ``between`` takes make of it, one after another.

        Also the RESHAPEs that alone read the last of them: none where another operator does.
        """
        chain = [tensor]
        while True:
            readers = self.readers[chain[-1]]
            if chain[-1] in self.kept or not readers:
                return chain, []
            if all(self.name(r) == "RESHAPE" for r in readers):
                return chain, readers
            if len(readers) > 1 or not between(readers[0], chain[-1]):
                return chain, []
            chain.append(int(readers[0].outputs[0]))

    def give_shape(self, chain: list[int], reshapes: list[Any], wanted: tuple[int, ...]) -> None:
        """Give a chain's tensors a shape; drop the reshapes that made it after."""
        for tensor in chain:
            self.set_shape(tensor, wanted)
        for reader in reshapes:
            if self.shape(int(reader.outputs[0])) == wanted:
                self.replace(int(reader.outputs[0]), chain[-1])

    def with_scalar(self, op: Any, tensor: int) -> bool:
        """Say whether ``op`` is elementwise on ``tensor`` alone, or with a scalar beside it."""
        if self.name(op) in _ELEMENTWISE:
            return True
        others = [int(i) for i in op.inputs if int(i) != tensor]
        return self.name(op) in _BROADCASTING and [self.shape(i) for i in others] == [()]

    def read_unreshaped(self, op: Any) -> None:
        for position in (0, 1):
            longer = self.with_leading_one(op, int(op.inputs[position]))
            if longer is None:
                continue
            result = int(op.outputs[0])
            if len(self.shape(longer)) > len(self.shape(result)):
                shape = (1, *self.shape(result))
                if not self.lengthens(result, shape):
                    continue
                self.set_shape(result, shape)
            op.inputs[position] = longer
            self.index()

    def with_leading_one(self, op: Any, tensor: int) -> int | None:
        """Return what is there before ``op``, of a tensor's content with a 1 in front, or None."""
        source = self.reshaped(tensor)
        if source is None:
            return None
        before = self.graph.operators[: self.graph.operators.index(op)]
        others = [int(r.outputs[0]) for r in self.readers[source] if r in before]
        for found in (source, *(t for t in others if self.reshaped(t) == source)):
            if self.shape(found) == (1, *self.shape(tensor)):
                return found
        return None

    def lengthens(self, tensor: int, shape: tuple[int, ...]) -> bool:
        """Say whether every reader gives the same result for a shape with a leading 1."""
        if tensor in self.kept:
            return False
        for reader in self.readers[tensor]:
            if self.name(reader) == "RESHAPE":
                continue
            shapes = [shape if int(i) == tensor else self.shape(int(i)) for i in reader.inputs]
            result = self.shape(int(reader.outputs[0]))
            if self.name(reader) not in _BROADCASTING or np.broadcast_shapes(*shapes) != result:
                return False
        return True

    def read_untransposed(self, op: Any) -> None:
        writer = self.writer.get(int(op.inputs[1]))
        if writer is None or self.name(writer) != "TRANSPOSE":
            return
        order = self.constant(int(writer.inputs[1]))
        swapped = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
        if order != swapped or len(self.readers[int(op.inputs[1])]) > 1:
            return
        op.inputs[1] = int(writer.inputs[0])
        op.builtinOptions.adjY = not op.builtinOptions.adjY
        self.index()

    def constant(self, tensor: int) -> list[int]:
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return [] if data is None else [int(i) for i in np.asarray(data, np.uint8).view(np.int32)]

    def replace(self, old: int, new: int) -> None:
        for reader in self.readers[old]:
            reader.inputs = np.array([new if int(i) == old else i for i in reader.inputs], np.int32)
        self.index()

    def drop_dead(self) -> None:
        """Drop operators whose results nothing reads."""
        while True:
            self.index()
            live = [
                op
                for op in self.graph.operators
                if any(int(i) in self.kept or self.readers[int(i)] for i in op.outputs)
            ]
            if len(live) == len(self.graph.operators):
                return
            self.graph.operators = live

    def renumber(self) -> None:
        """Drop tensors that no operator touches."""
        used = set(self.kept)
        for op in self.graph.operators:
            used.update(int(i) for i in (*op.inputs, *op.outputs, *(op.intermediates or ())))
        order = [i for i in range(len(self.graph.tensors)) if i in used]
        new = {-1: -1, **{old: i for i, old in enumerate(order)}}
        self.graph.tensors = [self.graph.tensors[i] for i in order]
        for op in self.graph.operators:
            for ends in ("inputs", "outputs"):
                renamed = [new[int(i)] for i in getattr(op, ends)]
                setattr(op, ends, np.array(renamed, np.int32))
        self.graph.inputs = np.array([new[int(i)] for i in self.graph.inputs], np.int32)
        self.graph.outputs = np.array([new[int(i)] for i in self.graph.outputs], np.int32)
        for signature in self.model.signatureDefs:
            if self.model.subgraphs[signature.subgraphIndex] is self.graph:
                for entry in (*signature.inputs, *signature.outputs):
                    entry.tensorIndex = new[int(entry.tensorIndex)]
