"""What the page shows of a causal model: accuracy after every step, drift, time a step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flowexport.report.format import number, percent, size

HEIGHT, TOP, BOTTOM = 190, 10, 24


def streaming(
    targets: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the page's streaming section, or None for a model without steps."""
    if not manifest.get("streaming"):
        return None
    ran = [t for t in targets if t["parity"].get("stream")]
    curve = next((t["parity"]["stream"] for t in ran if t["parity"]["stream"]["dataset"]), None)
    return {
        "state_bytes": manifest["streaming"]["state_bytes"],
        "tensors": len(manifest["streaming"]["state"]),
        "lengths": manifest["streaming"]["lengths"],
        "rows": [_row(t) for t in ran],
        "dataset": curve and curve["dataset"],
        "samples": curve and curve["samples"],
        "plot": _plot(curve) if curve else None,
        "same": curve is not None
        and all(
            t["parity"]["stream"]["correct_after_step"] == curve["reference_after_step"]
            for t in ran
        ),
    }


def _row(target: Mapping[str, Any]) -> dict[str, Any]:
    stream, times = target["parity"]["stream"], target["latency"].get("steps")
    right = stream["correct_after_step"]
    return {
        "name": target["name"],
        "runtime": target["runtime"],
        "drift": [(n, number(e)) for n, e in stream["drift"]],
        "state": size(stream["state_bytes"]),
        "first": percent(right[0] / stream["samples"]) if right else "",
        "last": percent(right[-1] / stream["samples"]) if right else "",
        "step": None if times is None else number(times["step_ms_p50"]),
        "forward": None if times is None else number(times["forward_ms_p50"]),
        "length": None if times is None else times["length"],
        "speedup": None if times is None else f"{times['speedup']:.0f}×",
    }


def _plot(stream: Mapping[str, Any]) -> str:
    """Draw the share of right answers after each step; the scale does not start at 0."""
    shares = stream["accuracy_after_step"]
    low = max(0.0, int(min(shares) * 20) / 20 - 0.05)

    def x(step: int) -> float:
        return round(6 + 92 * (step - 1) / max(len(shares) - 1, 1), 2)

    def y(share: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share) / (1 - low), 1)

    body = []
    for tick in (low, (1 + low) / 2, 1.0):
        body.append(f'<line class="grid" x1="6%" x2="98%" y1="{y(tick)}" y2="{y(tick)}"/>')
        words = f"{100 * tick:g} %"
        body.append(f'<text class="tick" x="5%" y="{y(tick) + 4}" text-anchor="end">{words}</text>')
    points = [(x(i), y(s)) for i, s in enumerate(shares, 1)]
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        body.append(f'<line class="tail" x1="{x1}%" y1="{y1}" x2="{x2}%" y2="{y2}"/>')
    for i, ((cx, cy), share) in enumerate(zip(points, shares, strict=True), 1):
        title = f"<title>{escape(f'after step {i}: {percent(share)}')}</title>"
        body.append(f'<circle class="dot" cx="{cx}%" cy="{cy}" r="4">{title}</circle>')
        if i == 1 or i == len(shares) or (i % 5 == 0 and i < len(shares) - 2):
            body.append(
                f'<text class="tick" x="{cx}%" y="{HEIGHT - 6}" text-anchor="middle">{i}</text>'
            )
    label = (
        f"Accuracy after every step: {percent(shares[0])} after 1,"
        f" {percent(shares[-1])} after {len(shares)}"
    )
    return (
        f'<svg class="plot" width="100%" height="{HEIGHT}" role="img"'
        f' aria-label="{escape(label, quote=True)}">{"".join(body)}</svg>'
    )
