"""8-bit pixels and the values that a model takes for them, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.types import Dataset, TensorSpec

COLORS = {1: "grayscale", 3: "RGB"}
WHOLE = 1e-3
"""Float32 values of whole pixels come back this near: 255 · 6e-8, and the division by std."""


@dataclass(frozen=True)
class Pixels:
    """``value = (low + pixel / 255 · (high - low) - mean) / std``, a channel.

    Attributes:
        low, high: what the pixels 0 and 255 stand for before mean and std.
        mean, std: one a channel.
    """

    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any], spec: TensorSpec, where: str) -> Pixels:
        """Read ``range``, ``mean`` and ``std`` of a model's preprocessing.

        Raises:
            InputError: the input is no image (batch, 1 or 3, height, width) of float32,
                or the preprocessing lacks a key or does not fit its channels.
        """
        shape = "x".join(map(str, spec.shape))
        fixed = all(isinstance(d, int) for d in spec.shape[1:])
        image = len(spec.shape) == 4 and spec.shape[1] in COLORS and fixed
        if not image or spec.dtype != "float32":
            raise InputError(
                f"{where}: {spec.name} is {spec.dtype} {shape}; expected an image: float32"
                " batch x 1 or 3 channels x height x width."
            )
        missing = [k for k in ("range", "mean", "std") if k not in preprocessing]
        if missing:
            raise InputError(
                f"{where}: the preprocessing of {spec.name} has no {', '.join(missing)};"
                " expected range, mean and std.",
                fix="preprocessing: {range: [0.0, 1.0], mean: [0.5], std: [0.5]} in the recipe",
            )
        channels = int(spec.shape[1])
        low, high = (float(v) for v in preprocessing["range"])
        mean, std = (tuple(map(float, preprocessing[k])) for k in ("mean", "std"))
        if not len(mean) == len(std) == channels or min(std) <= 0 or high <= low:
            raise InputError(
                f"{where}: the preprocessing of {spec.name} has range {[low, high]}, mean"
                f" {list(mean)} and std {list(std)}; expected {channels} means and as many"
                " deviations above 0, and a range that increases."
            )
        return cls(low, high, mean, std)

    @property
    def color(self) -> str:
        return COLORS[len(self.mean)]

    @property
    def step(self) -> float:
        """What one more pixel adds before the division by std."""
        return (self.high - self.low) / 255

    def values(self, pixels: np.ndarray) -> np.ndarray:
        """Return a model's values, float32, of pixels (..., channels, height, width)."""
        wide = pixels.astype(np.float64) * self.step + self.low
        scaled = (wide - self._column(self.mean)) / self._column(self.std)
        return np.asarray(scaled, np.float32)

    def unrounded(self, values: np.ndarray) -> np.ndarray:
        """Return float64 pixels of values (..., channels, height, width); not rounded."""
        wide = values.astype(np.float64) * self._column(self.std) + self._column(self.mean)
        return np.asarray((wide - self.low) / self.step)

    def whole(self, values: np.ndarray, where: str) -> np.ndarray:
        """Return uint8 pixels of values that are some.

        Raises:
            InputError: a value is no whole pixel from 0 to 255.
        """
        pixels = self.unrounded(values)
        nearest = np.clip(np.round(pixels), 0, 255)
        worst = float(np.abs(pixels - nearest).max(initial=0.0))
        if not worst <= WHOLE:
            raise InputError(
                f"{where}: a value is {worst:.3g} pixels from the nearest 8-bit one; expected"
                " whole pixels from 0 to 255.",
                fix="convert again: a bundle with an image input has cases of whole pixels",
            )
        return nearest.astype(np.uint8)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """Return the values of the nearest 8-bit pixels."""
        return self.values(np.clip(np.round(self.unrounded(values)), 0, 255))

    def to_json(self) -> dict[str, Any]:
        return {"range": [self.low, self.high], "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def _column(numbers: tuple[float, ...]) -> np.ndarray:
        return np.asarray(numbers, np.float64)[:, None, None]


def round_feeds(
    feeds: Mapping[str, np.ndarray], pixels: Mapping[str, Pixels]
) -> dict[str, np.ndarray]:
    """Return feeds whose images are what an app can give: the nearest 8-bit pixels."""
    return {n: pixels[n].nearest(v) if n in pixels else v for n, v in feeds.items()}


def round_dataset(dataset: Dataset, pixels: Mapping[str, Pixels]) -> Dataset:
    """Return the set with its images rounded to 8-bit pixels, and say so in its attribution."""
    told = f"{dataset.attribution} Rounded to 8-bit pixels here."
    return replace(dataset, inputs=round_feeds(dataset.inputs, pixels), attribution=told)
