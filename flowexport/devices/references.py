"""What device reports are held against, out of packages and bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.bundle import Bundle
from flowexport.core.errors import VerificationError
from flowexport.core.reports import Tolerance
from flowexport.core.types import STEP
from flowexport.evidence import check_files, references
from flowexport.package import Package
from flowexport.package.build import model_id

Key = tuple[str, str]
"""Model id and format; ``<format> step`` for the step of a causal model."""


@dataclass(frozen=True)
class Reference:
    """The truth on one model file.

    Attributes:
        dtypes: of the outputs.
        expected: golden case -> output -> float64 array.
        dataset, targets, top1: of the evaluation set, in its order; None where there is none.
        inputs: (source, case) of the preprocessing -> input -> array.
        input_max_abs: source -> what an input may differ.
        origin: the package or bundle.
        clipping: golden case -> what the file's calibrated ranges clip of it.
    """

    sha256: str
    size_bytes: int
    tolerance: Tolerance
    dtypes: Mapping[str, str]
    expected: Mapping[str, Mapping[str, np.ndarray]]
    dataset: str | None
    targets: np.ndarray | None
    top1: np.ndarray | None
    classes: int | None
    inputs: Mapping[tuple[str, str], Mapping[str, np.ndarray]] = field(default_factory=dict)
    input_max_abs: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""
    clipping: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def collect(packages: Sequence[Path], bundles: Sequence[Path]) -> dict[Key, Reference]:
    """Read the references; where both have a model file, a package goes before a bundle.

    Raises:
        BundleError: a path is neither, or was changed.
        VerificationError: two of them hold different files under one name.
    """
    found: dict[Key, Reference] = {}
    tables = [from_package(p) for p in packages] + [from_bundle(b) for b in bundles]
    for table in tables:
        for key, reference in table.items():
            first = found.setdefault(key, reference)
            if first.sha256 != reference.sha256:
                raise VerificationError(
                    f"merge {' '.join(key)}: {reference.origin} has sha256"
                    f" {reference.sha256[:12]}…; expected {first.sha256[:12]}… as"
                    f" {first.origin} has.",
                    fix="merge the reports of one conversion at a time",
                )
    return found


def from_package(path: Path) -> dict[Key, Reference]:
    package = Package.open(path)
    found = {}
    for model in package.manifest["models"]:
        _, expected = package.golden(model)
        evaluation = package.evaluation(model) if model["evaluation"] else None
        inputs = {
            key: {n.removeprefix("input/"): v for n, v in arrays.items() if n != "raw"}
            for key, arrays in package.preprocessing(model).items()
        }
        limits = {
            s["name"]: float(s["golden"]["max_abs"]) for s in model["preprocessing"]["sources"]
        }
        steps = model["streaming"]["files"] if model["streaming"] else {}
        forms = [(n, f, f) for n, f in model["files"].items()]
        forms += [(f"{n} step", f, model["files"][n]) for n, f in steps.items()]
        for name, held, file in forms:
            found[model["id"], name] = Reference(
                sha256=held["sha256"],
                size_bytes=held["size_bytes"],
                tolerance=Tolerance.from_json(file["tolerance"]),
                dtypes={s["name"]: s["dtype"] for s in file["outputs"]},
                expected=expected,
                dataset=model["evaluation"]["name"] if evaluation else None,
                targets=evaluation["targets"] if evaluation else None,
                top1=evaluation["reference_top1"] if evaluation else None,
                classes=len(model["labels"]) or None,
                inputs=inputs,
                input_max_abs=limits,
                origin=f"package {path}",
                clipping=file.get("clipping", {}),
            )
    return found


def from_bundle(path: Path) -> dict[Key, Reference]:
    bundle = Bundle.open(path)
    check_files(bundle)
    golden, evaluation = references(bundle.path, bundle.manifest)
    found = {}
    for name, artifact in bundle.artifacts().items():
        entry = bundle.manifest["targets"][name]
        found[model_id(bundle.manifest), name] = Reference(
            sha256=artifact.sha256,
            size_bytes=artifact.size_bytes,
            tolerance=Tolerance.from_json(entry["tolerance"]),
            dtypes={s.name: s.dtype for s in artifact.outputs},
            expected=golden.expected,
            dataset=evaluation.dataset.name if evaluation else None,
            targets=evaluation.dataset.targets if evaluation else None,
            top1=evaluation.reference_logits.argmax(axis=1) if evaluation else None,
            classes=len(bundle.manifest["labels"]) or None,
            origin=f"bundle {path}",
            clipping=artifact.details.get("clipping", {}),
        )
        step = artifact.functions.get(STEP)
        if step is not None:
            own = replace(
                found[model_id(bundle.manifest), name],
                sha256=step.sha256,
                size_bytes=step.size_bytes,
                dtypes={s.name: s.dtype for s in step.outputs},
            )
            found[model_id(bundle.manifest), f"{name} step"] = own
    return found
