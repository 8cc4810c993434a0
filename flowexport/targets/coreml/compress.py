"""Compressed weights in Core ML packages, by coremltools.optimize.

Core ML widens them before a product in half precision: smaller files, no integer
arithmetic. The attention core has no weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError
from flowexport.core.types import Options, Precision
from flowexport.lowering import LoweredProgram
from flowexport.lowering.layers import LayerIndex, weighted_layers
from flowexport.lowering.quantisation import (
    Quantisation,
    Treatment,
    decide,
    prove,
    treatment_of,
)

BITS = {Precision.PALETTE8: 8, Precision.PALETTE6: 6, Precision.PALETTE4: 4}
WEIGHTED = ("linear", "conv", "matmul")
_COMPRESSED = {
    "constexpr_affine_dequantize": "linear int8",
    "constexpr_blockwise_shift_scale": "linear int8",
    "constexpr_lut_to_dense": "palette",
}


def compress(
    model: Any, program: LoweredProgram, options: Options, group: int | None = None
) -> tuple[Any, Quantisation]:
    """Compress the weights of a converted model.

    ``int8-weights``: symmetric, one scale an output channel. ``palette<n>``:
    2^n values a tensor, placed by k-means.

    Args:
        model: ``MLModel`` of an ML Program in half precision.
        program: what it was converted from.
        options: precision and ``keep_float``.
        group: output channels that share a palette (from iOS 18 on); all of them where None.

    Raises:
        ConversionError: coremltools refused, or a rule does not hold in the result.
    """
    where = f"convert coreml {program.model}"
    layers = weighted_layers(program)
    decisions = decide(layers, options.precision, options.keep_float, where=where)
    index = LayerIndex(layers)
    names: dict[str, tuple[str, ...]] = {}
    for constant, weight in _weights(model._mil_program):
        paths = index.find(weight)
        if paths:
            names[constant] = paths
    wanted = {
        name: treatment_of(paths, decisions) is not Treatment.FLOAT for name, paths in names.items()
    }
    with contextlib.redirect_stdout(sys.stderr):
        import coremltools.optimize.coreml as cto

        bits = BITS.get(options.precision)
        rule: Any
        if bits is None:
            rule = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
        elif group is None:
            rule = cto.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0)
        else:
            rule = cto.OpPalettizerConfig(
                mode="kmeans",
                nbits=bits,
                weight_threshold=0,
                granularity="per_grouped_channel",
                group_size=group,
            )
        config = cto.OptimizationConfig(
            op_name_configs={name: rule for name, chosen in wanted.items() if chosen}
        )
        apply = cto.linear_quantize_weights if bits is None else cto.palettize_weights
        try:
            result = apply(model, config)
        except Exception as error:  # coremltools raises anything from AssertionError up
            raise ConversionError(
                f"{where}: coremltools cannot make {options.precision.value}:"
                f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                fix="--precision fp16",
            ) from error
    found = _found(result._mil_program, names)
    prove(decisions, found, names, where)
    return result, Quantisation(decisions, found)


def _weights(program: Any) -> list[tuple[str, np.ndarray]]:
    """Return the weight constants of linear and convolution operators, as (out, values)."""
    found = []
    for op in _operations(program):
        if op.op_type not in WEIGHTED:
            continue
        source = op.y if op.op_type == "matmul" else op.weight
        if source is None or source.val is None or np.ndim(source.val) < 2:
            continue
        values = np.asarray(source.val, np.float32)
        if op.op_type == "matmul" and not bool(op.transpose_y.val):
            values = np.swapaxes(values, -1, -2)
        found.append((source.name, values.reshape(values.shape[0], -1)))
    return found


def _operations(program: Any) -> list[Any]:
    return [op for function in program.functions.values() for op in function.operations]


def _found(program: Any, names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return what the compressed program does at each layer, by the operator behind its weight."""
    found: dict[str, str] = {}
    for op in _operations(program):
        if op.op_type not in WEIGHTED:
            continue
        source = op.y if op.op_type == "matmul" else op.weight
        producer = getattr(source, "op", None)
        if producer is None:
            continue
        kind = producer.op_type
        base = source.name
        path = next((names[n] for n in names if base == n or base.startswith(f"{n}_")), None)
        if path is None:
            continue
        state = Treatment.WEIGHTS if kind in _COMPRESSED else Treatment.FLOAT
        for one in path:
            found[one] = state.value
    return found


def compressed_operators(operators: Mapping[str, int]) -> dict[str, int]:
    """Return how many weights of a finished package are compressed, by kind."""
    counts: Counter[str] = Counter()
    for name, kind in _COMPRESSED.items():
        counts[kind] += operators.get(name, 0)
    return {kind: n for kind, n in counts.items() if n}
