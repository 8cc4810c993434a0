"""Damage to a bundle's reference data and manifest, and files cut or exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mutants import FORMATS, Change, Mutant
from safetensors.numpy import load_file, save_file

from flowexport.bundle import MANIFEST
from flowexport.core.hashing import sha256_file

Tensors = dict[str, np.ndarray]


def _rewrite(file: str, change: Callable[[Tensors], None], bundle: Path) -> None:
    """Change the tensors of a reference file, and make its index vouch for them."""
    path = bundle / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    _document(path.parent / "index.json", lambda d: d.update(sha256=sha256_file(path)))


def _document(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _older_weights(tensors: Tensors) -> None:
    """As after another training: the same cases, other expectations."""
    for name, values in tensors.items():
        if "/output/" in name:
            tensors[name] = values * (1 + 1e-4 * np.cos(np.arange(values.size))).reshape(
                values.shape
            )


def _exchange_cases(tensors: Tensors) -> None:
    one, other = "random-0/output/logits", "random-1/output/logits"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _other_inputs(tensors: Tensors) -> None:
    tensors["sample-0/input/x"] = tensors["sample-0/input/x"] * np.float32(1.01)


def _less(key: str, count: int, tensors: Tensors) -> None:
    tensors[key] = np.roll(tensors[key], count, axis=0)


def _cut(file: str, keep: Callable[[int], int], bundle: Path) -> None:
    path = bundle / file
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])
    _document(path.parent / "index.json", lambda d: d.update(sha256=sha256_file(path)))


def _manifest(change: Callable[[dict[str, Any]], None], bundle: Path) -> None:
    _document(bundle / MANIFEST, change)


def _looser(target: str, manifest: dict[str, Any]) -> None:
    manifest["targets"][target]["tolerance"].update(max_rel=1.0, min_cosine=-1.0, min_sqnr_db=-99)


def _truncated(keep: Callable[[int], int], part: str, path: Path) -> None:
    file = path / part if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: keep(file.stat().st_size)])


def _exchanged(path: Path) -> None:
    """Put another format's bytes under the name."""
    bundle = path.parents[1]
    other = bundle / "golden" / "cases.safetensors"
    if path.is_dir():
        shutil.rmtree(path)
    shutil.copyfile(other, path)


GOLDEN, EVALUATION = "golden/cases.safetensors", "evaluation/dataset.safetensors"

REFERENCES: tuple[tuple[str, str, Change], ...] = (
    ("stale golden", "of older weights", partial(_rewrite, GOLDEN, _older_weights)),
    ("stale golden", "two cases exchanged", partial(_rewrite, GOLDEN, _exchange_cases)),
    ("stale golden", "another input", partial(_rewrite, GOLDEN, _other_inputs)),
    (
        "stale golden",
        "scores of other samples",
        partial(_rewrite, EVALUATION, partial(_less, "reference_logits", 1)),
    ),
    (
        "labels shifted",
        "in the evaluation set",
        partial(_rewrite, EVALUATION, partial(_less, "targets", 7)),
    ),
    ("truncated file", "golden cases", partial(_cut, GOLDEN, lambda n: n // 2)),
    ("truncated file", "evaluation set", partial(_cut, EVALUATION, lambda n: n - 1)),
    (
        "metadata of another model",
        "golden cases",
        lambda bundle: _document(
            bundle / "golden/index.json", lambda d: d.update(subject="0" * 64)
        ),
    ),
    (
        "metadata of another model",
        "manifest's recipe",
        partial(_manifest, lambda m: m["recipe"].update(seed=99)),
    ),
    (
        "labels shifted",
        "in the manifest",
        partial(_manifest, lambda m: m.update(labels=m["labels"][1:] + m["labels"][:1])),
    ),
)


def mutants_of() -> list[Mutant]:
    """Return the mutants of every format's bundle and of files as a whole."""
    found = []
    for target in FORMATS:
        # Nothing runs an engine here, so nothing holds it against golden values.
        references = REFERENCES if target != "tensorrt" else REFERENCES[5:]
        for kind, name, change in references:
            found.append(Mutant(target, kind, name, change, loads=False, whole=True))
        looser = partial(_manifest, partial(_looser, target))
        found.append(Mutant(target, "metadata of another model", "tolerance", looser, False, True))
        part = "Data/com.apple.CoreML/model.mlmodel"
        for name, keep in (
            ("half", lambda n: n // 2),
            ("all but the last byte", lambda n: n - 1),
            ("16 bytes", lambda n: 16),
            ("nothing left", lambda n: 0),
        ):
            change = partial(_truncated, keep, part)
            found.append(Mutant(target, "truncated file", name, change, loads=False))
        if target == "coreml":
            for name, file in (
                ("weights", "Data/com.apple.CoreML/weights/weight.bin"),
                ("package's table", "Manifest.json"),
            ):
                change = partial(_truncated, lambda n: n // 2, file)
                found.append(Mutant(target, "truncated file", name, change, loads=False))
        found.append(
            Mutant(target, "metadata of another model", "another kind of file", _exchanged, False)
        )
    return found
