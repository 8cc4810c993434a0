"""Where things are kept between two runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(part: str) -> Path:
    """Return the folder of one part's cache: in ``$FLOWEXPORT_CACHE``, or the user's cache."""
    root = os.environ.get("FLOWEXPORT_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(root or Path.home() / ".cache") / "flowexport" / part
