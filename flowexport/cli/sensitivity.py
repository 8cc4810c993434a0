"""``flowexport sensitivity``: which layers a quantised precision hurts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from flowexport.cli import options
from flowexport.cli.console import out_console, print_json, show_progress
from flowexport.core.errors import EXIT_OK

if TYPE_CHECKING:
    from flowexport.sensitivity import Sensitivity


def sensitivity(
    source: options.Source,
    precision: Annotated[
        str, typer.Option("--precision", "-p", metavar="P", help="int8-static, -dynamic, -weights.")
    ] = "int8-static",
    weights: options.WeightsFile = None,
    calibration: options.Calibration = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Quantise each layer alone, rank layers by what the output loses, propose what to keep."""
    from flowexport.sensitivity import sensitivity as run

    with show_progress(verbose) as progress:
        found = run(
            source,
            precision=precision,
            weights=weights,
            calibration=calibration,
            progress=progress,
        )
    print_json(found.to_json()) if json else _print(found)
    return EXIT_OK


def _print(found: Sensitivity) -> None:
    from rich.table import Table

    console = out_console()
    console.print(
        f"{found.model} {found.precision} on ONNX Runtime, {found.samples}:"
        f" {_db(found.whole_db)} with every layer quantised",
        markup=False,
        soft_wrap=True,
    )
    table = Table(pad_edge=False)
    table.add_column("layer, quantised alone", overflow="fold")
    table.add_column("as")
    for column in ("SQNR", "of the noise", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            layer.path,
            layer.treatment,
            _db(layer.sqnr_db),
            f"{layer.share:.1%}",
            f"{layer.parameters:,}",
        )
    console.print(table)
    if found.keep_float and found.kept_db is not None:
        text = ", ".join(found.keep_float)
        console.print(
            f"Kept in float these give {_db(found.kept_db)}; in the recipe:\nkeep_float: [{text}]",
            markup=False,
            soft_wrap=True,
        )
    else:
        console.print("No few layers stand out: keeping any in float would not pay.")


def _db(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f} dB"
