"""The attention operators of this environment, found by their entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowexport.core.plugins import Registry

if TYPE_CHECKING:
    from flowexport.ops.descriptor import AttentionDescriptor

OPS: Registry[AttentionDescriptor] = Registry("flowexport.ops", "attention")


def installed_ops() -> tuple[AttentionDescriptor, ...]:
    """Return every attention descriptor that imports, sorted by name.

    An outside package's broken descriptor is skipped, and stays listed with its
    reason: its models do not export whole, everybody else's do.
    """
    return tuple(OPS.working().values())
