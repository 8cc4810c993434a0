"""``flowexport front``: accuracy, latency and size of several precisions, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowexport.cli import options
from flowexport.cli.console import complain, out_console, print_json, show_progress
from flowexport.core.errors import EXIT_OK, EXIT_VERIFICATION

if TYPE_CHECKING:
    from flowexport.front import Front


def front(
    source: options.Source,
    precision: Annotated[
        list[str],
        typer.Option("--precision", "-p", metavar="P", help="One of them; again for more [all]."),
    ] = [],  # noqa: B006
    target: options.Targets = [],  # noqa: B006
    weights: options.WeightsFile = None,
    calibration: options.Calibration = None,
    max_accuracy_drop: options.MaxAccuracyDrop = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the bundles [out/RECIPE-front].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace older bundles in DIR.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Convert in several precisions, verify each, measure all together, and draw the front.

    Exit code 4 where some artifact leaves its tolerance; the page shows which.
    """
    from flowexport.front import front as run

    with show_progress(verbose) as progress:
        found = run(
            source,
            precisions=precision,
            targets=target,
            weights=weights,
            calibration=calibration,
            max_accuracy_drop=max_accuracy_drop,
            out=out,
            force=force,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json({**found.to_json(), "report": str(found.out / "front.html")})
    else:
        _print(found)
    for point in found.failed:
        complain(f"error: verify {point.name}: {point.reason}")
    return EXIT_VERIFICATION if found.failed else EXIT_OK


def _print(found: Front) -> None:
    from rich.table import Table

    from flowexport.report.format import number, percent, size

    console = out_console()
    table = Table(pad_edge=False)
    table.add_column("target")
    table.add_column("precision", no_wrap=True)
    table.add_column("verdict")
    for column in ("accuracy", "as PyTorch", "SQNR dB", "median ms", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("front")
    for p in found.points:
        table.add_row(
            p.target,
            p.precision,
            p.verdict,
            percent(p.accuracy),
            "–" if p.samples is None else f"{p.agreement}/{p.samples}",
            number(p.sqnr_db),
            number(p.latency_ms),
            size(p.size_bytes),
            "yes" if p.on_front else "",
        )
    console.print(table)
    for p in found.points:
        if p.remark:
            console.print(f"{p.name} is {p.remark}.", markup=False, soft_wrap=True)
    console.print(f"report: {found.out / 'front.html'}", markup=False, soft_wrap=True)
