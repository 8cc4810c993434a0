"""``flowexport bisect``: the first operator at which an artifact goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flowexport.cli import options
from flowexport.cli.console import complete_target, out_console, print_json, show_progress
from flowexport.core.errors import EXIT_OK, EXIT_VERIFICATION

if TYPE_CHECKING:
    from flowexport.parity.bisect import Bisection, Compared

BAR = 20
LEAST, MOST = -8.0, 0.0
"""Powers of ten at which a bar is empty, and full."""


def bisect(
    bundle: options.BundlePath,
    target: Annotated[
        str,
        typer.Option(
            "--target", "-t", metavar="T", help="Of this target.", autocompletion=complete_target
        ),
    ],
    function: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Such as step; else the first that fails."),
    ] = None,
    case: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One of its cases; else the one with the largest error."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE:FACTORY", help="Where the bundle's model came from a file."),
    ] = None,
    weights: options.WeightsFile = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Name the first operator, by its PyTorch module, whose value leaves the tolerance.

    The model is built again and runs in float64; every value that the file
    computes is compared with it. Exit code 0: the outputs are within the
    tolerance; 4: they are not, and this is where it begins.
    """
    from flowexport.bisect import bisect as run

    with show_progress(verbose) as progress:
        found = run(
            bundle,
            target,
            function=function,
            case=case,
            model=model,
            weights=weights,
            threads=threads or 1,
            progress=progress,
        )
    if json:
        print_json({"bundle": str(bundle.resolve()), "target": target, **found.to_json()})
    else:
        _print(target, found)
    return EXIT_OK if found.healthy else EXIT_VERIFICATION


def _print(target: str, found: Bisection) -> None:
    from rich.table import Table

    console = out_console()
    table = Table(title=f"{_where(target, found)}: largest error by module", pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("operator", no_wrap=True)
    table.add_column("in the file", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column(f"1e{LEAST:.0f} .. 1", no_wrap=True)
    for step in _by_module(found):
        mark = " <" if found.first is not None and step.name == found.first.name else ""
        error = "not held" if step.found is None else "not finite"
        table.add_row(
            step.module or "(top)",
            step.operator + mark,
            step.op_type or "–",
            error if step.error is None else f"{step.error:.1e}",
            _bar(step.error),
        )
    console.print(table)
    console.print(verdict(target, found), markup=False, soft_wrap=True)


def _where(target: str, found: Bisection) -> str:
    return f"{target} {found.function}, {found.case}"


def verdict(target: str, found: Bisection) -> str:
    """Say in words what a bisection found."""
    limit = f"{found.tolerance:.2g}"
    if found.healthy:
        return (
            f"{target} is within the tolerance: on {found.function}, {found.case} the outputs'"
            f" largest error is {found.output_error:.1e} (at most {limit})."
        )
    if found.first is None:
        return (
            f"{target} leaves the tolerance on {found.function}, {found.case}"
            f" ({found.output_error:.1e}, at most {limit}), and every value in the file is right:"
            " look at the outputs' names."
        )
    first = found.first
    text = (
        f"{target} {found.function} first leaves the tolerance in module"
        f" {first.module or '(top)'}: {first.operator} ({first.op_type} {first.found} in the file)"
        f" has error {_said(first)}; at most {limit}."
    )
    if found.fused:
        text += f" Not held in the file before it: {', '.join(found.fused)}."
    jump = found.jump
    if jump is not None and jump.name != first.name:
        text += f" The error grows most at {jump.module or '(top)'}: {jump.operator}."
    return text


def _said(step: Compared) -> str:
    return "that is not finite" if step.error is None else f"{step.error:.1e}"


def _by_module(found: Bisection) -> list[Compared]:
    """Return each module's worst step; the first wrong one always."""
    worst: dict[str, Compared] = {}
    for step in found.steps:
        if step.found is None or (step.right and not step.within):
            continue  # the file does not hold it
        old = worst.get(step.module)
        if old is None or _size(step) > _size(old):
            worst[step.module] = step
    if found.first is not None:
        worst[found.first.module] = found.first
    return list(worst.values())


def _size(step: Compared) -> float:
    return float("inf") if step.error is None else step.error


def _bar(error: float | None) -> str:
    from math import log10

    if error is None:
        return "#" * BAR
    share = (log10(max(error, 1e-300)) - LEAST) / (MOST - LEAST)
    return "#" * round(BAR * min(max(share, 0.0), 1.0))
