"""The command line: one file a verb; every verb calls the Python API."""

from __future__ import annotations

import sys

from flowexport.cli.run import run


def main() -> None:
    """Entry point of ``flowexport``."""
    sys.exit(run(sys.argv[1:]))


__all__ = ["main", "run"]
