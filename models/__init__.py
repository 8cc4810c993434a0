"""Flowformer architectures, configurations, trained weights and evaluation sets.

Importing it loads no torch: the models' modules load when one is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowexport_models.catalog import FAMILIES, MODELS, build_model, build_spec
from flowexport_models.data import DATASETS

__all__ = [
    "DATASETS",
    "FAMILIES",
    "MODELS",
    "build_model",
    "build_spec",
    "load_checkpoint",
    "load_weights",
]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's tensors; see :func:`flowexport_models.checkpoint.load_checkpoint`."""
    from flowexport_models.checkpoint import load_checkpoint as load

    return load(path)


def load_weights(module: Any, path: str | Path) -> None:
    """Load a checkpoint into a module; see :func:`flowexport_models.checkpoint.load_weights`."""
    from flowexport_models.checkpoint import load_weights as load

    load(module, path)
