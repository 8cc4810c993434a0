"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowexport.cli.console import complete_target

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
BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder made by `flowexport convert`.")
]
