"""``flowexport package``: what a demo client ships, from bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flowexport.cli import options
from flowexport.cli.console import complain, out_console, print_json


def package(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", help="Folders made by `flowexport convert`."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The package's folder.")],
    client: Annotated[
        str, typer.Option("--client", metavar="web|android|ios", help="Who shall run it.")
    ] = "web",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, metavar="N", help="Of each evaluation set [all, up to 2 MiB]."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older package.")] = False,
    json: options.Json = False,
) -> int:
    """Put models, golden vectors and evaluation sets together for the web, Android or iOS demo."""
    from flowexport.package import make_package

    result = make_package(bundles, out, client=client, samples=samples, force=force)
    models = result.manifest["models"]
    if json:
        print_json(
            {
                "package": str(result.path),
                "manifest": str(result.path / "manifest.json"),
                "client": client,
                "size_bytes": sum(f["size_bytes"] for f in result.manifest["files"].values()),
                "models": {
                    m["id"]: {
                        "files": {t: f["sha256"] for t, f in m["files"].items()},
                        "golden_cases": len(m["golden"]["cases"]),
                        "samples": m["evaluation"] and m["evaluation"]["samples"],
                        "left_out": list(result.left_out.get(m["id"], ())),
                    }
                    for m in models
                },
            }
        )
        return 0
    _print(models, result.left_out)
    out_console().print(f"package: {result.path}", markup=False, soft_wrap=True)
    for model in models:
        for target, file in model["files"].items():
            if file["verification"]["verdict"] != "PASS":
                complain(f"note: {model['id']} {target} was not verified; its clients say so.")
    return 0


def _print(models: list[dict[str, Any]], left_out: Mapping[str, tuple[str, ...]]) -> None:
    from rich.table import Table

    from flowexport.report.format import size

    table = Table(pad_edge=False)
    for column in ("model", "file", "size", "verified", "golden", "samples", "left out"):
        table.add_column(column, overflow="fold")
    for model in models:
        samples = model["evaluation"]
        for target, file in model["files"].items():
            table.add_row(
                model["id"],
                target,
                size(file["size_bytes"]),
                file["verification"]["verdict"],
                str(len(model["golden"]["cases"])),
                f"{samples['samples']} of {samples['of_samples']}" if samples else "-",
                ", ".join(left_out.get(model["id"], ())) or "-",
            )
    out_console().print(table)
