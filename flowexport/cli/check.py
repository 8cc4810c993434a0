"""``flowexport check``: does every attention survive a precision, before any conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowexport.cli import options
from flowexport.cli.console import out_console, print_json, show_progress
from flowexport.core.errors import EXIT_CONVERSION, EXIT_OK, UnknownNameError

if TYPE_CHECKING:
    from flowexport.ops.flow_attention.ranges import SiteVerdict
    from flowexport.rangecheck import TargetCheck


def check(
    source: options.Source,
    target: options.Targets = [],  # noqa: B006
    precision: Annotated[
        str, typer.Option(metavar="fp16|bf16|fp32", help="What the target would compute in.")
    ] = "fp16",
    weights: options.WeightsFile = None,
    inputs: options.Inputs = [],  # noqa: B006
    arithmetic: Annotated[
        list[str],
        typer.Option(
            metavar="fp16|fp16_ftz|fp16_acc16",
            help="Must be safe in this one too: subnormals flushed, sums in half.",
        ),
    ] = [],  # noqa: B006
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Calibrate on these, one array an input, samples first."
        ),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Say for each attention whether a precision overflows, goes subnormal or loses the result.

    The model runs in float32 on samples of its data set (random ones where it
    has none) and each attention's published and chosen forms are repeated in
    the target's arithmetic; fp16_acc16, where sums too are half, is told for
    devices that accumulate in half. Exit code 0: the form that is taken is safe on
    every target; 3: on some target none is, and the conversion would fail.
    """
    from flowexport.calibration import read_arrays
    from flowexport.logits import calibrate_subject
    from flowexport.pinned import check_pinned
    from flowexport.plan import override
    from flowexport.rangecheck import PRECISIONS, check_document, check_target
    from flowexport.registry import TARGETS
    from flowexport.resolve import find_recipe, resolve

    with show_progress(verbose) as progress:
        for name in target:
            if name not in TARGETS.names():
                raise UnknownNameError("target", name, TARGETS.names())
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        given = None
        if samples is not None:
            fix = "numpy.savez(FILE, **{input: array})"
            given = read_arrays(samples, f"check: the samples {samples}", fix)
        progress.stage("resolve")
        specs = [options.parse_input(text) for text in inputs]
        recipe = override(find_recipe(source), weights=weights, inputs=specs)
        subject = resolve(recipe)
        asked = {name: recipe.options(name) for name in target or recipe.targets or TARGETS.names()}
        check_pinned(subject, asked)
        progress.stage("calibrate")
        calls, told = calibrate_subject(subject, given)
        found = {}
        for name, wanted in asked.items():
            progress.stage(f"check {name} {precision}")
            pinned = wanted.extra.get("form")
            found[name] = check_target(
                name, precision, calls, pinned=pinned, require=arithmetic, samples=told
            )
    safe = all(entry.safe for entry in found.values())
    if json:
        print_json(check_document(subject.spec.name, found))
    else:
        _print(subject.spec.name, told, found)
    return EXIT_OK if safe else EXIT_CONVERSION


def _print(model: str, told: str, found: Mapping[str, TargetCheck]) -> None:
    from rich.table import Table

    console = out_console()
    console.print(f"{model}: calibrated on {told}", markup=False, soft_wrap=True)
    for name, entry in found.items():
        verdict = "safe" if entry.safe else "NOT SAFE"
        console.print()
        console.print(f"{name} {entry.precision}: {verdict}", style="bold", markup=False)
        if entry.layers:
            table = Table(pad_edge=False)
            table.add_column("attention", overflow="fold")
            for column in ("N", "H x D", "|q|", "|k|"):
                table.add_column(column, justify="right", no_wrap=True)
            table.add_column("arithmetic", no_wrap=True)
            table.add_column("published", overflow="fold")
            table.add_column("form taken", overflow="fold")
            for layer in entry.layers:
                widest = [max(abs(layer.ranges[x].low), abs(layer.ranges[x].high)) for x in "qk"]
                site, taken = layer.site, entry.taken or layer.form
                for i, arithmetic in enumerate(layer.chosen):
                    size = [str(site.k_shape[1]), f"{site.k_shape[2]} x {site.k_shape[3]}"]
                    facts = [layer.name, *size, *(f"{w:.3g}" for w in widest)]
                    mark = "" if arithmetic in entry.decisive else " (not decisive)"
                    table.add_row(
                        *(facts if i == 0 else [""] * len(facts)),
                        arithmetic + mark,
                        _cell(layer.published[arithmetic]),
                        f"{taken}: {_cell((layer.replacement or layer.chosen)[arithmetic])}",
                    )
            console.print(table)
        console.print(entry.action, markup=False, soft_wrap=True)
        for path in entry.unchecked:
            console.print(f"not checked, of an outside operator: {path}", markup=False)


def _cell(verdict: SiteVerdict) -> str:
    if verdict.safe:
        return f"{verdict.error:.1e}"
    if verdict.lost:
        text = f"{verdict.lost:.1%} lost"
    else:
        text = "not finite" if verdict.error == float("inf") else f"{verdict.error:.1e}"
    if verdict.overflow:
        text += f", overflow in {verdict.overflow}"
    elif verdict.subnormal:
        text += f", {verdict.subnormal:.0%} subnormal"
    return f"UNSAFE {text}"
