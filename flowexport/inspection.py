"""Reads what a bundle or a single artifact's file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowexport.bundle import Bundle
from flowexport.core.errors import FlowExportError, InputError
from flowexport.core.hashing import sha256_tree, size_tree
from flowexport.core.types import Target
from flowexport.registry import TARGETS


def inspect_path(path: str | Path) -> dict[str, Any]:
    """Describe a bundle or a file.

    Returns:
        For a file ``{"target", "path", "size_bytes", "sha256", "inputs",
        "outputs", "operators", "fusions", ...}``; for a bundle the same by
        target, where a file that cannot be read has ``error``.

    Raises:
        InputError: there is nothing, or nothing that a target reads.
        BundleError: a folder that is no bundle.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"inspect {path}: does not exist; expected a bundle or a model file.")
    target = _target_of(path)
    if target is not None:
        return inspect_file(target, path)
    if not path.is_dir():
        known = ", ".join(sorted(t.suffix for t in TARGETS.working().values()))
        raise InputError(f"inspect {path}: has an unknown ending; expected one of: {known}.")
    bundle = Bundle.open(path)
    found: dict[str, Any] = {}
    for name, artifact in bundle.artifacts().items():
        entry = bundle.manifest["targets"][name]
        found[name] = {"precision": entry["precision"], "form": entry["form"]}
        try:
            found[name] |= inspect_file(TARGETS.get(name), artifact.path)
        except FlowExportError as error:
            found[name] |= {
                "target": name,
                "path": str(artifact.path),
                "size_bytes": entry["size_bytes"],
                "sha256": entry["sha256"],
                "error": error.message,
            }
    return {
        "bundle": str(bundle.path),
        "name": bundle.manifest["name"],
        "model": bundle.manifest["model"],
        "recipe_sha256": bundle.manifest["recipe_sha256"],
        "inputs": bundle.manifest["inputs"],
        "outputs": bundle.manifest["outputs"],
        "targets": found,
        "not_run": bundle.manifest["not_run"],
    }


def inspect_file(target: Target, path: Path) -> dict[str, Any]:
    """Describe one artifact's file.

    Raises:
        InputError: the file is none of this target's.
    """
    if not path.exists():
        raise InputError(f"inspect {path}: does not exist; expected a {target.name} file.")
    try:
        found = target.inspect(path)
        if (runs := getattr(target, "inspect_run", None)) is not None and target.probe().runs:
            found = {**found, **runs(path)}
    except FlowExportError:
        raise
    except Exception as error:  # a parser of somebody else's may raise anything
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"inspect {path}: cannot be read as {target.name}: {type(error).__name__}: {line}."
        ) from error
    return {
        "target": target.name,
        "path": str(path),
        "size_bytes": size_tree(path),
        "sha256": sha256_tree(path),
        **found,
    }


def _target_of(path: Path) -> Target | None:
    by_length = sorted(TARGETS.working().values(), key=lambda t: -len(t.suffix))
    return next((t for t in by_length if path.name.endswith(t.suffix)), None)
