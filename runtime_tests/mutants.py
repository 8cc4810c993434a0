"""Damage to finished artifacts: what a mutant is, the model, the judge and the score.

A mutant is one change to one file of a finished bundle. ``judge`` verifies the
bundle as ``flowexport verify`` does, but with hashes ignored: what it finds, it
finds by numbers, by the runtime's refusal, or by reading the file.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from mutants_recipes import FAMILIES, MODEL
from once import once
from way_tools import converted_here

from flowexport import pipeline
from flowexport.bundle import Bundle
from flowexport.core.errors import BundleError
from flowexport.core.hashing import sha256_tree
from flowexport.core.reports import ParityReport
from flowexport.core.types import Artifact, Verdict
from flowexport.evidence import verify_all
from flowexport.parity import streaming
from flowexport.progress import SILENT
from flowexport.registry import TARGETS

SAMPLES = 48
"""Of the evaluation set, of two speakers; a stream is then cut to 128 steps."""

FORMATS = ("onnx", "tflite", "coreml", "tensorrt")

Change = Callable[[Path], None]
Damage = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        kind: a row of the score.
        name: of its own among the format's mutants.
        apply: changes the file (or folder) whose path it is given; of a bundle's
            other files where ``whole`` is set.
        loads: whether the file must still be one that its reader takes.
        whole: ``apply`` is given the bundle instead of the artifact.
        family: the bundle it damages, one of :data:`FAMILIES`.
    """

    format: str
    kind: str
    name: str
    apply: Change
    loads: bool = True
    whole: bool = False
    family: str = "plain"

    def __str__(self) -> str:
        family = "" if self.family == "plain" else f"{self.family}-"
        return f"{family}{self.format}-{self.kind}-{self.name}".replace(" ", "_")


@dataclass(frozen=True)
class Finding:
    """What verification said of one mutant.

    Attributes:
        by: ``outputs`` (their numbers), ``weights`` (their numbers, read from the file),
            ``inspection`` (operators, constants, names, description), ``refused`` (the
            reader or the runtime takes no such file), or None: it was missed.
        said: the report's reason.
        ran: whether the runtime loaded the file and gave results.
    """

    mutant: Mutant
    by: str | None
    said: str
    ran: bool = False


def here() -> list[str]:
    """Return the formats that can be made on this machine."""
    return [name for name in FORMATS if TARGETS.get(name).probe().converts]


def shared_bundle(base: Path, family: str = "plain") -> Path:
    """Convert a family's model to all its formats once a test session; read only.

    Args:
        base: :func:`once.session_folder`.
    """
    made = once(base, f"mutants-{family}", lambda folder: make_bundle(folder, family))
    return made / "bundle"


def make_bundle(folder: Path, family: str = "plain") -> Path:
    """Convert the model into ``folder/bundle``."""
    (folder / "mutant_model.py").write_text(MODEL)
    recipe = folder / "mutants.yaml"
    recipe.write_text(FAMILIES[family])
    names = [t for t in here() if f"\n  {t}: {{" in FAMILIES[family]]
    with converted_here(), mock.patch.object(streaming, "DRIFT_STEPS", 128):
        out = folder / "bundle"
        return pipeline.convert(recipe, targets=names, out=out, verify=False, bench=False).bundle


def artifact_of(bundle: Path, name: str) -> Artifact:
    return Bundle.open(bundle).artifacts()[name]


def judge(bundle: Path, name: str) -> ParityReport:
    """Verify one artifact as the command does, its hash and the manifest's file table unread."""
    opened = Bundle.open(bundle)
    artifacts = {name: opened.artifacts()[name]}
    return verify_all(
        artifacts, opened.manifest, opened.path, 1, SILENT, check_hash=False, samples=SAMPLES
    )[name]


def damaged(bundle: Path, mutant: Mutant, folder: Path) -> Path:
    """Return a copy of the bundle with the mutant in it, shown to be another file."""
    copy = Path(shutil.copytree(bundle, folder / "damaged"))
    path = copy if mutant.whole else artifact_of(copy, mutant.format).path
    before = sha256_tree(path)
    mutant.apply(path)
    assert sha256_tree(path) != before, f"{mutant} changed nothing"
    return copy


def examine(bundle: Path, mutant: Mutant, folder: Path) -> Finding:
    """Damage a copy and say what verification finds."""
    copy = damaged(bundle, mutant, folder)
    try:
        report = judge(copy, mutant.format)
    except BundleError as error:
        return Finding(mutant, "refused", error.message)
    return Finding(mutant, found_by(report), report.reason or "", bool(report.cases))


def found_by(report: ParityReport) -> str | None:
    """Return what exposed an artifact: the strongest evidence counts."""
    if report.verdict is not Verdict.FAIL:
        return None
    broken = any(c.violation(report.tolerance) for c in report.cases)
    accuracy = report.accuracy is not None and report.accuracy.violation(report.tolerance)
    if broken or accuracy:
        return "outputs"
    if any("weight " in m for m in report.mismatches):
        return "weights"
    return "refused" if report.failure is not None else "inspection"


def score_table(findings: Iterable[Finding]) -> str:
    """Return caught / all by kind and format, and how, as a Markdown table."""
    cells: dict[str, Counter[str]] = {}
    every: Counter[str] = Counter()
    how: dict[str, Counter[str]] = {}
    for found in findings:
        kind, target = found.mutant.kind, found.mutant.format
        for row in (kind, "all"):
            counts = cells.setdefault(row, Counter())
            counts[f"{target} all"] += 1
            counts[f"{target} caught"] += found.by is not None
            how.setdefault(row, Counter())[found.by or "missed"] += 1
        every[kind] += 1
    lines = ["| kind | " + " | ".join(FORMATS) + " | caught by |", "|---|" + "---|" * 5]
    for kind in (*sorted(every), "all"):
        counts = cells[kind]
        row = [
            f"{counts[f'{t} caught']}/{counts[f'{t} all']}" if counts[f"{t} all"] else "–"
            for t in FORMATS
        ]
        means = ", ".join(f"{n} {by}" for by, n in how[kind].most_common())
        lines.append(f"| {kind} | " + " | ".join(row) + f" | {means} |")
    return "\n".join(lines)


# What is done to the values of one weight tensor, whatever the format.


def _typical(values: np.ndarray) -> int:
    """Return the place of the value whose magnitude is the median: neither large nor zero."""
    return int(np.argsort(np.abs(values).ravel())[values.size // 2])


def one(change: Callable[[np.float32], float]) -> Damage:
    """Change the typical weight alone."""

    def damage(values: np.ndarray) -> np.ndarray:
        result = values.copy()
        place = np.unravel_index(_typical(values), values.shape)
        result[place] = change(values[place])
        return result

    return damage


def bit(number: int) -> Damage:
    """Flip one bit (31 is the sign, 23 to 30 the exponent) of the typical weight."""

    def change(value: np.float32) -> float:
        bits = np.array([value], dtype=np.float32).view(np.uint32)
        return float((bits ^ np.uint32(1 << number)).view(np.float32)[0])

    return one(change)


def zero_row(values: np.ndarray) -> np.ndarray:
    result = values.copy()
    result[len(values) // 2] = 0
    return result


def swap_rows(values: np.ndarray) -> np.ndarray:
    result = values.copy()
    result[[0, 1]] = values[[1, 0]]
    return result


def as_fp16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def int8_of(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Return int8 values and their scale, symmetric, one scale a tensor."""
    scale = np.float32(np.abs(values).max() / 127)
    return np.round(values / scale).astype(np.int8), scale


def as_int8(values: np.ndarray) -> np.ndarray:
    quantised, scale = int8_of(values)
    return quantised.astype(np.float32) * scale


WEIGHT_DAMAGES: Mapping[str, tuple[str, str, Damage]] = {
    # name -> kind, which tensor (see ``roles``), what is done
    "sign of one weight, first layer": ("weight flipped", "first", bit(31)),
    "sign of one weight, attention": ("weight flipped", "middle", bit(31)),
    "sign of one weight, head": ("weight flipped", "last", bit(31)),
    "sign of one bias": ("weight flipped", "bias", bit(31)),
    "sign of a norm's weight": ("weight flipped", "norm", bit(31)),
    "lowest exponent bit": ("weight flipped", "middle", bit(23)),
    "highest exponent bit": ("weight flipped", "middle", bit(30)),
    "highest mantissa bit": ("weight flipped", "first", bit(22)),
    "mantissa bit 18": ("weight flipped", "middle", bit(18)),
    "one tensor by 1.001": ("weight scaled", "middle", lambda v: v * np.float32(1.001)),
    "one tensor by 0.5": ("weight scaled", "first", lambda v: v * np.float32(0.5)),
    "one weight by 1.05": ("weight scaled", "last", one(lambda v: float(v) * 1.05)),
    "a norm's weights by 1.01": ("weight scaled", "norm", lambda v: v * np.float32(1.01)),
    "one weight": ("weight zeroed", "middle", one(lambda v: 0.0)),
    "one row": ("weight zeroed", "first", zero_row),
    "a whole bias": ("weight zeroed", "bias", np.zeros_like),
    "a whole tensor": ("weight zeroed", "last", np.zeros_like),
    "two rows swapped": ("weights moved", "middle", swap_rows),
    "rolled by one": ("weights moved", "first", lambda v: np.roll(v, 1)),
    "values of fp16, first layer": ("layer made fp16", "first", as_fp16),
    "values of fp16, attention": ("layer made fp16", "middle", as_fp16),
    "values of fp16, head": ("layer made fp16", "last", as_fp16),
    "values of int8, first layer": ("layer made int8", "first", as_int8),
    "values of int8, attention": ("layer made int8", "middle", as_int8),
    "values of int8, head": ("layer made int8", "last", as_int8),
}


def find_tensor(tensors: Mapping[str, np.ndarray], layer: np.ndarray) -> str:
    """Return the name of the tensor that holds a layer's matrix, in either order of its axes."""
    for name, values in tensors.items():
        for turned in (layer, layer.T):
            if values.shape == turned.shape and np.array_equal(values, turned):
                return name
    raise AssertionError("the file holds no such matrix")


def roles(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Choose the tensors that are damaged, from those of a file in their order.

    Returns:
        ``first``, ``middle``, ``last`` (matrices), ``bias`` and ``norm`` (vectors) -> name.
    """
    matrices = [n for n, v in tensors.items() if v.ndim == 2 and min(v.shape) > 1]
    vectors = [n for n, v in tensors.items() if v.ndim == 1 and v.size > 8]
    norms = [n for n in vectors if abs(float(tensors[n].mean()) - 1) < 0.3]
    biases = [n for n in vectors if n not in norms]
    middle = matrices[len(matrices) // 3]
    return {
        "first": matrices[0],
        "middle": middle,
        "last": matrices[-1],
        "bias": biases[len(biases) // 2],
        "norm": norms[0],
    }
