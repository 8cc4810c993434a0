"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowexport.cli.console import complete_recipe, complete_target
from flowexport.core.errors import InputError
from flowexport.core.types import TensorSpec

Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE_OR_MODEL",
        help="A recipe's name or path, a model's name, or path/to/file.py:factory.",
        autocompletion=complete_recipe,
    ),
]
WeightsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A .pth, .pt or .safetensors checkpoint.")
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="NAME:SHAPE",
        help="An input's shape, as x:1x128x12 or ids:batchx64:int64; once for each.",
    ),
]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        "-t",
        metavar="T",
        help="Only this target; may be given several times.",
        autocompletion=complete_target,
    ),
]
Require = Annotated[
    list[str],
    typer.Option(
        "--require",
        metavar="T",
        help="Fail (exit code 5) if this target does not run here.",
        autocompletion=complete_target,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads of each runtime [recipe's, or 1]."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say each stage on stderr, terminal or not.")
]
Save = Annotated[
    bool, typer.Option("--save", help="Also write the findings into the bundle's report.")
]
Runner = Annotated[
    str | None,
    typer.Option(
        "--runner",
        metavar="R",
        help="Run on qemu-aarch64 (emulated ARM) or tflite-2.14 (an old runtime) instead;"
        " set up on first use.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        metavar="N",
        help="Only the first N samples of the evaluation set [all; emulated: 32].",
    ),
]
BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder made by `flowexport convert`.")
]


Calibration = Annotated[
    str | None,
    typer.Option(metavar="SET|FILE.npz", help="Samples for int8-static: a data set, or arrays."),
]
MaxAccuracyDrop = Annotated[
    float | None,
    typer.Option(metavar="POINTS", help="FAIL where the evaluation set's accuracy drops by more."),
]


def parse_input(text: str) -> TensorSpec:
    """Read one ``--input``.

    Raises:
        InputError: it names no input, or its shape cannot be read.
    """
    from flowexport.recipes import parse_shape

    name, colon, shape = text.partition(":")
    if not colon or not name.isidentifier():
        raise InputError(
            f"--input {text}: names no input; expected NAME:SHAPE.", fix="--input x:1x128x12"
        )
    return parse_shape(name, shape)
