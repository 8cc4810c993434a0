"""Compressed weights in Core ML packages, by coremltools.optimize.

Core ML widens them before a product in half precision: smaller files, no integer
arithmetic, but for ``int8-static``, which rounds what the layers read as well. The attention
core has no weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, FlowExportError
from flowexport.core.types import Options, Precision
from flowexport.lowering import LoweredProgram
from flowexport.lowering.layers import LayerIndex, weighted_layers
from flowexport.lowering.quantisation import (
    Decision,
    Quantisation,
    Treatment,
    decide,
    prove,
    treatment_of,
)
from flowexport.targets.coreml.activations import TAKEN, quantise_activations
from flowexport.targets.coreml.ends import ImageEnd

BITS = {Precision.PALETTE8: 8, Precision.PALETTE6: 6, Precision.PALETTE4: 4}
WEIGHTED = ("linear", "conv", "matmul")
_COMPRESSED = {
    "constexpr_affine_dequantize": "linear int8",
    "constexpr_blockwise_shift_scale": "linear int8",
    "constexpr_lut_to_dense": "palette",
}


def compress(
    model: Any,
    program: LoweredProgram,
    options: Options,
    group: int | None = None,
    image: ImageEnd | None = None,
    function: str = "",
) -> tuple[Any, Quantisation]:
    """Compress the weights of a converted model.

    ``int8-weights``: symmetric, one scale an output channel. ``int8-static``: those, and the
    integer layers read int8 through ``quantize`` and ``dequantize``. ``palette<n>``: 2^n values
    a tensor, placed by k-means.

    Args:
        model: ``MLModel`` of an ML Program in half precision.
        program: what it was converted from.
        options: precision, ``keep_float``, and the calibration samples' file.
        group: output channels that share a palette (from iOS 18 on); all of them where None.
        image: the input that is an image, for the samples.
        function: whose program it is; the main one's where empty.

    Raises:
        ConversionError: coremltools refused, or a rule does not hold in the result.
        InputError: the calibration samples do not fit the model's inputs.
    """
    where = f"convert coreml {program.model}"
    layers = weighted_layers(program)
    decisions = decide(layers, options.precision, options.keep_float, where=where)
    index = LayerIndex(layers)
    calibration: dict[str, Any] | None = None
    clipping: dict[str, dict[str, Any]] = {}
    with contextlib.redirect_stdout(sys.stderr):
        import coremltools.optimize.coreml as cto

        names = _names(model._mil_program, index)
        integer = _integer(model._mil_program, names, decisions)
        try:
            if integer:
                paths = _layers(model._mil_program, names)
                model, calibration, clipping = quantise_activations(
                    model, integer, paths, program, options, image, function
                )
            names = _names(model._mil_program, index)
            wanted = [
                n for n, p in names.items() if treatment_of(p, decisions) is not Treatment.FLOAT
            ]
            apply, rule = _method(options.precision, group)
            config = cto.OptimizationConfig(op_name_configs=dict.fromkeys(wanted, rule))
            result = apply(model, config)
        except FlowExportError:
            raise
        except Exception as error:  # coremltools raises anything from AssertionError up
            raise ConversionError(
                f"{where}: coremltools cannot make {options.precision.value}:"
                f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                fix="--precision fp16",
            ) from error
    found = _found(result._mil_program, names, where)
    prove(decisions, found, names, where)
    return result, Quantisation(decisions, found, calibration, clipping=clipping)


def _method(precision: Precision, group: int | None) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return coremltools' function that compresses weights, and its rule for each."""
    import coremltools.optimize.coreml as cto

    bits = BITS.get(precision)
    if bits is None:
        rule = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
        return cto.linear_quantize_weights, rule
    grouped = {"granularity": "per_grouped_channel", "group_size": group} if group else {}
    rule = cto.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0, **grouped)
    return cto.palettize_weights, rule


def _names(program: Any, index: LayerIndex) -> dict[str, tuple[str, ...]]:
    """Return the module paths by the name of each known weight's constant."""
    found = ((source.name, index.find(values)) for _, source, values in _weights(program))
    return {name: paths for name, paths in found if paths}


def _integer(
    program: Any, names: Mapping[str, tuple[str, ...]], decisions: Sequence[Decision]
) -> dict[str, str]:
    """Return the operators whose activations are rounded, and the value that each reads."""
    return {
        op.name: op.x.name
        for op, source, _ in _weights(program)
        if op.op_type in TAKEN
        and source.name in names
        and treatment_of(names[source.name], decisions) is Treatment.INTEGER
    }


def _layers(program: Any, names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the layer of each operator whose weight is known."""
    return {
        op.name: "+".join(names[source.name])
        for op, source, _ in _weights(program)
        if source.name in names
    }


def _weighted(program: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the operators that may have a weight, with the value that it would be."""
    for function in program.functions.values():
        for op in function.operations:
            if op.op_type in WEIGHTED:
                yield op, op.y if op.op_type == "matmul" else op.weight


def _weights(program: Any) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Yield operator, weight constant, and its values as (out, values a channel)."""
    for op, source in _weighted(program):
        if source is None or source.val is None or np.ndim(source.val) < 2:
            continue
        values = np.asarray(source.val, np.float32)
        if op.op_type == "matmul" and not bool(op.transpose_y.val):
            values = np.swapaxes(values, -1, -2)
        yield op, source, values.reshape(values.shape[0], -1)


def _found(program: Any, names: Mapping[str, tuple[str, ...]], where: str) -> dict[str, str]:
    """Return what the compressed program does at each layer, by the operators before it.

    Raises:
        ConversionError: something that is no layer reads rounded activations.
    """
    found: dict[str, str] = {}
    layers = set()
    for op, source in _weighted(program):
        producer = getattr(source, "op", None)
        if producer is None:
            continue
        base = source.name
        paths = next((names[n] for n in names if base == n or base.startswith(f"{n}_")), None)
        if paths is None:
            continue
        layers.add(op.name)
        compressed = producer.op_type in _COMPRESSED
        state = (Treatment.WEIGHTS if compressed else Treatment.FLOAT).value
        if _rounded(op.x):
            state = Treatment.INTEGER.value if compressed else "float with int8 activations"
        for path in paths:
            found[path] = state if found.get(path, state) == state else "mixed"
    for function in program.functions.values():
        for op in function.operations:
            reads = [v for v in op.get_flattened_inputs() if _rounded(v)]
            if reads and op.name not in layers:
                raise ConversionError(
                    f"{where}: {op.op_type} {op.name} reads int8 activations in the finished"
                    " program; expected floating point outside the layers.",
                    fix="--precision int8-weights",
                )
    return found


def _rounded(value: Any) -> bool:
    """Whether a value went through ``quantize`` and ``dequantize``."""
    back = value.op
    if back is None or back.op_type != "dequantize":
        return False
    there = back.input.op
    return there is not None and there.op_type == "quantize"


def compressed_operators(operators: Mapping[str, int]) -> dict[str, int]:
    """Return how many weights of a finished package are compressed, by kind."""
    counts: Counter[str] = Counter()
    for name, kind in _COMPRESSED.items():
        counts[kind] += operators.get(name, 0)
    return {kind: n for kind, n in counts.items() if n}
