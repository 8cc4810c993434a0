"""Verification that cannot be fooled: every damaged artifact must be found, hashes unread.

``python runtime_tests/test_mutants.py`` prints the score by kind and format.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import mutants_bundle
import mutants_coreml
import mutants_families
import mutants_onnx
import mutants_tensorrt
import mutants_tflite
import pytest
from mutants import (
    FORMATS,
    Finding,
    Mutant,
    artifact_of,
    examine,
    here,
    judge,
    score_table,
    shared_bundle,
)
from once import session_folder

from flowexport.core.errors import UnavailableError
from flowexport.core.types import Verdict
from flowexport.registry import TARGETS

pytestmark = pytest.mark.slow

OWN = {
    "onnx": mutants_onnx,
    "tflite": mutants_tflite,
    "coreml": mutants_coreml,
    "tensorrt": mutants_tensorrt,
}
MUTANTS = [
    *(m for module in OWN.values() for m in module.mutants_of()),
    *mutants_bundle.mutants_of(),
    *mutants_families.mutants_of(),
]
AT_LEAST = 100

BY_READING = {
    # name -> why no number tells; the file's constants or operators do.
    "lower bound to -0.9": "equivalent: the flow is a sum of products of sigmoids and of ε > 0,"
    " so that a bound below 0 is never reached, whatever the input",
    "attention nodes by plain operators": "equivalent: the functions' own bodies in their place",
    "the attentions', 1e-6 to 0": "below the tolerance: 3e-6 of the largest output at most",
    "sum by difference": "below the tolerance: the term with the other sign is ε = 1e-6",
    "ReLU by ReLU6": "equal on every case: no pooled feature exceeds 6, though one could",
}
NUMERIC = ("weight", "layer", "ε", "clamp", "axis", "operator", "outputs")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda family: shared_bundle(session_folder(tmp_path_factory), family)


@pytest.fixture(scope="module")
def findings() -> Iterator[list[Finding]]:
    """Collect what the module's tests found, and print the score behind them."""
    found: list[Finding] = []
    yield found
    print("\n" + score_table(found))


def test_there_are_enough_mutants_and_no_two_alike() -> None:
    assert len(MUTANTS) >= AT_LEAST
    assert len({str(m) for m in MUTANTS}) == len(MUTANTS)
    kinds = {m.kind for m in MUTANTS}
    for target in FORMATS:
        assert {m.kind for m in MUTANTS if m.format == target} <= kinds
        assert sum(m.format == target for m in MUTANTS) >= AT_LEAST // len(FORMATS)


@pytest.mark.parametrize(("family", "name"), sorted({(m.family, m.format) for m in MUTANTS}))
def test_the_undamaged_artifact_passes_under_the_same_judge(
    bundles: Callable[[str], Path], family: str, name: str
) -> None:
    if name not in here():
        pytest.skip(f"{name}: {TARGETS.get(name).probe().reason}")
    report = judge(bundles(family), name)
    runs = TARGETS.get(name).probe().runs
    assert report.verdict is (Verdict.PASS if runs else Verdict.NOT_RUN), report.reason
    assert report.mismatches == () and report.failure is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(
    bundles: Callable[[str], Path], mutant: Mutant, tmp_path: Path, findings: list[Finding]
) -> None:
    if mutant.format not in here():
        pytest.skip(f"{mutant.format}: {TARGETS.get(mutant.format).probe().reason}")
    found = examine(bundles(mutant.family), mutant, tmp_path)
    findings.append(found)
    assert found.by is not None, f"{mutant} was missed"
    if mutant.loads and not found.ran:
        _loads(tmp_path / "damaged", mutant)
    if mutant.family != "plain":
        return  # a tolerance of few bits hides what the stored numbers tell
    if mutant.kind.startswith(NUMERIC) and mutant.format != "tensorrt":
        assert found.by == "outputs" or mutant.name in BY_READING, found.said
    if mutant.kind in ("weight flipped", "weight zeroed", "weights moved", "layer made int8"):
        expected = "weights" if mutant.format == "tensorrt" else "outputs"
        assert found.by == expected, found.said


def _loads(bundle: Path, mutant: Mutant) -> None:
    """Require that the damaged file is one that its reader still takes."""
    target, artifact = TARGETS.get(mutant.format), artifact_of(bundle, mutant.format)
    target.inspect(artifact.path)
    try:
        target.load(artifact).close()
    except UnavailableError:
        assert not target.probe().runs


def main() -> int:
    """Print every mutant that was missed, and the score."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found = []
        for number, mutant in enumerate(m for m in MUTANTS if m.format in here()):
            place = root / str(number)
            place.mkdir()
            found.append(examine(shared_bundle(root, mutant.family), mutant, place))
            print(f"{found[-1].by or 'MISSED':10} {mutant}: {found[-1].said}", file=sys.stderr)
    print(score_table(found))
    return sum(f.by is None for f in found)


if __name__ == "__main__":
    sys.exit(main())
