"""``flowexport inspect``: what a bundle or a model file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowexport.cli import options
from flowexport.cli.console import out_console, print_json

TOP_OPERATORS = 12


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE_OR_FILE", help="A bundle, or one artifact's file.")
    ],
    json: options.Json = False,
) -> int:
    """Show inputs, outputs, operators, fusions and size, read from the finished file."""
    from flowexport.inspection import inspect_path

    document = inspect_path(path)
    if json:
        print_json(document)
        return 0
    console = out_console()
    if "targets" in document:
        console.print(f"bundle  {document['name']}", markup=False)
        console.print(f"recipe  {document['recipe_sha256']}", markup=False)
        for name, entry in document["targets"].items():
            console.print()
            _print_file(console, f"{name} ({entry.get('precision', '?')})", entry)
        for name, entry in document["not_run"].items():
            console.print(f"\n{name}: NOT_RUN: {entry['reason']}", markup=False, soft_wrap=True)
    else:
        _print_file(console, document["target"], document)
    return 0


def _print_file(console: Any, title: str, entry: dict[str, Any]) -> None:
    def line(key: str, value: object) -> None:
        console.print(f"  {key:<10}{value}", markup=False, soft_wrap=True)

    console.print(title, style="bold", markup=False)
    line("path", entry["path"])
    line("size", f"{entry['size_bytes']:,} bytes")
    line("sha256", entry["sha256"])
    if entry.get("error"):
        line("error", entry["error"])
        return
    for kind in ("inputs", "outputs"):
        for spec in entry[kind]:
            shape = "x".join(map(str, spec["shape"]))
            line(kind[:-1], f"{spec['name']} {shape} {spec['dtype']}")
    fusions = ", ".join(f"{k} x{v}" for k, v in entry["fusions"].items())
    line("fusions", fusions or "none")
    counts = sorted(entry["operators"].items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{k} x{v}" for k, v in counts[:TOP_OPERATORS])
    for name, split in (entry.get("delegation") or {}).items():
        outside = ", ".join(split["outside"]) or "nothing"
        line(
            "delegated",
            f"{name}: {split['partitions']} XNNPACK partition"
            f"{'' if split['partitions'] == 1 else 's'} of {split['delegated']} operators,"
            f" outside: {outside}",
        )
    rest = len(counts) - TOP_OPERATORS
    line("operators", shown + (f", and {rest} more kinds" if rest > 0 else ""))
