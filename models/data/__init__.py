"""Small labelled data sets that ship with the package: neither network nor aeon is needed.

``python -m flowexport_models.data.prepare`` makes the files again from their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from flowexport_models.data.sources import digits_sources, series_sources

from flowexport.core.errors import InputError
from flowexport.core.types import Dataset

FOLDER = Path(__file__).parent

JAPANESE_VOWELS_STEPS = 29
JAPANESE_VOWELS_LABELS = tuple(f"speaker {i}" for i in range(1, 10))
JAPANESE_VOWELS_ATTRIBUTION = (
    "Japanese Vowels, M. Kudo, J. Toyama, M. Shimbo, UCI Machine Learning Repository,"
    " doi.org/10.24432/C5NS47, CC BY 4.0; split of the UEA time series archive."
)
# Of the training set's recorded steps; the authors' UEA loader standardises too.
JAPANESE_VOWELS_MEAN = (
    0.869106, -0.554501, 0.246109, -0.267294, 0.218977, -0.210538,
    -0.174065, -0.051705, -0.204931, -0.181194, -0.023592, 0.086214,
)  # fmt: skip
JAPANESE_VOWELS_STD = (
    0.48762, 0.391182, 0.300903, 0.305912, 0.269099, 0.1683,
    0.161225, 0.18834, 0.187724, 0.116917, 0.097637, 0.127547,
)  # fmt: skip
JAPANESE_VOWELS_PREPROCESSING = MappingProxyType(
    {
        "x": "12 LPC cepstrum coefficients a step: (value - mean) / std, then zero-padded",
        "mean": list(JAPANESE_VOWELS_MEAN),
        "std": list(JAPANESE_VOWELS_STD),
        "padding_mask": "1.0 on recorded steps, 0.0 on padded ones",
        "max_steps": JAPANESE_VOWELS_STEPS,
        "sources": series_sources(JAPANESE_VOWELS_STEPS, JAPANESE_VOWELS_MEAN, JAPANESE_VOWELS_STD),
    }
)

JAPANESE_VOWELS_STREAM_PREPROCESSING = MappingProxyType(
    {
        "x": "12 LPC cepstrum coefficients a frame: (value - mean) / std; zeros behind the last",
        "mean": list(JAPANESE_VOWELS_MEAN),
        "std": list(JAPANESE_VOWELS_STD),
        "max_steps": JAPANESE_VOWELS_STEPS,
        "sources": series_sources(
            JAPANESE_VOWELS_STEPS, JAPANESE_VOWELS_MEAN, JAPANESE_VOWELS_STD, mask=False
        ),
    }
)

DIGITS_SIZE = 32
DIGITS_LABELS = tuple(str(i) for i in range(10))
DIGITS_ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, UCI Machine Learning"
    " Repository, doi.org/10.24432/C50P49, CC BY 4.0; the images of scikit-learn's load_digits."
)
DIGITS_PREPROCESSING = MappingProxyType(
    {
        "layout": "NCHW, one channel, ink is high",
        "scale": 1 / 16,
        "range": [0.0, 1.0],
        "source_size": [8, 8],
        "size": [DIGITS_SIZE, DIGITS_SIZE],
        "resize": "bilinear, half-pixel centres (align_corners=False), edges repeated",
        "mean": [0.0],
        "std": [1.0],
        "sources": digits_sources(DIGITS_SIZE, 1 / 16),
    }
)


def pad_series(steps: np.ndarray, lengths: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Pad concatenated series with zeros.

    Args:
        steps: (sum of lengths, channels), float32, one series after the other.
        lengths: (samples,), steps of each series.
        size: steps to pad to.

    Returns:
        ``x`` (samples, size, channels) and ``padding_mask`` (samples, size), float32.

    Raises:
        InputError: a series is longer than ``size``.
    """
    if lengths.max(initial=0) > size:
        raise InputError(
            f"pad series: a series has {lengths.max()} steps; expected at most {size}."
        )
    mask = np.arange(size)[None, :] < lengths[:, None]
    x = np.zeros((*mask.shape, steps.shape[1]), np.float32)
    x[mask] = steps
    return {"x": x, "padding_mask": mask.astype(np.float32)}


def resize_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge square images bilinearly, pixel centres at half pixels, edges repeated.

    Args:
        images: (..., N, N), float.
        size: side of the result.

    Returns:
        (..., size, size), float32; as ``torch.nn.functional.interpolate(mode="bilinear")``.
    """
    source = images.shape[-1]
    place = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    share = place - low
    weights = np.zeros((size, source))
    np.add.at(weights, (np.arange(size), low), 1 - share)
    np.add.at(weights, (np.arange(size), high), share)
    return (weights @ images.astype(np.float64) @ weights.T).astype(np.float32)


def japanese_vowels(split: str) -> Dataset:
    """Load JapaneseVowels: 270 series to train on, 370 to test.

    Args:
        split: ``train`` or ``test``.

    Returns:
        ``x`` (samples, 29, 12) and ``padding_mask`` (samples, 29), float32.
    """
    raw = _read("japanese-vowels")
    steps, lengths, targets = (raw[f"{split}/{part}"] for part in ("steps", "lengths", "targets"))
    steps = (steps - np.float32(JAPANESE_VOWELS_MEAN)) / np.float32(JAPANESE_VOWELS_STD)
    return Dataset(
        name=f"japanese-vowels-{split}",
        inputs=pad_series(steps, lengths, JAPANESE_VOWELS_STEPS),
        targets=targets.astype(np.int64),
        labels=JAPANESE_VOWELS_LABELS,
        attribution=JAPANESE_VOWELS_ATTRIBUTION,
    )


def japanese_vowels_stream(split: str) -> Dataset:
    """Load JapaneseVowels for causal models: ``x`` alone, the real steps in ``lengths``."""
    whole = japanese_vowels(split)
    return replace(
        whole,
        name=f"japanese-vowels-stream-{split}",
        inputs={"x": whole.inputs["x"]},
        lengths=whole.inputs["padding_mask"].sum(axis=1).astype(np.int64),
    )


def digits(split: str) -> Dataset:
    """Load scikit-learn's digits as 32x32 images: 1437 to train on, 360 held out.

    Args:
        split: ``train`` or ``test``.

    Returns:
        ``image`` (samples, 1, 32, 32), float32 in [0, 1].
    """
    raw = _read("digits")
    chosen = raw[f"{split}/index"]
    small = raw["images"][chosen] * DIGITS_PREPROCESSING["scale"]
    return Dataset(
        name=f"digits-{split}",
        inputs={"image": resize_bilinear(small, DIGITS_SIZE)[:, None]},
        targets=raw["targets"][chosen].astype(np.int64),
        labels=DIGITS_LABELS,
        attribution=DIGITS_ATTRIBUTION,
    )


def _read(name: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(FOLDER / f"{name}.safetensors")


DATASETS: Mapping[str, Callable[[], Dataset]] = MappingProxyType(
    {
        "japanese-vowels-train": partial(japanese_vowels, "train"),
        "japanese-vowels-test": partial(japanese_vowels, "test"),
        "japanese-vowels-stream-train": partial(japanese_vowels_stream, "train"),
        "japanese-vowels-stream-test": partial(japanese_vowels_stream, "test"),
        "digits-train": partial(digits, "train"),
        "digits-test": partial(digits, "test"),
    }
)
"""Name of each shipped data set -> loads it."""
