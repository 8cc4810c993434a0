"""The ``flowexport`` command with its verbs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flowexport import __version__
from flowexport.cli import (
    bench,
    bisect,
    check,
    convert,
    demo,
    doctor,
    front,
    inspect,
    listing,
    package,
    report,
    sensitivity,
    verify,
)

EPILOG = (
    "Exit codes: 0 done, 2 usage error or unusable input, 3 conversion failed, "
    "4 verification failed, 5 a requested target is not available, 130 interrupted."
)

app = typer.Typer(
    rich_markup_mode="markdown",  # the default eats [defaults] in brackets
    name="flowexport",
    help="Flowformer models to ONNX, TFLite, Core ML and TensorRT, verified on every runtime.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flowexport {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Flowformer models to ONNX, TFLite, Core ML and TensorRT, verified on every runtime."""


app.command("list")(listing.list_all)
app.command("doctor")(doctor.doctor)
app.command("check")(check.check)
app.command("convert")(convert.convert)
app.command("front")(front.front)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("verify")(verify.verify)
app.command("bisect")(bisect.bisect)
app.command("bench")(bench.bench)
app.add_typer(report.app, name="report")
app.command("inspect")(inspect.inspect)
app.command("package")(package.package)
app.command("demo")(demo.demo)


def command() -> Any:
    """Return the command that parses and runs a command line."""
    return typer.main.get_command(app)
