"""How raw samples become inputs, as steps that a program can follow.

The words in ``DIGITS_PREPROCESSING`` and ``JAPANESE_VOWELS_PREPROCESSING``
say the same to people. The steps' meaning is in ``flowexport.package/1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def digits_sources(size: int, scale: float) -> list[dict[str, Any]]:
    """Return the ways of an 8x8 image and of a drawing to ``image`` (1, 1, size, size)."""
    enlarge = [
        {"op": "resize", "method": "bilinear", "size": [size, size]},
        {"op": "reshape", "shape": [1, 1, size, size]},
    ]
    return [
        {
            "name": "evaluation",
            "description": "an image of the data set: 8x8 counts of ink, 0 to 16",
            "raw": {"shape": [8, 8], "dtype": "uint8", "range": [0, 16]},
            "hints": {},
            "inputs": {"image": [{"op": "scale", "factor": scale}, *enlarge]},
        },
        {
            "name": "canvas",
            "description": (
                "a drawing, ink is high; brought to 8x8 shares of ink first, as the data set's"
                " makers did with their 32x32 bitmaps"
            ),
            "raw": {"shape": ["height", "width"], "dtype": "uint8", "range": [0, 255]},
            "hints": {"pen_share_of_side": 0.1},
            "inputs": {
                "image": [
                    {"op": "crop_to_ink", "threshold": 64},
                    {"op": "pad_to_square", "fill": 0},
                    {"op": "resize", "method": "area", "size": [8, 8]},
                    {"op": "scale", "factor": 1 / 255},
                    *enlarge,
                ]
            },
        },
    ]


def series_sources(
    steps: int, mean: Sequence[float], std: Sequence[float], *, mask: bool = True
) -> list[dict[str, Any]]:
    """Return the way of one series to ``x`` (1, steps, channels), and its mask (1, steps)."""
    channels = len(mean)
    lengths = [{"op": "mask_of_length", "size": steps}, {"op": "reshape", "shape": [1, steps]}]
    return [
        {
            "name": "evaluation",
            "description": f"one series of up to {steps} steps",
            "raw": {"shape": ["steps", channels], "dtype": "float32", "range": None},
            "hints": {},
            "inputs": {
                "x": [
                    {"op": "normalise", "mean": list(mean), "std": list(std)},
                    {"op": "pad_end", "size": steps, "fill": 0},
                    {"op": "reshape", "shape": [1, steps, channels]},
                ],
                **({"padding_mask": lengths} if mask else {}),
            },
        }
    ]
