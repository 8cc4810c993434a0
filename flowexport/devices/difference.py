"""What became slower, worse or larger since an earlier merge, beyond noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowexport.bench import ratio_of_unpaired_medians
from flowexport.core.errors import BundleError
from flowexport.devices.reading import MERGE_SCHEMA, read_json, require_schema
from flowexport.devices.rows import KEY, Row
from flowexport.devices.timing import Timing
from flowexport.report.schema import validate

TIMES = 0.05
"""Sessions of one device differ by some percent in heat and load, which no interval knows."""
ERRORS = 2.0
"""Times that the largest error may grow: other kernels round in another order."""
SIZES = 0.01

NOTE = (
    f"Slower or faster: the 95 % bootstrap interval of the ratio of medians lies beyond"
    f" ±{100 * TIMES:.0f} %. Accuracy: any change of the number of right answers. Agreement: the"
    f" largest error more than {ERRORS:g}-fold, or another verdict. Size: beyond"
    f" {100 * SIZES:.0f} %."
)


def read_merge(path: Path) -> dict[str, Any]:
    """Read an earlier ``merge.json`` (or the folder that holds it).

    Raises:
        BundleError: it is none.
    """
    file = path / "merge.json" if path.is_dir() else path
    document = read_json(file, "merge")
    require_schema(document, MERGE_SCHEMA, f"merge {file}")
    try:
        validate(document, "merge")
    except BundleError as error:
        raise BundleError(f"merge {file}: {error.message}", fix=error.fix) from error
    return document


def compare_merges(rows: Sequence[Row], earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry for each row and metric that both have, and for rows that one has alone.

    Statistics are computed anew from the raw samples of both sides.
    """
    before = {_identity(r["key"]): r for r in earlier["rows"]}
    after = {_identity(r.key): r for r in rows}
    entries = []
    for identity, row in after.items():
        old = before.get(identity)
        if old is None:
            entries.append(
                _entry(row.key, row.label, "row", None, None, "new", "not in the earlier one")
            )
            continue
        entries += _row_entries(row, old)
    for identity, old in before.items():
        if identity not in after:
            note = "not measured this time"
            entries.append(_entry(old["key"], old["label"], "row", None, None, "gone", note))
    return entries


def _row_entries(row: Row, old: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = [
        _verdict(row, old),
        _latency(row, old),
        _accuracy(row, old),
        _agreement(row, old),
        _size(row, old),
    ]
    return [e for e in entries if e is not None]


def _verdict(row: Row, old: Mapping[str, Any]) -> dict[str, Any] | None:
    before, after = old["verdict"], row.verdict.value
    if before == after:
        return None
    order = ("FAIL", "NOT_RUN", "PASS")
    change = "worse" if order.index(after) < order.index(before) else "better"
    note = f"{before} before, {after} now"
    return _entry(row.key, row.label, "verdict", None, None, change, note)


def _latency(row: Row, old: Mapping[str, Any]) -> dict[str, Any] | None:
    now, then = row.latency, Timing.from_json(old["latency"])
    if not now.usable and not then.usable:
        return None
    if not now.usable or not then.usable:
        side, timing = ("now", now) if not now.usable else ("before", then)
        note = f"unusable {side}: {timing.reason}"
        return _entry(row.key, row.label, "latency", None, None, "unknown", note)
    ratio = ratio_of_unpaired_medians(now.usable, then.usable)
    change = "same"
    if ratio.ci_low > 1 + TIMES:
        change = "worse"
    elif ratio.ci_high < 1 / (1 + TIMES):
        change = "better"
    entry = _entry(
        row.key,
        row.label,
        "latency",
        then.statistics()["latency_ms_p50"],
        now.statistics()["latency_ms_p50"],
        change,
        "median ms",
    )
    return {**entry, "ratio": ratio.median, "ci_low": ratio.ci_low, "ci_high": ratio.ci_high}


def _accuracy(row: Row, old: Mapping[str, Any]) -> dict[str, Any] | None:
    then, now = old["accuracy"], row.accuracy.result
    if now is None or then["correct"] is None:
        return None
    if (then["dataset"], then["samples"]) != (now.dataset, now.samples):
        note = f"{then['samples']} samples of {then['dataset']} before"
        return _entry(row.key, row.label, "accuracy", None, None, "unknown", note)
    change = "same"
    if now.correct != then["correct"]:
        change = "worse" if now.correct < then["correct"] else "better"
    note = f"right of {now.samples}"
    return _entry(row.key, row.label, "accuracy", then["correct"], now.correct, change, note)


def _agreement(row: Row, old: Mapping[str, Any]) -> dict[str, Any] | None:
    then, now = old["agreement"]["max_rel"], row.agreement.worst("max_rel")
    if now is None or then is None:
        return None
    change = "same"
    if now > ERRORS * then:
        change = "worse"
    elif then > ERRORS * now:
        change = "better"
    return _entry(row.key, row.label, "agreement", then, now, change, "largest error, relative")


def _size(row: Row, old: Mapping[str, Any]) -> dict[str, Any] | None:
    then, now = old["size_bytes"], row.size_bytes
    if now is None or not then:
        return None
    change = "same"
    if abs(now / then - 1) > SIZES:
        change = "worse" if now > then else "better"
    return _entry(row.key, row.label, "size", then, now, change, "bytes")


def _entry(
    key: Mapping[str, Any],
    label: str,
    metric: str,
    before: float | None,
    after: float | None,
    change: str,
    note: str,
) -> dict[str, Any]:
    return {
        "key": dict(key),
        "label": label,
        "metric": metric,
        "before": before,
        "after": after,
        "ratio": after / before if before and after is not None else None,
        "ci_low": None,
        "ci_high": None,
        "change": change,
        "note": note,
    }


def _identity(key: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(key[k] for k in (*KEY, "repetition"))
