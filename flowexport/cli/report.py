"""``flowexport report``: the report of a bundle, and the comparison of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flowexport.cli import options
from flowexport.cli.console import complain, out_console, print_json
from flowexport.core.errors import EXIT_OK, EXIT_VERIFICATION

DEFAULT = "bundle"


class _Fallback(TyperGroup):
    """Reads ``report BUNDLE`` as ``report bundle BUNDLE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = [DEFAULT, *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_Fallback,
    rich_markup_mode="markdown",
    help="Write a bundle's report anew, or compare devices.",
)


@app.command(
    DEFAULT, help="Write report.html anew from report.json (the word bundle may be left out)."
)
def report(bundle: options.BundlePath, json: options.Json = False) -> int:
    """Write report.html anew from report.json, and print where it is."""
    from flowexport import pipeline

    path = pipeline.report(bundle)
    if json:
        print_json({"report": str(path), "data": str(path.with_suffix(".json"))})
    else:
        print(path)
    return EXIT_OK


@app.command("merge")
def merge(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...", help="Reports of the demos; also bundles, as desktop runs."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The comparison's folder.")],
    package: Annotated[
        list[Path],
        typer.Option("--package", metavar="DIR", help="The package that the devices ran."),
    ] = [],  # noqa: B006
    bundle: Annotated[
        list[Path],
        typer.Option("--bundle", metavar="DIR", help="A bundle to hold the reports against."),
    ] = [],  # noqa: B006
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="An earlier merge.json: what is worse now?"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older comparison.")] = False,
    json: options.Json = False,
) -> int:
    """Compare desktop, browser and phones; every number is computed from the raw data."""
    from flowexport.devices import merge_reports

    result = merge_reports(
        reports, out, packages=package, bundles=bundle, against=against, force=force
    )
    rows = result.document["rows"]
    if json:
        print_json(
            {
                "comparison": str(result.path),
                "verdict": result.verdict.value,
                "rows": [
                    {k: r[k] for k in ("key", "label", "verdict", "problems", "gaps")}
                    | {
                        "max_abs": r["agreement"]["max_abs"],
                        "max_rel": r["agreement"]["max_rel"],
                        "accuracy": r["accuracy"]["accuracy"],
                        "latency_ms_p50": r["latency"]["statistics"]["latency_ms_p50"],
                    }
                    for r in rows
                ],
                "worse": list(result.worse),
            }
        )
    else:
        _print(rows, result.verdict.value)
        print(f"comparison: {result.path / 'comparison.html'}")
    for row in result.rows:
        for problem in row.problems:
            complain(f"error: {row.label} {row.key['model']} {row.key['format']}: {problem}")
    for entry in result.worse:
        what = f"{entry['key']['model']} {entry['key']['format']}, {entry['label']}"
        complain(f"worse: {what}: {entry['metric']} {entry['note']}")
    return EXIT_VERIFICATION if result.verdict == "FAIL" else EXIT_OK


def _print(rows: list[dict[str, Any]], verdict: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from flowexport.report.format import number, percent

    table = Table(title=f"devices: {verdict}", title_justify="left", pad_edge=False)
    for column in ("model", "device and backend", "format", "verdict"):
        table.add_column(column, overflow="fold")
    for column in ("max abs", "max rel", "accuracy", "p50 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row["key"]["model"]),  # a report's own words are no markup
            Text(row["label"]),
            row["key"]["format"],
            row["verdict"],
            number(row["agreement"]["max_abs"]),
            number(row["agreement"]["max_rel"]),
            percent(row["accuracy"]["accuracy"]),
            number(row["latency"]["statistics"]["latency_ms_p50"]),
        )
    out_console().print(table)
