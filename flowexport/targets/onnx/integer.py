"""Integer products in ONNX files, by ONNX Runtime's quantizer."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import ConversionError
from flowexport.core.ranges import Clipping, Span
from flowexport.core.types import Options
from flowexport.lowering.program import LoweredProgram
from flowexport.lowering.quantisation import read_samples, rows

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

WEIGHTED = ("MatMul", "Gemm", "Conv")
BATCH = 32
"""Samples that one run of the calibration takes, where the batch is dynamic."""


def weight_place(node: NodeProto, initializers: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return which input is a node's weight, and the axis of its output channels."""
    if node.op_type not in WEIGHTED:
        return None
    for position in (1, 0) if node.op_type == "MatMul" else (1,):
        tensor = initializers.get(node.input[position])
        if tensor is None or len(tensor.dims) < 2:
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        first = node.op_type == "Conv" or position == 0 or transposed
        return position, 0 if first else len(tensor.dims) - 1
    return None


def channels(tensor: Any, axis: int) -> np.ndarray:
    """Return a weight as (output channels, values a channel)."""
    from onnx import numpy_helper

    values = np.moveaxis(numpy_helper.to_array(tensor), axis, 0)
    return values.reshape(len(values), -1)


def dynamic(model: ModelProto, nodes: Sequence[str]) -> ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(nodes),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": safe_ranges(model, nodes)},
        )
        return onnx.load(path)


def static(
    model: ModelProto,
    nodes: Sequence[str],
    options: Options,
    program: LoweredProgram,
    symmetric: bool,
) -> tuple[ModelProto, dict[str, Any]]:
    """Return the model with QDQ pairs before these nodes, and name and number of the samples."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    if options.calibration is None:
        raise ConversionError(
            f"convert onnx {program.model}: {options.precision.value} has no calibration samples;"
            " expected their file."
        )
    name, samples = read_samples(options.calibration, program.inputs)
    count = len(next(iter(samples.values())))
    batched = all(isinstance(s.shape[0], str) for s in program.inputs)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        quantize_static(
            model,
            path,
            _Reader(samples, BATCH if batched else 1),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=list(nodes),
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": symmetric,
                "TensorQuantOverrides": {} if symmetric else safe_ranges(model, nodes),
                # The result of a product stays in floating point for what follows.
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            },
        )
        quantised = onnx.load(path)
    _round_for(quantised, nodes)
    return quantised, {"dataset": name, "samples": count}


def _round_for(model: ModelProto, nodes: Sequence[str]) -> None:
    """Let only these nodes read rounded activations.

    The quantizer gives every reader of a tensor the rounded one: a layer that is
    kept in float beside an integer one, the residual stream, a norm.
    """
    producers = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.name in nodes or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            widened = producers.get(name)
            if widened is None or widened.op_type != "DequantizeLinear":
                continue
            rounded = producers.get(widened.input[0])
            if rounded is not None and rounded.op_type == "QuantizeLinear":
                node.input[i] = rounded.input[0]


def clip(
    model: ModelProto,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    held: Mapping[str, Span],
) -> dict[str, dict[str, Any]]:
    """Return what a finished file's ranges clip of each case; see ``Clipping.worst``.

    Args:
        model: float32, its nodes named.
        cases: case -> input -> array.
        held: by ``<node> input``.
    """
    import onnx
    import onnxruntime as ort

    if not cases:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    weights = {i.name: i for i in model.graph.initializer}
    read = {}
    for node in model.graph.node:
        if f"{node.name} input" in held and (place := weight_place(node, weights)) is not None:
            read[f"{node.name} input"] = node.input[1 - place[0]]
    fed = {i.name for i in model.graph.input}
    known = {o.name for o in model.graph.output}
    wanted = sorted({*read.values()} - fed)
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        watched.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )
    found = {}
    for case, feeds in cases.items():
        clipping = Clipping(held)
        for one in rows(feeds):
            values = one | dict(zip(wanted, session.run(wanted, one), strict=True))
            for end, name in read.items():
                clipping.look(end, values[name])
        found[case] = clipping.worst()
    return found


def ranges(model: ModelProto) -> dict[str, Span]:
    """Return what the rounded activations of a finished file hold, by ``<node> input``."""
    from onnx import numpy_helper

    constants = {i.name: i for i in model.graph.initializer}
    producers = {o: n for n in model.graph.node for o in n.output}
    found: dict[str, Span] = {}
    for node in model.graph.node:
        for name in node.input if node.op_type in WEIGHTED and node.name else ():
            widened = producers.get(name)
            if widened is None or widened.op_type != "DequantizeLinear":
                continue
            rounded = producers.get(widened.input[0])
            if rounded is None or rounded.op_type != "QuantizeLinear":
                continue
            scale, zero = (numpy_helper.to_array(constants[i]) for i in rounded.input[1:3])
            limits = np.iinfo(zero.dtype)
            found[f"{node.name} input"] = (
                float(scale * (limits.min - int(zero))),
                float(scale * (limits.max - int(zero))),
            )
    return found


def safe_ranges(model: ModelProto, nodes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return each output channel's range so that no pair of products saturates.

    AVX2's vpmaddubsw adds two neighbours along the summed axis in 16 bits:
    255 (a + b) <= 32767 asks for |a + b| <= 128, which full-range weights of one
    sign break. Most channels need a scale some 10 % coarser for it; leaving one bit
    unused everywhere (ONNX Runtime's reduce_range) costs 6 dB instead.

    Returns:
        ``TensorQuantOverrides`` of ONNX Runtime's quantizer.
    """
    initializers = {i.name: i for i in model.graph.initializer}
    ranges: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        place = weight_place(node, initializers) if node.name in nodes else None
        if place is None:
            continue
        tensor = initializers[node.input[place[0]]]
        weights = channels(tensor, place[1])
        even = weights[:, : weights.shape[1] // 2 * 2]
        pairs = np.abs(even[:, 0::2] + even[:, 1::2]).max(axis=1, initial=0)
        # One step of room for the rounding of both.
        limits = np.maximum(np.abs(weights).max(axis=1), pairs * (127 / 126))
        ranges[tensor.name] = [
            {"axis": place[1], "rmin": -float(r), "rmax": float(r)} for r in limits
        ]
    return ranges


class _Reader:
    """Feeds for ONNX Runtime's calibration (``CalibrationDataReader``)."""

    def __init__(self, samples: Mapping[str, np.ndarray], batch: int) -> None:
        self._feeds = self._batches(samples, batch)

    @staticmethod
    def _batches(samples: Mapping[str, np.ndarray], batch: int) -> Iterator[dict[str, Any]]:
        count = len(next(iter(samples.values())))
        for start in range(0, count, batch):
            yield {name: values[start : start + batch] for name, values in samples.items()}

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


class _quiet:  # noqa: N801
    """Keeps the quantizer's advice about preprocessing, which was done, off the log."""

    def __enter__(self) -> None:
        self._level = logging.root.level
        logging.root.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.root.setLevel(self._level)
