"""Finds targets, attention operators, models and data sets by entry points.

A package outside this one adds a target with one line::

    [project.entry-points."flowexport.targets"]
    mytarget = "mypackage.target:TARGET"

A plugin that cannot be imported stays listed with its reason and stops nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from flowexport.core.plugins import Registry
from flowexport.core.types import Dataset, ModelSpec, Target
from flowexport.ops.installed import OPS

__all__ = ["DATASETS", "MODELS", "OPS", "TARGETS"]

TARGETS: Registry[Target] = Registry("flowexport.targets", "target")
MODELS: Registry[ModelSpec] = Registry("flowexport.models", "model", mapping=True)
DATASETS: Registry[Callable[[], Dataset]] = Registry(
    "flowexport.datasets", "data set", mapping=True
)
