"""Reads and writes the TFLite flatbuffer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError
from flowexport.core.types import TensorSpec

IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # schema.fbs: Buffer.data (force_align: 16)
MAX_BYTES = 2**31 - 1
WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
"""Operators whose second input may be a layer's weight."""


def read_model(path: Path) -> Any:
    """Return the whole model as objects of the TFLite schema.

    Walking every table is also the check that the file is complete: the
    runtime itself maps the file and trusts it.

    Raises:
        InputError: no such file, not a TFLite model, or truncated.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    if not path.is_file():
        raise InputError(f"inspect tflite: {path} is no file.")
    with path.open("rb") as stream:
        head = stream.read(8)
    if head[4:8] != IDENTIFIER:
        raise InputError(
            f"inspect tflite: {path} starts with {head[4:8]!r}; expected {IDENTIFIER!r}"
            " (a TFLite model)."
        )
    try:
        model = flatbuffer_utils.read_model(str(path))
        # An unused or cut subgraph parses as None: look at what everything needs.
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                model.buffers[tensor.buffer]
        if not model.signatureDefs:
            raise ValueError("no signature")
    except Exception as error:
        raise InputError(
            f"inspect tflite: {path} is truncated or corrupt ({type(error).__name__}).",
            fix="convert it again",
        ) from error
    return model


def write_model(model: Any, path: Path, metadata: Mapping[str, bytes]) -> None:
    """Write ``model`` with named metadata buffers added, constants aligned to 16 bytes.

    Equal shapes, scales and zero points are written once: the runtime wants a zero point of
    8 bytes for each of a weight's channels, which are all 0.

    Raises:
        ConversionError: the model exceeds a flatbuffer's 2 GiB.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self._written: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802
            key = (x.dtype.str, x.tobytes())
            if key not in self._written:
                self._written[key] = super().CreateNumpyVector(x)
            return self._written[key]

    class AlignedBuffer(schema.BufferT):  # type: ignore[misc] # its Pack ignores force_align
        def Pack(self, builder: Any) -> Any:  # noqa: N802 - flatbuffers' name
            data = None
            if self.data is not None and len(self.data):
                content = np.ascontiguousarray(self.data).view(np.uint8).tobytes()
                builder.StartVector(1, len(content), ALIGNMENT)
                builder.head -= len(content)
                builder.Bytes[builder.head : builder.head + len(content)] = content
                data = builder.EndVector()
            schema.BufferStart(builder)
            if data is not None:
                schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    added = {name.encode(): content for name, content in metadata.items()}
    model.metadata = [m for m in model.metadata or [] if m.name not in added]
    for name, content in added.items():
        entry = schema.MetadataT()
        entry.name = name
        entry.buffer = len(model.buffers)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(content, dtype=np.uint8)
        model.buffers.append(buffer)
        model.metadata.append(entry)
    size = sum(len(b.data) for b in model.buffers if b.data is not None)
    if size > MAX_BYTES:
        raise ConversionError(
            f"convert tflite: the constants have {size} bytes; expected at most {MAX_BYTES}"
            " (a flatbuffer's limit).",
            fix="--precision fp16",
        )
    for i, old in enumerate(model.buffers):
        model.buffers[i] = AlignedBuffer()
        model.buffers[i].data = old.data
    _tidy(model)
    builder = SharingBuilder(size + (1 << 20))
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    with path.open("wb") as stream:
        stream.write(memoryview(builder.Bytes)[builder.Head() :])


def _tidy(model: Any) -> None:
    """Turn lists of numbers into arrays, which can be shared, and drop empty quantisation."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.shape is not None:
                tensor.shape = np.asarray(tensor.shape, np.int32)
            told = tensor.quantization
            parts = ("scale", "zeroPoint", "min", "max", "details")
            if told is not None and all(getattr(told, part) is None for part in parts):
                tensor.quantization = None
        for op in graph.operators:
            for ends in ("inputs", "outputs"):
                setattr(op, ends, np.asarray(getattr(op, ends), np.int32))


def signatures(model: Any) -> list[str]:
    """Return the names of all signatures, the main one first."""
    return [s.signatureKey.decode() for s in model.signatureDefs]


def signature(model: Any, name: str | None = None) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return a signature's inputs and outputs, in the order of the subgraph's.

    Args:
        name: of the signature; the first one where None.
    """
    named = dict(zip(signatures(model), model.signatureDefs, strict=True))
    chosen = model.signatureDefs[0] if name is None else named[name]
    graph = model.subgraphs[chosen.subgraphIndex]

    def specs(entries: Any, order: Any) -> list[TensorSpec]:
        names = {int(e.tensorIndex): e.name.decode() for e in entries}
        return [
            TensorSpec(names[int(i)], _shape(graph.tensors[i]), _dtype(graph.tensors[i]))
            for i in order
        ]

    return specs(chosen.inputs, graph.inputs), specs(chosen.outputs, graph.outputs)


def with_main(model: Any, name: str) -> bytes:
    """Return the bytes of the model with a signature's graph as its first one.

    A runtime tells of the first graph alone how it was delegated.
    """
    import copy

    import flatbuffers

    chosen = dict(zip(signatures(model), model.signatureDefs, strict=True))[name].subgraphIndex
    turned = copy.copy(model)  # the tensors' data are shared
    turned.subgraphs = [model.subgraphs[chosen]]
    turned.signatureDefs, turned.metadata = [], []
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(turned.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def names_files(model: Any, buffer_name: str, file_name: str) -> bool:
    """Return whether a metadata buffer names a file that should follow the flatbuffer."""
    for entry in model.metadata or []:
        if entry.name == buffer_name.encode():
            return file_name.encode() in bytes(model.buffers[entry.buffer].data)
    return False


def operator_names(model: Any) -> list[str]:
    """Return the name of each operator code."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    found = []
    for code in model.operatorCodes:
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        custom = code.customCode.decode() if code.customCode else None
        found.append(custom or names.get(builtin, str(builtin)))
    return found


def operators(model: Any) -> Iterator[tuple[Any, Any, str]]:
    """Yield (subgraph, operator, its name) for every operator."""
    codes = operator_names(model)
    for graph in model.subgraphs:
        for op in graph.operators:
            yield graph, op, codes[op.opcodeIndex]


def operator_counts(model: Any) -> dict[str, int]:
    """Return how often each operator occurs, over all subgraphs."""
    counts = Counter(name for _, _, name in operators(model))
    return dict(sorted(counts.items()))


def scalars(model: Any) -> dict[str, int]:
    """Return how often each single float constant occurs: ε, bounds of clamps, factors."""
    kinds = {"float32": np.float32, "float16": np.float16}
    counts: Counter[str] = Counter()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data, kind = model.buffers[tensor.buffer].data, kinds.get(_dtype(tensor))
            if data is None or kind is None or len(data) != np.dtype(kind).itemsize:
                continue
            value = np.frombuffer(np.asarray(data, np.uint8).tobytes(), kind)[0]
            counts[f"{value:.9g}"] += 1
    return dict(sorted(counts.items()))


def constant_bytes(model: Any) -> dict[str, int]:
    """Return the bytes of constants by dtype (each buffer counted once)."""
    seen: dict[int, str] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data):
                seen[tensor.buffer] = _dtype(tensor)
    totals: Counter[str] = Counter()
    for index, dtype in seen.items():
        totals[dtype] += len(model.buffers[index].data)
    return dict(sorted(totals.items()))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in (tensor.shape if tensor.shape is not None else ()))


def _dtype(tensor: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    return str(names.get(tensor.type, tensor.type)).lower()
