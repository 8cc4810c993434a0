"""Quantised TFLite files, by ai-edge-quantizer.

Its rules match the names of output tensors, and a rule that matches nothing is
silent. Here each weighted operator is first named after its module, and the
finished file is read back to prove that every rule took effect.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError
from flowexport.core.ranges import Span
from flowexport.core.types import Options, Precision
from flowexport.lowering import LoweredProgram
from flowexport.lowering.layers import Layer, OperatorNames, weighted_layers
from flowexport.lowering.quantisation import (
    Quantisation,
    Treatment,
    decide,
    prove,
    read_probes,
    read_samples,
    rows,
    treatment_of,
)
from flowexport.targets.tflite.flatbuffer import WEIGHTED, operators
from flowexport.targets.tflite.half import store_in_half
from flowexport.targets.tflite.ranges import Watched, ranges

_BETWEEN = ("QUANTIZE", "DEQUANTIZE")


def quantise(
    content: bytes,
    programs: Mapping[str, LoweredProgram],
    options: Options,
    *,
    per_channel: bool = True,
) -> tuple[Any, Quantisation]:
    """Quantise a float32 model.

    ``int8-dynamic``: int8 weights, the runtime rounds activations; ``int8-static``:
    int8 on both sides of a product, float32 between products; ``int8-weights``:
    int8 weights behind DEQUANTIZE. Large constants beside the layers are stored in half.

    Args:
        content: the flatbuffer.
        programs: what it was converted from, by signature, the main one first;
            float32, attention decomposed.
        options: precision, ``keep_float``, and the calibration samples' file.
        per_channel: one scale an output channel; False: one for all of a FULLY_CONNECTED,
            for runtimes that read no more. Convolutions keep theirs: with float inputs a
            DEPTHWISE_CONV_2D reads one a channel on every runtime, and past the end of fewer.

    Returns:
        The flatbuffer's bytes, and what was done.

    Raises:
        ConversionError: the quantizer refused the model, or a rule does not hold in the result.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    main = next(iter(programs))
    program = programs[main]
    where = f"convert tflite {program.model}"
    layers = weighted_layers(program)
    decisions = decide(
        layers,
        options.precision,
        options.keep_float,
        where=where,
        dynamic_depthwise=not per_channel,  # XNNPACK has none; an old runtime does without it
    )
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    names = _name_operators(model, _all_layers(programs, where), where)
    wanted = {name: treatment_of(paths, decisions) for name, paths in names.items()}
    calibration, watched = None, None
    with _on_stderr():
        from ai_edge_quantizer import qtyping, quantizer

        try:
            named = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
            work = quantizer.Quantizer(named)
            for name, treatment in wanted.items():
                for kind in WEIGHTED:
                    one = kind == "FULLY_CONNECTED" and not per_channel
                    granularity = qtyping.QuantGranularity["TENSORWISE" if one else "CHANNELWISE"]
                    _add_rule(work, name, kind, treatment, options.precision, granularity)
            held = None
            if work.need_calibration:
                integer = [n for n, t in wanted.items() if t is Treatment.INTEGER]
                watched = Watched(named, model, integer)
                held, calibration = _calibrate(watched, programs, options, where)
            result = work.quantize(held and _statistics(held)).quantized_model
        except ConversionError:
            raise
        except Exception as error:  # the quantizer raises anything from KeyError up
            raise ConversionError(
                f"{where}: ai-edge-quantizer cannot make {options.precision.value}:"
                f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                fix="--precision fp16",
            ) from error
    # Its constants may lie behind the flatbuffer.
    finished = flatbuffer_utils.read_model_from_bytearray(bytearray(result))
    found = _found(finished, model, names, where)
    prove(decisions, found, names, where)
    half = store_in_half(finished)
    clipping = {}
    if watched is not None:
        clipping = _clipping(watched, list(programs), options, ranges(finished))
    result = flatbuffer_utils.convert_object_to_bytearray(finished)
    return result, Quantisation(decisions, found, calibration, half, clipping)


def _statistics(held: Mapping[str, Span]) -> dict[str, dict[str, np.ndarray]]:
    """Return spans as the quantizer takes them."""
    return {
        tensor: {"min": np.array([[low]], np.float32), "max": np.array([[high]], np.float32)}
        for tensor, (low, high) in held.items()
    }


def _add_rule(
    work: Any,
    name: str,
    kind: str,
    treatment: Treatment,
    precision: Precision,
    granularity: Any,
) -> None:
    from ai_edge_quantizer.qtyping import TFLOperationName

    scope, operation = f"^{re.escape(name)};*$", TFLOperationName(kind)
    if treatment is Treatment.FLOAT:
        return
    if treatment is Treatment.WEIGHTS:
        work.add_weight_only_config(scope, operation, num_bits=8, granularity=granularity)
    elif precision is Precision.INT8_DYNAMIC:
        work.add_dynamic_config(scope, operation, num_bits=8, granularity=granularity)
    else:
        work.add_static_config(
            scope,
            operation,
            activation_num_bits=8,
            weight_num_bits=8,
            weight_granularity=granularity,
        )


def _calibrate(
    watched: Watched, programs: Mapping[str, LoweredProgram], options: Options, where: str
) -> tuple[dict[str, Span], dict[str, Any]]:
    """Return the span of each tensor over the samples, and their name and number.

    A range holds every sample's values: the quantizer's own calibration takes a moving
    average of the samples' extremes, beyond which half of the samples lie (digits: 25 dB
    instead of 40). Each signature is run on samples of its length.
    """
    if options.calibration is None:
        raise ConversionError(
            f"{where}: {options.precision.value} has no calibration samples; expected their file."
        )
    held: dict[str, Span] = {}
    for signature, program in programs.items():
        name, samples = read_samples(options.calibration, program.inputs)
        held |= watched.spans(signature, rows(samples))
    count = len(next(iter(samples.values())))
    return watched.tensors(held), {"dataset": name, "samples": count}


def _clipping(
    watched: Watched, signatures: Sequence[str], options: Options, held: Mapping[str, Span]
) -> dict[str, dict[str, Any]]:
    """Return what a finished file's ranges clip of each case that it will be verified on."""
    assert options.calibration is not None
    main = signatures[0]
    return {
        case: watched.clipping(signature, rows(feeds), held)
        for signature in signatures
        for case, feeds in read_probes(
            options.calibration, "" if signature == main else signature
        ).items()
    }


def _all_layers(programs: Mapping[str, LoweredProgram], where: str) -> list[Layer]:
    """Return the layers of every signature, by the main one's paths.

    A length may hold a part of another's weight, as a head for all steps does, and the
    product with it, in the model's own forward, has no path: the order tells which it is.
    """
    main, *others = (weighted_layers(program) for program in programs.values())
    known = list(main)
    for layers in others:
        if [layer.kind for layer in layers] != [layer.kind for layer in main]:
            raise ConversionError(
                f"{where}: a signature has {len(layers)} layers, the main one {len(main)};"
                " expected the same layers, in the same order, in every signature.",
                fix="--precision fp16",
            )
        for layer, first in zip(layers, main, strict=True):
            if not np.array_equal(layer.weight, first.weight):
                known.append(replace(layer, path=first.path))
    return known


def _name_operators(model: Any, layers: Sequence[Layer], where: str) -> dict[str, tuple[str, ...]]:
    """Name the output of each weighted operator after its module; return the paths by name."""
    names = OperatorNames(layers, where)
    paths = {layer.path for layer in layers}
    # Short, for the converter's names weigh as much as small layers; the quantizer tells the
    # tensors of all graphs apart by them.
    for i, tensor in enumerate(t for graph in model.subgraphs for t in graph.tensors):
        tensor.name = (f"{i:x}" if f"{i:x}" not in paths else f"{i:x}%").encode()
    for graph, op, kind in operators(model):
        if kind not in WEIGHTED:
            continue
        tensor = graph.tensors[op.inputs[1]]
        data = model.buffers[tensor.buffer].data
        if data is None or not len(data):
            continue  # a product of two activations: the attention core's
        shape = [int(d) for d in tensor.shape]
        weight = np.asarray(data).view(np.uint8).view(np.float32).reshape(shape)
        # A convolution of one channel becomes a depthwise one, its output channels last.
        weight = np.moveaxis(weight, -1, 0) if kind.startswith("DEPTHWISE") else weight
        name = names.name(f"a {kind}", weight.reshape(len(weight), -1), shape)
        graph.tensors[op.outputs[0]].name = name.encode()
    return names.paths


def _found(
    model: Any, before: Any, names: Mapping[str, Sequence[str]], where: str
) -> dict[str, str]:
    """Return what the finished file does at each layer; refuse integers anywhere else.

    The quantizer keeps the order of operators, so the weighted ones are matched by it.
    """
    from ai_edge_litert import schema_py_generated as schema

    order = [
        graph.tensors[op.outputs[0]].name.decode()
        for graph, op, kind in operators(before)
        if kind in WEIGHTED and graph.tensors[op.outputs[0]].name.decode() in names
    ]
    made: dict[tuple[int, int], str] = {}
    for graph, op, kind in operators(model):
        made |= {(id(graph), int(o)): kind for o in op.outputs}
    found: dict[str, str] = {}
    position = 0
    for graph, op, kind in operators(model):
        types = [graph.tensors[i].type if i >= 0 else None for i in op.inputs]
        eight = [t == schema.TensorType.INT8 for t in types]
        source = made.get((id(graph), int(op.inputs[1]))) if kind in WEIGHTED else None
        weighted = kind in WEIGHTED and source in (None, "DEQUANTIZE")
        if not weighted:
            if any(eight) and kind not in _BETWEEN:
                raise ConversionError(
                    f"{where}: {kind} {graph.tensors[op.outputs[0]].name.decode()!r} takes"
                    " integers in the finished file; expected floating point outside the layers."
                )
            continue
        if eight[1]:
            state = Treatment.INTEGER.value
        elif source == "DEQUANTIZE":
            state = Treatment.WEIGHTS.value
        else:
            state = Treatment.FLOAT.value
        if position >= len(order):
            position += 1
            break
        for path in names[order[position]]:
            found[path] = state if found.get(path, state) == state else "mixed"
        position += 1
    if position != len(order):
        raise ConversionError(
            f"{where}: the finished file has another number of weighted operators than"
            f" {len(order)}, as before."
        )
    return found


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield
