"""From a raw sample to a model's inputs: the steps of a package, executed.

This is the reference that a client's own preprocessing is held against. All
steps work in float64; only the last result is rounded to the input's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from flowexport.core.errors import InputError, UnknownNameError

MAX_ABS = 2e-6
REASON = (
    "short sums in float64, in any order, are the same to 1e-14; rounding to float32 leaves 1e-6"
    " on values up to 16, and a client may round on either side"
)
SIDES = ((280, 280), (120, 96), (64, 150))
"""Height and width of the golden drawings."""


def make_inputs(
    source: Mapping[str, Any], raw: np.ndarray, dtypes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Make every model input of one raw sample.

    Args:
        source: a preprocessing source of ``flowexport.package/1``.
        raw: one sample, of the source's raw shape.
        dtypes: numpy dtype name of each model input.

    Returns:
        One array an input, batch of one first.

    Raises:
        InputError: the sample has more rows than the input takes, or another rank.
        UnknownNameError: a step that no client could know.
    """
    return {
        name: apply_steps(steps, raw).astype(dtypes[name])
        for name, steps in source["inputs"].items()
    }


def apply_steps(steps: Sequence[Mapping[str, Any]], raw: np.ndarray) -> np.ndarray:
    """Apply steps to one raw sample; float64. Errors as :func:`make_inputs`."""
    value = np.asarray(raw, dtype=np.float64)
    for step in steps:
        operation = _OPERATIONS.get(step["op"])
        if operation is None:
            raise UnknownNameError("step", str(step["op"]), _OPERATIONS, where="preprocessing")
        value = operation(value, step)
    return value


def _scale(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    return value * step["factor"]


def _normalise(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    count = value.shape[-1] if value.ndim else 0
    if not len(step["mean"]) == len(step["std"]) == count:
        raise InputError(
            f"preprocessing: normalise has {len(step['mean'])} means and {len(step['std'])}"
            f" deviations; expected {count} of each."
        )
    return (value - np.float64(step["mean"])) / np.float64(step["std"])


def _crop_to_ink(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    rows, columns = np.nonzero(_plane(value, step) > step["threshold"])
    if not len(rows):
        return value
    return value[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _pad_to_square(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    side = max(_plane(value, step).shape)
    before = [(side - n) // 2 for n in value.shape]
    widths = [(b, side - n - b) for n, b in zip(value.shape, before, strict=True)]
    return np.pad(value, widths, constant_values=step["fill"])


def _resize(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    weights = {"area": area_weights, "bilinear": bilinear_weights}.get(step["method"])
    if weights is None:
        raise UnknownNameError(
            "resize method", str(step["method"]), ("area", "bilinear"), where="preprocessing"
        )
    height, width = _plane(value, step).shape
    return weights(height, step["size"][0]) @ value @ weights(width, step["size"][1]).T


def _pad_end(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    missing = step["size"] - _rows(value, step)
    widths = [(0, missing)] + [(0, 0)] * (value.ndim - 1)
    return np.pad(value, widths, constant_values=step["fill"])


def _mask_of_length(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    return (np.arange(step["size"]) < _rows(value, step)).astype(np.float64)


def _reshape(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    shape = tuple(step["shape"])
    if int(np.prod(shape)) != value.size:
        raise InputError(
            f"preprocessing: reshape has {value.size} values; expected shape {list(shape)}."
        )
    return value.reshape(shape)


_OPERATIONS = {
    "scale": _scale,
    "normalise": _normalise,
    "crop_to_ink": _crop_to_ink,
    "pad_to_square": _pad_to_square,
    "resize": _resize,
    "pad_end": _pad_end,
    "mask_of_length": _mask_of_length,
    "reshape": _reshape,
}


def area_weights(source: int, size: int) -> np.ndarray:
    """Return (size, source): each target's share of every source pixel it overlaps."""
    edges = np.arange(size + 1) * source / size
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(overlap, 0.0) * size / source


def bilinear_weights(source: int, size: int) -> np.ndarray:
    """Return (size, source): pixel centres at half pixels, edges repeated."""
    place = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    low = np.floor(place).astype(np.int64)
    share = place - low
    weights = np.zeros((size, source))
    np.add.at(weights, (np.arange(size), low), 1 - share)
    np.add.at(weights, (np.arange(size), np.minimum(low + 1, source - 1)), share)
    return weights


def golden_samples(source: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Make raw samples that try a source's steps.

    A raw shape of two free dimensions is a drawing: strokes of several
    canvas sizes, and an empty canvas. A free first dimension is a length: 1,
    half, and all that the steps take. A fixed shape is drawn at random.
    Values are whole numbers in ``range`` for integer dtypes, else uniform in
    it, or normal where it is null.
    """
    raw, rng = source["raw"], np.random.default_rng(seed)
    free = [isinstance(d, str) for d in raw["shape"]]
    if free == [True, True]:
        samples = {f"drawing-{h}x{w}": draw_strokes(h, w, rng) for h, w in SIDES}
        samples["empty"] = np.zeros(SIDES[1], np.uint8)
        return {n: _ranged(v, raw) for n, v in samples.items()}
    if any(free):
        if free[0] is not True or any(free[1:]):
            raise InputError(
                f"preprocessing {source['name']}: raw has shape {raw['shape']}; expected a free"
                " first dimension, or two free ones."
            )
        sizes = [s["size"] for steps in source["inputs"].values() for s in steps if "fill" in s]
        most = min((n for n in sizes if isinstance(n, int)), default=8)
        lengths = dict.fromkeys((1, (most + 1) // 2, most))
        return {f"length-{n}": _draw((n, *raw["shape"][1:]), raw, rng) for n in lengths}
    return {f"random-{i}": _draw(tuple(raw["shape"]), raw, rng) for i in range(3)}


def draw_strokes(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a soft random line of a thick pen; (height, width) uint8, ink is 255."""
    pen = 0.05 * max(height, width)
    corners = rng.uniform(0.15, 0.85, (5, 2)) * (height, width)
    path = np.concatenate([np.linspace(a, b, 40) for a, b in pairwise(corners)])
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1) + 0.5
    distance = np.min([np.hypot(*(grid - point).transpose(2, 0, 1)) for point in path], axis=0)
    return np.rint(255 * np.clip(pen - distance + 0.5, 0, 1)).astype(np.uint8)


def _draw(shape: tuple[int, ...], raw: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    dtype, limits = np.dtype(raw["dtype"]), raw["range"]
    if limits is None:
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(int(limits[0]), int(limits[1]) + 1, shape).astype(dtype)
    return rng.uniform(limits[0], limits[1], shape).astype(dtype)


def _ranged(drawing: np.ndarray, raw: Mapping[str, Any]) -> np.ndarray:
    low, high = raw["range"] or (0, 255)
    return (low + drawing.astype(np.float64) * (high - low) / 255).astype(raw["dtype"])


def _plane(value: np.ndarray, step: Mapping[str, Any]) -> np.ndarray:
    if value.ndim != 2:
        raise InputError(
            f"preprocessing: {step['op']} has rank {value.ndim}; expected 2 (height, width)."
        )
    return value


def _rows(value: np.ndarray, step: Mapping[str, Any]) -> int:
    if value.ndim < 1 or len(value) > step["size"]:
        rows = len(value) if value.ndim else 0
        raise InputError(
            f"preprocessing: {step['op']} has {rows} rows; expected at most {step['size']}."
        )
    return len(value)
