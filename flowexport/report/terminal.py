"""The terminal's table of verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flowexport.core.reports import LatencyReport, ParityReport
from flowexport.core.types import Verdict
from flowexport.report.format import number, percent, size

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {Verdict.PASS: "bold green", Verdict.FAIL: "bold red", Verdict.NOT_RUN: "yellow"}


def summary_table(
    parity: Mapping[str, ParityReport],
    latency: Mapping[str, LatencyReport] | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    title: str | None = None,
) -> Table:
    """Return a rich table: one row a target, with the reason below where it is not PASS.

    Args:
        sizes: bytes of each target's file.
    """
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    latency, sizes = latency or {}, sizes or {}
    table = Table(title=title and escape(title), title_justify="left", pad_edge=False)
    table.add_column("target", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in ("max abs", "max rel", "accuracy", "p50 ms", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runtime / reason", overflow="fold")
    names = dict.fromkeys([*sizes, *parity, *latency])
    for name in names:
        report, times = parity.get(name), latency.get(name)
        verdict = report.verdict if report else Verdict.NOT_RUN
        note = Text((report.runtime_label if report else None) or "")
        reason = report.reason if report else "not verified"
        if reason:
            note.append(("\n" if note.plain else "") + reason, style=STYLES[verdict])
        if report and report.outside:
            note.append(f"\n{_outside(report)}", style=STYLES[Verdict.NOT_RUN])
        if report and report.fix:
            note.append(f"\nfix: {report.fix}", style="dim")
        table.add_row(
            Text(name),
            Text(verdict.value, style=STYLES[verdict]),
            number(report.max_abs if report else None),
            number(report.max_rel if report else None),
            percent(report.accuracy.accuracy if report and report.accuracy else None),
            number(times.p50 if times else None),
            size(sizes.get(name)),
            note,
        )
    return table


def _outside(report: ParityReport) -> str:
    """Say which cases were run and not judged."""
    worst = max(report.outside, key=lambda c: c.clipped or 0.0)
    return (
        f"outside the calibrated ranges, not judged: {', '.join(c.case for c in report.outside)}"
        f" ({worst.layer} needs {number(worst.stretch)} times its range)"
    )
