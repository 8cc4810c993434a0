"""What the page shows of a model of several lengths: predictions at each, and at the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def lengths(
    targets: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the page's section, or None for a model of one length."""
    entry = manifest.get("buckets")
    if not entry or len(entry["lengths"]) < 2:
        return None
    rows = [
        {"name": target["name"], **bucket, "ms": _median(target, bucket["function"])}
        for target in targets
        for bucket in target["parity"].get("buckets") or ()
    ]
    return {**entry, "rows": rows}


def _median(target: Mapping[str, Any], function: str) -> float | None:
    samples = target["latency"].get("lengths", {}).get(function)
    return median(samples) if samples else None
