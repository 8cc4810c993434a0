"""Activations in 8 bits in Core ML packages: ranges measured here, pairs set by coremltools.

coremltools' own ``linear_quantize_activations`` calibrates with ``MLModel.predict``, which
macOS alone has. The graph pass behind it takes the ranges from anyone: here from the
interpreter, which runs the float16 package on the calibration samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError
from flowexport.core.ranges import Clipping, Span
from flowexport.core.types import Options
from flowexport.lowering import LoweredProgram
from flowexport.lowering.quantisation import read_probes, read_samples, rows
from flowexport.targets.coreml import package
from flowexport.targets.coreml.ends import ImageEnd

TAKEN = ("linear", "conv")
"""Weighted operators that the graph pass takes."""
STEPS = 127
SMALLEST_PEAK = STEPS * 2.0**-14
"""Below it a scale is subnormal in float16, which the Neural Engine may take for 0."""
LARGEST_PEAK = 65504.0
_PREFIX, _TWICE = (
    "compression::insert_prefix_quantize_dequantize_pair",
    "common::remove_redundant_ops",
)


def quantise_activations(
    model: Any,
    operators: Mapping[str, str],
    layers: Mapping[str, str],
    program: LoweredProgram,
    options: Options,
    image: ImageEnd | None,
    function: str = "",
) -> tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]:
    """Put ``quantize`` and ``dequantize`` before operators: int8, symmetric, a scale a tensor.

    Their results stay in floating point. Whether a device multiplies in integers is its own
    choice.

    Args:
        model: ``MLModel`` of an ML Program for iOS 17 or later, its weights not compressed.
        operators: name of the operator -> name of the value that it reads.
        layers: name of the operator -> the layer that it is, for what is told.
        program: what the model was converted from: its inputs' shapes.
        options: the calibration samples' file.
        image: the input that is an image, or None.
        function: whose program it is; the main one's where empty.

    Returns:
        The model, name and number of the samples, and what its ranges clip of each case to be
        verified (see ``flowexport.core.ranges.Clipping``).

    Raises:
        ConversionError: there are no samples, or a range is not finite or past float16.
        InputError: the samples do not fit the package's inputs.
    """
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models.utils import _apply_graph_pass

    where = f"convert coreml {program.model}"
    if options.calibration is None:
        raise ConversionError(
            f"{where}: {options.precision.value} has no calibration samples; expected their file."
        )
    dataset, samples = read_samples(options.calibration, program.inputs)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{program.model}.mlpackage"
        model.save(str(path))
        peaks = measure_peaks(path, set(operators.values()), _feeds(samples, image), where)
        read = {f"{layers.get(name, name)} input": value for name, value in operators.items()}
        cases = {
            case: _feeds(feeds, image)
            for case, feeds in read_probes(options.calibration, function).items()
        }
        clipping = clip(path, cases, read, {end: (-peaks[v], peaks[v]) for end, v in read.items()})
    rule = cto.OpLinearQuantizerConfig(mode="linear_symmetric")
    config = cto.OptimizationConfig(op_name_configs=dict.fromkeys(operators, rule))
    stats = {name: {"rmin": -peak, "rmax": peak} for name, peak in peaks.items()}
    insert = PASS_REGISTRY[_PREFIX]
    insert.set_options([PassOption("config", config), PassOption("activation_stats", stats)])
    # Layers that read the same value share one pair.
    result = _apply_graph_pass(model, [insert, PASS_REGISTRY[_TWICE]])
    told = {"dataset": dataset, "samples": len(next(iter(samples.values())))}
    return result, told, clipping


def measure_peaks(
    path: Path, names: Collection[str], feeds: Mapping[str, np.ndarray], where: str
) -> dict[str, float]:
    """Return the largest magnitude of each value over the samples, by its name.

    Args:
        path: of a float16 package of one function; it is interpreted.
        names: of the values.
        feeds: one array an input, as the package takes it, samples first.

    Raises:
        ConversionError: a value is not in the package, or not one that float16 holds.
        InputError: the package takes no samples of this shape.
    """
    from flowexport.targets.coreml.interpreter import Interpreter, Mode

    interpreter = Interpreter(path, mode=Mode.FP16)
    for feature in interpreter.inputs:
        shape = (1, *feeds[feature.name].shape[1:])
        if not feature.allows(shape):
            raise InputError(
                f"{where}: a calibration sample's {feature.name} is {'x'.join(map(str, shape))};"
                f" expected {feature.expected()}.",
                fix="--calibration with samples of a length that `flexible` allows",
            )
    peaks = dict.fromkeys(names, 0.0)
    seen: set[str] = set()

    def look(name: str, values: Any) -> None:
        if name in peaks:
            # A NaN stays, which max() would drop.
            peaks[name] = float(np.maximum(peaks[name], np.abs(values).max()))
            seen.add(name)

    for one in rows(feeds):
        for name, values in _values(interpreter, one):
            look(name, values)
    for name in sorted(peaks):
        if name not in seen or not peaks[name] <= LARGEST_PEAK:
            found = f"reaches {peaks[name]:g}" if name in seen else "is no value of the package"
            raise ConversionError(
                f"{where}: {name}, which a layer reads, {found} on the calibration samples;"
                f" expected at most {LARGEST_PEAK:g}, the largest float16.",
                fix="keep_float with that layer, or --precision int8-weights",
            )
    return {name: max(peak, SMALLEST_PEAK) for name, peak in peaks.items()}


def clip(
    path: Path,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    read: Mapping[str, str],
    held: Mapping[str, Span],
) -> dict[str, dict[str, Any]]:
    """Return what ranges clip of each case; see ``flowexport.core.ranges.Clipping.worst``.

    Args:
        path: as for :func:`measure_peaks`.
        cases: case -> input -> array, as the package takes them.
        read: ``<layer> input`` -> name of the value.
        held: by ``<layer> input``.
    """
    from flowexport.targets.coreml.interpreter import Interpreter, Mode

    if not cases:
        return {}
    interpreter = Interpreter(path, mode=Mode.FP16)
    ends: dict[str, list[str]] = {}
    for end, name in read.items():
        ends.setdefault(name, []).append(end)
    found = {}
    for case, feeds in cases.items():
        clipping = Clipping(held)
        for one in rows(feeds):
            for name, values in _values(interpreter, one):
                for end in ends.get(name, ()):
                    clipping.look(end, values)
        found[case] = clipping.worst()
    return found


def ranges(path: Path, spec: Any) -> dict[str, Span]:
    """Return what the int8 activations of a finished package hold, by ``<layer> input``."""
    values = package.constants(path, spec)
    several = len(spec.mlProgram.functions) > 1
    found: dict[str, Span] = {}
    for function in sorted(spec.mlProgram.functions):
        operations = package.walk(spec.mlProgram.functions[function])
        # Writing a state gives nothing.
        made = {op.outputs[0].name: op for op in operations if op.outputs}
        paths = package.module_paths(spec, function)
        prefix = f"{function}/" if several else ""
        for name, op in made.items():
            back = made.get(op.inputs["x"].arguments[0].name) if op.type in TAKEN else None
            if back is None or back.type != "dequantize":
                continue
            there = made.get(back.inputs["input"].arguments[0].name)
            if there is None or there.type != "quantize":
                continue
            scale = there.inputs["scale"].arguments[0]
            step = package.array(scale.value) if not scale.name else None
            if step is None:
                step = values[f"{function}/{scale.name} val"]
            peak = STEPS * float(step.ravel()[0])
            end = f"{prefix}{paths.get(name, name)} input"
            # Parts of one layer read the same value, or each has a range.
            low, high = found.get(end, (-peak, peak))
            found[end] = (min(low, -peak), max(high, peak))
    return found


def _values(interpreter: Any, feeds: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and array of the inputs and of every value of a run."""
    yield from feeds.items()
    for value in interpreter.run_with_values(feeds):
        yield value.output_name, value.array


def _feeds(samples: Mapping[str, np.ndarray], image: ImageEnd | None) -> dict[str, np.ndarray]:
    """Return samples as a package takes them: pixels of an image, int32 for int64."""
    feeds = {n: v.astype(np.int32) if v.dtype == np.int64 else v for n, v in samples.items()}
    if image is not None:
        feeds[image.name] = image.pixels.unrounded(feeds[image.name]).astype(np.float32)
    return feeds
