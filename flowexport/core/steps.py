"""How a converter tells whoever watches its log how far it is."""

from __future__ import annotations

import os
from pathlib import Path

STEP = "flowexport step: "
"""Starts a line of the log that names the step; what follows is shown as it is."""


def last_step(log: Path) -> str:
    """Return the last step that a converter's log tells, or nothing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((x.removeprefix(STEP) for x in reversed(lines) if x.startswith(STEP)), "")
