"""Which form each target runs best: one table, measured, in ``table.json``.

``python -m flowexport.measure_forms --write`` measures the rows again on the
machine at hand. A row is one layer: its sizes and each form's speed as the
ratio to the published form (above 1 is faster). A site takes the fastest form
of the nearest row, nearness being in log2 of N and of C = H·D; a form that
needs far less memory is taken where it is nearly as fast.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowexport.ops.descriptor import AttentionSite, Choice
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.segments import may_loop

TABLE = Path(__file__).with_name("table.json")

WITH_LAYERS = ("_projected", "_absorbed")
"""Forms of these suffixes change the linear layers around too; alone they equal another."""

# Targets whose float16 artifacts compute in float32 (TFLite stores weights in half).
_WIDE_ARITHMETIC = ("tflite",)

# Its intermediates do not grow with the length: taken where it is nearly as fast as the fastest.
SEGMENTED, AS_FAST = "causal_scan", 0.95


@functools.cache
def rows() -> tuple[Mapping[str, Any], ...]:
    """Return the measured rows: target, causal, tokens, channels, forms, machine."""
    return tuple(json.loads(TABLE.read_text())["rows"])


def choose(target: str, precision: str, site: AttentionSite) -> Choice:
    """Return the form that a target runs best for a site, and why.

    Args:
        target: ``onnx``, ``tflite``, ``coreml`` or ``tensorrt``; others are
            treated like an unmeasured one.
        precision: ``fp32``, ``fp16`` or a quantised one, whose attention is float32.
        site: shapes (B, N, H, D) and variant.
    """
    variant = variant_of(site.arguments)
    tokens, heads, width = site.k_shape[1:]
    static = isinstance(tokens, int) and isinstance(site.q_shape[1], int)
    if precision == "fp16" and target not in _WIDE_ARITHMETIC:
        form = "causal_means" if variant.causal else "means"
        return Choice(form, "half arithmetic: sums over the tokens leave its range")
    if variant.causal and not static:
        return Choice("causal_triangular", "the fastest causal form of a dynamic length")
    row = None
    if static and isinstance(heads, int) and isinstance(width, int):
        row = nearest(target, variant.causal, int(tokens), heads * width)
    if row is not None:
        measured = row["forms"].items()
        if precision != "fp32":
            # Their weights are factors of products, which no quantiser stores in less.
            measured = [(f, r) for f, r in measured if not f.endswith(WITH_LAYERS)]
        if not (isinstance(site.k_shape[0], int) and may_loop()):
            measured = [(f, r) for f, r in measured if f != SEGMENTED]  # no loop, many copies
        form, ratio = max(measured, key=lambda item: item[1], default=("published", 1.0))
        if ratio <= 1:
            form, ratio = "published", 1.0
        reason = (
            f"x the published form at N = {row['tokens']}, C = {row['channels']}"
            f" on {target}, one thread"
        )
        segmented = dict(measured).get(SEGMENTED, 0.0)
        if form != SEGMENTED and segmented >= max(AS_FAST * ratio, 1.0):
            told = f"; {form} is {ratio:.2f}x, this one needs a segment's memory"
            return Choice(SEGMENTED, f"{segmented:.2f}{reason}{told}")
        return Choice(form, f"{ratio:.2f}{reason}")
    if variant.causal:
        # Triangles cost L² and chunks 64 L; at a few chunks the triangles' fewer operators win.
        form = "causal_triangular" if int(tokens) <= 128 else "causal_chunked"
        return Choice(form, f"{target} is not measured; by arithmetic at L = {tokens}")
    if target in ("coreml", "tensorrt"):
        return Choice("means", f"{target} is not measured; safe should it compute in half")
    return Choice("channel_first", f"no row of {target} for this size; fewest operations")


def nearest(target: str, causal: bool, tokens: int, channels: int) -> Mapping[str, Any] | None:
    """Return the measured row nearest to a layer, or None where the target has none."""
    found = [r for r in rows() if r["target"] == target and r["causal"] == causal]
    return min(found, default=None, key=lambda r: _distance(r, tokens, channels))


def _distance(row: Mapping[str, Any], tokens: int, channels: int) -> float:
    return math.hypot(
        math.log2(max(tokens, 1) / row["tokens"]), math.log2(max(channels, 1) / row["channels"])
    )


def write_rows(target: str, stages: Sequence[Mapping[str, Any]]) -> None:
    """Replace a target's rows of the same sizes by measured ones, in :data:`TABLE`.

    Args:
        stages: results of :func:`flowexport.measure_forms.measure_stage`.
    """
    new = [
        {
            "target": target,
            "causal": bool(stage["variant"] == "causal"),
            "tokens": stage["tokens"],
            "channels": stage["heads"] * stage["width"],
            # The lower end of the interval: a form is chosen for what is sure.
            "forms": {
                name: round(row["ratio"]["ci_low"], 2)
                for name, row in stage["forms"].items()
                if name != "published"
            },
        }
        for stage in stages
    ]
    sizes = ("target", "causal", "tokens", "channels")
    keys = {tuple(r[s] for s in sizes) for r in new}
    kept = [dict(r) for r in rows() if tuple(r[s] for s in sizes) not in keys]
    ordered = sorted(kept + new, key=lambda r: tuple(r[s] for s in sizes))
    lines = ",\n".join("  " + json.dumps(r) for r in ordered)
    TABLE.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    rows.cache_clear()
