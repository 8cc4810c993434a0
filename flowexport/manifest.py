"""The bundle's manifest: what is in it, from what it was made, and with what."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flowexport import __version__
from flowexport.bundle import MANIFEST_SCHEMA
from flowexport.core.toolchain import installed_versions
from flowexport.core.types import Availability, TensorSpec
from flowexport.plan import Plan
from flowexport.process import Conversion

PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "safetensors")


def make_manifest(
    plan: Plan,
    conversions: Mapping[str, Conversion],
    outputs: tuple[TensorSpec, ...],
    attentions: int,
    root: Path,
) -> dict[str, Any]:
    """Return the manifest without its table of files.

    Args:
        outputs: of the lowered program.
        attentions: how many attention nodes it has.
        root: the bundle's folder.
    """
    subject, spec = plan.subject, plan.subject.spec
    return {
        "schema": MANIFEST_SCHEMA,
        "name": plan.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "flowexport": __version__,
        "description": plan.recipe.description,
        "recipe": dict(subject.recipe_document),
        "recipe_sha256": subject.recipe_sha256,
        "model": {
            "name": spec.name,
            "description": spec.description,
            "paper": spec.paper,
            "parameters": subject.parameters,
            "attentions": attentions,
            "weights": _weights_name(plan),
            "weights_sha256": subject.weights_sha256,
        },
        "inputs": [s.to_json() for s in spec.inputs],
        "outputs": [s.to_json() for s in outputs],
        "labels": list(spec.labels),
        "preprocessing": dict(spec.preprocessing),
        "streaming": _streaming(plan),
        "buckets": _buckets(plan),
        "machine": {
            "platform": platform.platform(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "versions": {
            "flowexport": __version__,
            "python": sys.version.split()[0],
            **installed_versions(*PACKAGES),
        },
        "targets": {n: _target(plan, n, c, root) for n, c in conversions.items()},
        "not_run": {n: _not_run(a) for n, a in plan.not_run.items()},
        "bench": {
            "warmup": plan.recipe.bench.warmup,
            "min_runs": plan.recipe.bench.min_runs,
            "min_seconds": plan.recipe.bench.min_seconds,
            "threads": plan.threads,
        },
    }


def _streaming(plan: Plan) -> dict[str, Any] | None:
    """Describe a causal model's stream: its lengths, its state and where the reset state is."""
    module: Any = plan.subject.module
    if plan.subject.lengths is None:
        return None
    state = [s.static(batch=1) for s in module.state_specs()]
    size = sum(math.prod(map(int, s.shape)) * np.dtype(s.dtype).itemsize for s in state)
    first = plan.subject.spec.inputs[0].shape[1]
    return {
        "lengths": sorted({int(first), *plan.subject.lengths}),
        "max_steps": module.max_steps,
        "reset": "golden/state.safetensors",
        "state": [s.to_json() for s in state],
        "state_bytes": size,
    }


def _buckets(plan: Plan) -> dict[str, Any] | None:
    if not plan.recipe.buckets:
        return None
    ((dimension, lengths),) = plan.recipe.buckets.items()
    return {"dimension": dimension, "lengths": list(lengths)}


def _weights_name(plan: Plan) -> str:
    """Name the weights without this machine's paths."""
    weights = plan.recipe.weights
    if weights is not None and weights.file is not None:
        return weights.file.name
    if weights is not None and weights.seed is not None:
        return f"random (seed {weights.seed})"
    return "shipped" if plan.subject.spec.weights else "as built"


def _target(plan: Plan, name: str, conversion: Conversion, root: Path) -> dict[str, Any]:
    artifact = conversion.artifact
    return {
        **artifact.to_json(root),
        "conversion": {
            "seconds": round(conversion.seconds, 3),
            "peak_rss_bytes": conversion.peak_rss_bytes,
        },
        "deterministic": {
            "deterministic": artifact.details.get("deterministic"),
            "reason": artifact.details.get(
                "deterministic_reason",
                None if "deterministic" in artifact.details else "not rebuilt in this run",
            ),
        },
        "tolerance": dict(plan.recipe.tolerance(name, artifact.precision)),
        "required_fusions": dict(plan.recipe.fusions.get(name, {})),
        "range_check": plan.checks[name].to_json() if name in plan.checks else None,
    }


def _not_run(availability: Availability) -> dict[str, Any]:
    return {"reason": availability.reason, "fix": availability.fix}
