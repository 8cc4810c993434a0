"""Samples that the ranges of int8-static are measured on: read, checked and chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import is_zipfile

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.ranges import PROBE
from flowexport.core.types import Dataset, Precision, TensorSpec
from flowexport.recipes import Recipe
from flowexport.registry import DATASETS

NEEDED = (Precision.INT8_STATIC,)
"""Precisions that are calibrated."""

FIX = (
    "`calibration: {dataset: NAME}` in the recipe, or --calibration with a data set's name or a"
    " .npz file: one array an input, samples first, and `targets`, the class of each"
)


def require_calibration(recipe: Recipe, targets: Sequence[str]) -> bool:
    """Return whether any of these targets is calibrated.

    Raises:
        InputError: one is, and the recipe names no samples.
    """
    wanting = [n for n in targets if recipe.options(n).precision in NEEDED]
    if wanting and recipe.calibration is None:
        raise InputError(
            f"{recipe.where('targets', wanting[0])}: {wanting[0]} has precision"
            f" {recipe.options(wanting[0]).precision.value}; expected calibration samples, whose"
            " activations give its ranges.",
            fix=FIX,
        )
    return bool(wanting)


def load_calibration(
    recipe: Recipe, inputs: Sequence[TensorSpec], evaluation: Dataset | None
) -> Dataset:
    """Return the recipe's calibration samples, spread over their classes.

    Args:
        inputs: the model's.
        evaluation: the set that judges the result; calibrating on it would flatter.

    Raises:
        UnknownNameError: no such data set.
        InputError: the file cannot be read, a shape or dtype does not fit, the
            samples are of one class only, or they are the evaluation's.
    """
    asked = recipe.calibration
    assert asked is not None
    where = f"{recipe.where('calibration')}: calibration {asked}"
    if asked.file is not None:
        dataset = _read_file(asked.file, where)
    else:
        name = str(asked.dataset)
        dataset = DATASETS.get(name, where=recipe.where("calibration", "dataset"))()
    _check(dataset, inputs, evaluation, where)
    chosen = spread(dataset.targets, asked.samples)
    return Dataset(
        name=dataset.name,
        inputs={s.name: np.ascontiguousarray(dataset.inputs[s.name][chosen]) for s in inputs},
        targets=dataset.targets[chosen],
        labels=dataset.labels,
        attribution=dataset.attribution,
        lengths=None if dataset.lengths is None else dataset.lengths[chosen],
    )


def spread(targets: np.ndarray, count: int) -> np.ndarray:
    """Return indices of ``count`` samples, in turns over the classes, ascending.

    Args:
        targets: (samples,), the class of each.
    """
    turns = np.empty(len(targets), np.int64)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        turns[members] = np.arange(len(members))
    return np.sort(np.argsort(turns, kind="stable")[:count])


def samples_sha256(dataset: Dataset) -> str:
    """Return the hex sha256 of the samples' names, shapes and values."""
    digest = hashlib.sha256()
    for name, values in sorted(dataset.inputs.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def write_samples(
    dataset: Dataset,
    path: Path,
    probes: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]] | None = None,
) -> None:
    """Write samples for a converter's child process, which reads them in lowering.

    Args:
        probes: function (the main one: empty) -> case to be verified -> input -> array: the
            converter tells how far each goes beyond the samples' ranges.
    """
    from safetensors.numpy import save_file

    tensors = dict(dataset.inputs)
    for function, cases in (probes or {}).items():
        for case, feeds in cases.items():
            for name, values in feeds.items():
                tensors[f"{PROBE}/{function}/{case}/{name}"] = np.ascontiguousarray(values)
    save_file(tensors, path, {"name": dataset.name})


def read_arrays(path: Path, where: str, fix: str) -> dict[str, np.ndarray]:
    """Read a user's ``.npz`` file.

    Args:
        where: begins the message.
        fix: the command that makes such a file.

    Raises:
        InputError: it is no such file, or holds Python objects.
    """
    try:
        if path.is_file() and not is_zipfile(path):
            raise ValueError("it is no archive of arrays, or cut short")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, EOFError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"{where}: cannot be read: {text.splitlines()[0].rstrip('.')}; expected a .npz file.",
            fix=fix,
        ) from error


def _read_file(path: Path, where: str) -> Dataset:
    arrays = read_arrays(path, where, "numpy.savez(FILE, targets=classes, **{input: array})")
    targets = arrays.pop("targets", None)
    if targets is None or targets.ndim != 1 or targets.dtype.kind not in "iu":
        found = "no targets" if targets is None else f"targets {targets.dtype}{[*targets.shape]}"
        raise InputError(
            f"{where}: has {found}; expected the class of each sample, integers of shape"
            " (samples,): ranges measured on one class alone would not be noticed without.",
            fix="numpy.savez(FILE, targets=classes, **{input: array})",
        )
    return Dataset(path.stem, arrays, targets.astype(np.int64), (), "the user")


def _check(
    dataset: Dataset, inputs: Sequence[TensorSpec], evaluation: Dataset | None, where: str
) -> None:
    missing = [s.name for s in inputs if s.name not in dataset.inputs]
    if missing:
        raise InputError(
            f"{where}: has {sorted(dataset.inputs) or 'no input'}; expected {missing[0]!r} too.",
            fix="name the arrays as the model's inputs",
        )
    for spec in inputs:
        values = dataset.inputs[spec.name]
        TensorSpec(spec.name, ("samples", *spec.shape[1:]), spec.dtype).check(values, where)
        if len(values) != len(dataset):
            raise InputError(
                f"{where}: {spec.name} has {len(values)} samples; expected {len(dataset)}, as many"
                " as targets."
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputError(f"{where}: {spec.name} has values that are not finite; expected none.")
    classes = np.unique(dataset.targets)
    if len(classes) < 2:
        of = f"of class {classes[0]} only" if len(classes) else "at all"
        raise InputError(
            f"{where}: has {len(dataset)} samples {of}; expected two classes or more: ranges"
            " measured on one would clip the others."
        )
    if evaluation is not None and _same(dataset, evaluation, inputs):
        raise InputError(
            f"{where}: is the evaluation set; expected other samples, because those that set the"
            " ranges cannot judge them.",
            fix="calibrate on training data",
        )


def _same(dataset: Dataset, evaluation: Dataset, inputs: Sequence[TensorSpec]) -> bool:
    """Whether half of the samples or more are the evaluation's."""
    names = [s.name for s in inputs]
    if dataset.name == evaluation.name:
        return True
    if not all(name in evaluation.inputs for name in names):
        return False

    def rows(of: Dataset) -> list[bytes]:
        return [b"".join(of.inputs[n][i].tobytes() for n in names) for i in range(len(of))]

    known = set(rows(evaluation))
    return 2 * sum(row in known for row in rows(dataset)) >= len(dataset)
