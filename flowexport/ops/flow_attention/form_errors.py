"""Worst error of every form and published variant.

``python -m flowexport.ops.flow_attention.form_errors`` prints the table.

Each form runs in float64, float32 and IEEE half (torch's own kernels) over a matrix of
shapes and value ranges, and is compared with the reference in float64 on the same
(rounded) inputs. A row tells the largest error over the largest output; in half also the
share of outputs that are 0 and should not be. Ranges that half cannot hold (``cold``,
``huge``: features below its smallest number) are left out there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from flowexport.ops.flow_attention import VARIANTS, flow_attention_reference, op_arguments
from flowexport.ops.flow_attention.lowered import FORMS, applicable, attention_of
from flowexport.ops.flow_attention.variant import FlowVariant

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "half": torch.float16}
# B, L, S, H, D, M
SHAPES = (
    (1, 1, 1, 1, 1, 1),
    (3, 5, 17, 2, 3, 8),
    (2, 64, 63, 1, 8, 8),
    (1, 65, 67, 4, 8, 5),
    (1, 131, 192, 3, 16, 9),
    (0, 7, 7, 2, 4, 4),
    (1, 1024, 1024, 2, 64, 64),
)
RANGES = {
    "normal": (1.0, 0.0),
    "zeros": (0.0, 0.0),
    "saturated": (1.0, 30.0),
    "mixed": (4.0, 0.0),
    "cold": (1.0, -12.0),
    "huge": (300.0, 0.0),
}
NOT_IN_HALF = ("cold", "huge")


@dataclass(frozen=True)
class Row:
    """Worst results of one form of one variant in one dtype.

    Attributes:
        error: largest error over the largest output; inf where something is not finite.
        lost: largest share of zeros that should not be.
        where: shape (B, L, S, H, D, M) and range of the largest error.
    """

    variant: str
    form: str
    dtype: str
    error: float
    lost: float
    where: str


def cases(
    variant: FlowVariant, dtype: torch.dtype, half: bool
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Yield a name and q, k, v for every shape and range that fits the variant."""
    tied = variant.causal or variant.flow_axis == "heads"
    for number, (b, sinks, sources, heads, width, value_width) in enumerate(SHAPES):
        count = sources if tied else sinks
        for name, (scale, shift) in RANGES.items():
            if half and name in NOT_IN_HALF:
                continue
            g = torch.Generator().manual_seed(number)
            q, k, v = (
                torch.randn(b, n, heads, w, generator=g, dtype=torch.float64)
                for n, w in ((count, width), (sources, width), (sources, value_width))
            )
            tensors = (q * scale + shift, k * scale + shift, v + 0.25)
            label = f"{(b, count, sources, heads, width, value_width)} {name}"
            yield label, tuple(x.to(dtype) for x in tensors)  # type: ignore[misc]


def worst(variant_name: str, form: str, dtype_name: str) -> Row:
    """Return the worst result of a form over all cases."""
    variant, dtype = VARIANTS[variant_name], DTYPES[dtype_name]
    error, lost, where = 0.0, 0.0, ""
    for label, (q, k, v) in cases(variant, dtype, dtype is torch.float16):
        truth = flow_attention_reference(q.double(), k.double(), v.double(), variant)
        if not truth.numel():
            continue
        result = attention_of(form)(q, k, v, *op_arguments(variant)).double()
        scale = truth.abs().max().item()
        found = (result - truth).abs().max().item() / scale
        found = found if result.isfinite().all() else float("inf")
        zeros = ((result == 0) & (truth.abs() > 1e-3 * scale)).double().mean().item()
        if found > error:
            error, where = found, label
        lost = max(lost, zeros)
    return Row(variant_name, form, dtype_name, error, lost, where)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON rows; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m flowexport.ops.flow_attention.form_errors", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    parser.add_argument("--form", action="append", choices=list(FORMS), help="only this form")
    asked = parser.parse_args(arguments)
    rows = [
        worst(name, form, dtype)
        for name, variant in VARIANTS.items()
        for form in applicable(variant)
        if not asked.form or form in asked.form
        for dtype in DTYPES
    ]
    if asked.json:
        told = [{**asdict(r), "error": None if r.error == float("inf") else r.error} for r in rows]
        print(json.dumps(told, indent=2))
        return 0
    print(f"{'variant':11} {'form':23} {'fp64':>8} {'fp32':>8} {'half':>8} {'lost':>6}")
    for i in range(0, len(rows), len(DTYPES)):
        group = rows[i : i + len(DTYPES)]
        errors = " ".join(f"{r.error:8.1e}" for r in group)
        print(f"{group[0].variant:11} {group[0].form:23} {errors} {group[-1].lost:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
