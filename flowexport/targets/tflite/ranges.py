"""Ranges of activations: measured on the float32 model, read back from the finished file."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flowexport.core.ranges import NOTHING, Clipping, Span, span
from flowexport.targets.tflite.flatbuffer import WEIGHTED, operators
from flowexport.targets.tflite.session import informed

INPUT, OUTPUT = "input", "output"


class Watched:
    """A float32 model that tells the values that some of its operators read and give.

    Args:
        content: the flatbuffer, its weighted operators' results named.
        model: the same as objects of the schema.
        names: of the operators' results.
    """

    def __init__(self, content: bytes, model: Any, names: Collection[str]) -> None:
        from ai_edge_litert.interpreter import Interpreter

        with informed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning: Enabling")  # that it takes memory
            self._interpreter: Any = Interpreter(
                model_content=content, num_threads=1, experimental_preserve_all_tensors=True
            )
        self._places: dict[int, dict[str, tuple[str, int]]] = {}
        for number, graph in enumerate(model.subgraphs):
            ends = self._places[number] = {}
            for op in graph.operators:
                name = graph.tensors[op.outputs[0]].name.decode()
                if name in names:
                    for end, index in ((INPUT, op.inputs[0]), (OUTPUT, op.outputs[0])):
                        tensor = graph.tensors[index].name.decode()
                        ends[f"{name} {end}"] = (tensor, int(index))
        self._graphs = {s.signatureKey.decode(): int(s.subgraphIndex) for s in model.signatureDefs}

    def spans(self, signature: str, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Span]:
        """Return the span of every watched value over some runs, by ``<name> input`` or ``output``.

        Args:
            feeds: as the signature takes them, of batch 1.
        """
        found: dict[str, Span] = {}
        for end, values in self._values(signature, feeds):
            found[end] = span(values, found.get(end, NOTHING))
        return found

    def clipping(
        self, signature: str, feeds: Iterable[Mapping[str, np.ndarray]], held: Mapping[str, Span]
    ) -> dict[str, Any]:
        """Return what a finished file's ranges clip of some runs; see ``Clipping.worst``."""
        found = Clipping(held)
        for end, values in self._values(signature, feeds):
            found.look(end, values)
        return found.worst()

    def tensors(self, spans: Mapping[str, Span]) -> dict[str, Span]:
        """Return spans by the names of their tensors, as the quantizer wants them."""
        return {
            tensor: spans[end]
            for ends in self._places.values()
            for end, (tensor, _) in ends.items()
            if end in spans
        }

    def _values(
        self, signature: str, feeds: Iterable[Mapping[str, np.ndarray]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        graph = self._graphs[signature]
        runner = self._interpreter.get_signature_runner(signature)
        for one in feeds:
            runner(**one)
            for end, (_, index) in self._places[graph].items():
                yield end, self._interpreter.get_tensor(index, graph)


def ranges(model: Any) -> dict[str, Span]:
    """Return what the int8 activations of a finished file hold, by ``<layer> input`` or ``output``.

    Those of an operator whose weights are int8 alone are none.
    """
    from ai_edge_litert import schema_py_generated as schema

    found: dict[str, Span] = {}
    for graph, op, kind in operators(model):
        if kind not in WEIGHTED:
            continue
        name = graph.tensors[op.outputs[0]].name.decode()
        for end, index in ((INPUT, op.inputs[0]), (OUTPUT, op.outputs[0])):
            tensor = graph.tensors[index]
            if tensor.type == schema.TensorType.INT8:
                scale, zero = tensor.quantization.scale[0], tensor.quantization.zeroPoint[0]
                found[f"{name} {end}"] = (
                    float(scale * (-128 - int(zero))),
                    float(scale * (127 - int(zero))),
                )
    return found
