"""Golden cases and evaluation sets as files: safetensors and an index with its hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import BundleError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Dataset

GOLDEN_SCHEMA = "flowexport.golden/1"
EVALUATION_SCHEMA = "flowexport.evaluation/1"
INDEX = "index.json"
FIX = "convert again; a bundle is not edited by hand"


@dataclass(frozen=True)
class Golden:
    """Saved inputs and the outputs expected of them.

    Attributes:
        cases: case name -> input name -> array.
        expected: case name -> output name -> float64 array; the same cases.
        sha256: of the tensor file.
        subject: what the outputs belong to (a hash of model and recipe), or None.
        noise: case name -> output name -> ``max_rel`` of PyTorch itself in float32.
    """

    cases: Mapping[str, Mapping[str, np.ndarray]]
    expected: Mapping[str, Mapping[str, np.ndarray]]
    sha256: str
    subject: str | None = None
    noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """A labelled set with the float64 reference's scores.

    Attributes:
        output: name of the output that holds class scores.
        reference_logits: float64 (samples, classes); where the model answers after
            every step, its answers after the last real one.
        sha256: of the tensor file.
        subject: what the scores belong to, or None.
        reference_steps: float64 (samples, steps, classes) there, None elsewhere.
        noise: ``max_rel`` of PyTorch's own float32 scores, or None where not measured.
    """

    dataset: Dataset
    output: str
    reference_logits: np.ndarray
    sha256: str
    subject: str | None = None
    reference_steps: np.ndarray | None = None
    noise: float | None = None

    def answers(self, scores: np.ndarray) -> np.ndarray:
        """Return (samples, classes): scores as they are, or those after the last real step.

        Scores of another shape are returned as they are, for the comparison to tell.
        """
        steps = self.reference_steps
        if steps is None or scores.shape != steps.shape:
            return scores
        return _last(scores, self.dataset)


def _last(scores: np.ndarray, dataset: Dataset) -> np.ndarray:
    assert dataset.lengths is not None
    return np.asarray(scores[np.arange(len(dataset)), dataset.lengths - 1])


def write_golden(
    folder: Path,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    expected: Mapping[str, Mapping[str, np.ndarray]],
    *,
    subject: str | None = None,
    noise: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write ``cases.safetensors`` and ``index.json`` into ``folder``; return the tensor file.

    Raises:
        BundleError: there is no case, or inputs and outputs are of other cases.
    """
    if not cases or set(cases) != set(expected) or not all(expected.values()):
        raise BundleError(
            f"write golden {folder}: inputs have cases {sorted(cases)} and outputs "
            f"{sorted(expected)}; expected the same cases, at least one, each with an output."
        )
    tensors: dict[str, np.ndarray] = {}
    for case in cases:
        if "/" in case:
            raise BundleError(f"write golden {folder}: case {case!r} has '/'; expected none.")
        tensors |= {f"{case}/input/{n}": v for n, v in cases[case].items()}
        tensors |= {
            f"{case}/output/{n}": np.asarray(v, dtype=np.float64) for n, v in expected[case].items()
        }
    index = {
        "cases": {c: {"inputs": list(cases[c]), "outputs": list(expected[c])} for c in cases},
        "noise": {case: dict(found) for case, found in (noise or {}).items()},
    }
    return _write(folder, "cases.safetensors", GOLDEN_SCHEMA, tensors, index, subject)


def read_golden(folder: Path, *, subject: str | None = None) -> Golden:
    """Read what :func:`write_golden` wrote.

    Raises:
        BundleError: missing, truncated, changed since it was written, without
            cases, or (with ``subject``) written for something else.
    """
    index, tensors = _read(folder, "cases.safetensors", GOLDEN_SCHEMA, subject)
    try:
        listing = index["cases"]
        cases = {
            c: {n: tensors.pop(f"{c}/input/{n}") for n in listing[c]["inputs"]} for c in listing
        }
        expected = {
            c: {n: tensors.pop(f"{c}/output/{n}") for n in listing[c]["outputs"]} for c in listing
        }
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"read golden {folder}: the index and the tensors differ at {error}; "
            "expected every listed tensor.",
            fix=FIX,
        ) from error
    if tensors:
        raise BundleError(
            f"read golden {folder}: {sorted(tensors)[0]} is not in the index; "
            "expected every tensor listed.",
            fix=FIX,
        )
    if not cases or not all(expected.values()):
        raise BundleError(
            f"read golden {folder}: no case with an output; expected at least one.", fix=FIX
        )
    wrong = [f"{c}/{n}" for c in expected for n, v in expected[c].items() if v.dtype != np.float64]
    if wrong:
        raise BundleError(
            f"read golden {folder}: output {wrong[0]} is not float64; expected float64.", fix=FIX
        )
    noise = index.get("noise") or {}
    return Golden(cases, expected, str(index["sha256"]), index.get("subject"), noise)


def write_evaluation(
    folder: Path,
    dataset: Dataset,
    output: str,
    reference_logits: np.ndarray,
    *,
    subject: str | None = None,
    noise: float | None = None,
) -> Path:
    """Write ``dataset.safetensors`` and ``index.json`` into ``folder``; return the tensor file.

    Args:
        output: name of the output that holds class scores.
        reference_logits: float64 (samples, classes), or (samples, steps, classes)
            for a data set with lengths.

    Raises:
        BundleError: the scores do not fit the samples.
    """
    logits = np.asarray(reference_logits, dtype=np.float64)
    steps: dict[str, np.ndarray] = {}
    if dataset.lengths is not None and logits.ndim == 3 and len(logits) == len(dataset):
        steps = {"lengths": dataset.lengths.astype(np.int64), "reference_steps": logits}
        logits = _last(logits, dataset)
    if logits.ndim != 2 or len(logits) != len(dataset) or not len(dataset):
        raise BundleError(
            f"write evaluation {dataset.name}: the scores have shape {list(logits.shape)}; "
            f"expected ({len(dataset)}, classes) with at least one sample."
        )
    tensors = {f"input/{n}": v for n, v in dataset.inputs.items()}
    tensors |= {
        "targets": np.asarray(dataset.targets, dtype=np.int64),
        "reference_logits": logits,
        **steps,
    }
    index = {
        "name": dataset.name,
        "samples": len(dataset),
        "inputs": list(dataset.inputs),
        "output": output,
        "labels": list(dataset.labels),
        "attribution": dataset.attribution,
        "reference_correct": _correct(logits, dataset.targets),
        "noise": noise,
    }
    return _write(folder, "dataset.safetensors", EVALUATION_SCHEMA, tensors, index, subject)


def read_evaluation(folder: Path, *, subject: str | None = None) -> Evaluation:
    """Read what :func:`write_evaluation` wrote; raises as :func:`read_golden` does."""
    index, tensors = _read(folder, "dataset.safetensors", EVALUATION_SCHEMA, subject)
    try:
        dataset = Dataset(
            name=str(index["name"]),
            inputs={n: tensors[f"input/{n}"] for n in index["inputs"]},
            targets=tensors["targets"],
            labels=tuple(index["labels"]),
            attribution=str(index["attribution"]),
            lengths=tensors.get("lengths"),
        )
        logits, output, samples = tensors["reference_logits"], index["output"], index["samples"]
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"read evaluation {folder}: the index and the tensors differ at {error}; "
            "expected every listed tensor.",
            fix=FIX,
        ) from error
    counts = {len(v) for v in (*dataset.inputs.values(), dataset.targets, logits)}
    if counts != {samples} or not samples or logits.ndim != 2 or logits.dtype != np.float64:
        raise BundleError(
            f"read evaluation {folder}: inputs, targets and float64 scores have {sorted(counts)} "
            f"samples; expected {samples} of each, at least one.",
            fix=FIX,
        )
    correct = _correct(logits, dataset.targets)
    if index.get("reference_correct", correct) != correct:
        raise BundleError(
            f"read evaluation {folder}: the reference is right on {correct} of {samples} samples; "
            f"expected {index['reference_correct']}: labels or scores are not those of the index.",
            fix=FIX,
        )
    return Evaluation(
        dataset,
        str(output),
        logits,
        str(index["sha256"]),
        index.get("subject"),
        tensors.get("reference_steps"),
        index.get("noise"),
    )


def _correct(logits: np.ndarray, targets: np.ndarray) -> int:
    return int(np.count_nonzero(logits.argmax(axis=1) == targets))


def _write(
    folder: Path,
    name: str,
    schema: str,
    tensors: Mapping[str, np.ndarray],
    index: Mapping[str, Any],
    subject: str | None,
) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    document = {
        "schema": schema,
        "file": name,
        "sha256": sha256_file(path),
        "subject": subject,
        **index,
    }
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def _read(
    folder: Path, name: str, schema: str, subject: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    def broken(what: str) -> BundleError:
        return BundleError(f"read {folder.name} {folder}: {what}.", fix=FIX)

    path, index_path = folder / name, folder / INDEX
    for needed in (index_path, path):
        if not needed.is_file():
            raise broken(f"{needed.name} is missing; expected a file")
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise broken(f"{INDEX} cannot be read as JSON ({error}); expected {schema}") from error
    if not isinstance(index, dict) or index.get("schema") != schema:
        found = index.get("schema") if isinstance(index, dict) else type(index).__name__
        raise broken(f"{INDEX} has schema {found!r}; expected {schema!r}")
    actual = sha256_file(path)
    if actual != index.get("sha256"):
        raise broken(
            f"{name} has sha256 {actual[:12]}…; expected {str(index.get('sha256'))[:12]}…: it is "
            "truncated, stale or was changed"
        )
    if subject is not None and index.get("subject") != subject:
        raise broken(
            f"it was written for {str(index.get('subject'))[:12]}…; expected {subject[:12]}…"
        )
    try:
        return index, load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise broken(f"{name} cannot be read ({error}); expected safetensors") from error
