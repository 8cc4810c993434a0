"""The attention operators of this environment, found by their entry points."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points

from flowexport.ops.descriptor import AttentionDescriptor

GROUP = "flowexport.ops"


@cache
def installed_ops() -> tuple[AttentionDescriptor, ...]:
    """Return every attention descriptor that imports, sorted by name.

    An outside package's broken descriptor is warned about and skipped: its
    models do not export whole, everybody else's do.
    """
    found = []
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            found.append(entry.load())
        except Exception as error:
            warnings.warn(f"ops: {entry.name} ({entry.value}): {error}", stacklevel=2)
    return tuple(found)
