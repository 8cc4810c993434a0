"""Makes a package of bundles: models, golden vectors, evaluation sets, one manifest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport import __version__
from flowexport.bundle import Bundle, Staging, file_table, output_errors, write_json
from flowexport.core.errors import InputError, UnknownNameError, VerificationError
from flowexport.core.hashing import sha256_tree
from flowexport.core.reports import ParityReport, Tolerance
from flowexport.core.types import STEP, Artifact, Verdict
from flowexport.evidence import check_files, references
from flowexport.package.binary import Binary, file_entry
from flowexport.package.preprocessing import MAX_ABS, REASON, golden_samples, make_inputs
from flowexport.package.read import MANIFEST, SCHEMA, Package, check_manifest
from flowexport.report import read_report

if TYPE_CHECKING:
    from flowexport.parity import Evaluation, Golden

CLIENTS: Mapping[str, tuple[str, ...]] = {
    "web": ("onnx", "tflite"),
    "android": ("onnx", "tflite"),
    "ios": ("coreml", "onnx", "tflite"),
}
"""Client -> the targets that it has a runtime for."""

EVALUATION_BYTES = 2 << 20
"""Inputs of an evaluation set that are shipped whole without being asked for."""


@dataclass(frozen=True)
class PackageResult:
    """A finished package, and what of the bundles did not go into it.

    Attributes:
        left_out: bundle's name -> its targets that the client cannot run.
    """

    path: Path
    manifest: Mapping[str, Any]
    left_out: Mapping[str, tuple[str, ...]]


def make_package(
    bundles: Sequence[str | Path],
    out: str | Path,
    *,
    client: str = "web",
    samples: int | None = None,
    force: bool = False,
) -> PackageResult:
    """Make a package of bundles for one kind of client.

    Args:
        bundles: folders made by ``flowexport convert``, of different names.
        out: the package's folder.
        client: one of :data:`CLIENTS`.
        samples: of each evaluation set; None: all, or as many as fit into 2 MiB.
        force: replace an older package there.

    Raises:
        BundleError: a path is no bundle, or a file in it was changed.
        InputError: no bundle, two of one name, or none of its targets suits the client.
        OutputError: ``out`` holds something else.
        UnknownNameError: no such client.
        VerificationError: an artifact failed its verification, or is not what was verified.
    """
    if client not in CLIENTS:
        raise UnknownNameError("client", client, CLIENTS)
    if not bundles:
        raise InputError("package: 0 bundles were given; expected at least one.")
    if samples is not None and samples < 1:
        raise InputError(f"package: samples has {samples}; expected 1 or more.")
    opened = [Bundle.open(Path(b)) for b in bundles]
    ids = [model_id(b.manifest) for b in opened]
    for name in ids:
        if ids.count(name) > 1:
            raise InputError(
                f"package: {ids.count(name)} bundles are called {name!r}; expected different names."
            )
    for bundle in opened:
        check_files(bundle)
    with (
        Staging(Path(out), force=force, kind="package", opener=_is_package) as staging,
        output_errors(staging.out),
    ):
        root = staging.path
        models = [
            _Model(b, name, CLIENTS[client], samples, root).write()
            for b, name in zip(opened, ids, strict=True)
        ]
        manifest = {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "flowexport": __version__,
            "client": client,
            "models": models,
            "files": file_table(root),
        }
        check_manifest(manifest, "package")
        write_json(root / MANIFEST, manifest)
        place = staging.commit()
    left_out = {
        name: tuple(t for t in b.manifest["targets"] if t not in CLIENTS[client])
        for b, name in zip(opened, ids, strict=True)
    }
    return PackageResult(place, manifest, {n: t for n, t in left_out.items() if t})


def model_id(manifest: Mapping[str, Any]) -> str:
    """Return the id that a bundle's model has in packages and device reports."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(manifest["name"])).lstrip("-.") or "model"


def choose_samples(targets: np.ndarray, count: int) -> np.ndarray:
    """Return sorted indices of ``count`` samples: the classes take turns, first ones first."""
    ranks = np.zeros(len(targets), dtype=np.int64)
    for value in np.unique(targets):
        members = np.flatnonzero(targets == value)
        ranks[members] = np.arange(len(members))
    return np.sort(np.lexsort((targets, ranks))[:count])


def _is_package(path: Path) -> None:
    """Raise BundleError unless this looks like any package, also a damaged one."""
    Package.open(path, check_files=False, check_schema=False)


class _Model:
    """One bundle's part of a package."""

    def __init__(
        self, bundle: Bundle, name: str, formats: tuple[str, ...], samples: int | None, root: Path
    ) -> None:
        self.bundle, self.name, self.root, self.samples = bundle, name, root, samples
        self.where = f"package {name}"
        self.folder = root / "models" / name
        self.artifacts = {f: a for f, a in bundle.artifacts().items() if f in formats}
        if not self.artifacts:
            raise InputError(
                f"{self.where}: has targets {', '.join(bundle.manifest['targets']) or 'none'};"
                f" expected one of: {', '.join(formats)}.",
                fix=f"flowexport convert {name} --target {formats[0]}",
            )
        for target, artifact in self.artifacts.items():
            if "image" in artifact.details:  # its ends are an app's own, not the golden cases'
                raise InputError(
                    f"{self.where}: the {target} file takes the image in another layout or as 8-bit"
                    " pixels; expected the model's own tensors, which the demos feed.",
                    fix="convert without layout, input_dtype and image",
                )

    def write(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        parity, _ = read_report(self.bundle.path)
        for target, artifact in self.artifacts.items():
            self._require_sound(target, artifact, parity.get(target))
        self.folder.mkdir(parents=True)
        golden, evaluation = references(self.bundle.path, manifest)
        binary = Binary(self.folder / "golden.bin", self.root)
        cases = _golden_cases(golden, binary)
        sources = self._sources(binary)
        files = {t: self._file(t, a, parity.get(t)) for t, a in self.artifacts.items()}
        about = {k: v for k, v in manifest["preprocessing"].items() if k != "sources"}
        return {
            "id": self.name,
            "name": manifest["model"]["name"],
            "task": _task(manifest),
            "description": manifest["description"] or manifest["model"]["description"],
            "paper": manifest["model"]["paper"],
            "parameters": manifest["model"]["parameters"],
            "recipe_sha256": manifest["recipe_sha256"],
            "inputs": manifest["inputs"],
            "outputs": manifest["outputs"],
            "labels": manifest["labels"],
            "preprocessing": {"about": about, "sources": sources},
            "files": files,
            "golden": {"file": binary.write(), "cases": cases},
            "evaluation": None if evaluation is None else self._evaluation(evaluation),
            "streaming": self._streaming(files),
        }

    def _require_sound(self, target: str, artifact: Artifact, report: ParityReport | None) -> None:
        self._require_bytes(artifact.path, artifact.sha256)
        if report is None or report.verdict is Verdict.NOT_RUN:
            return
        reason = report.reason
        if report.verdict is Verdict.PASS and report.artifact_sha256 != artifact.sha256:
            reason = "the report is on another file"
        if reason is not None:
            raise VerificationError(
                f"{self.where}: {target} failed its verification ({reason}); expected PASS, or"
                " NOT_RUN where the bundle was made.",
                fix=f"flowexport verify {self.bundle.path} --save shows all; convert again",
            )

    def _require_bytes(self, path: Path, sha256: str) -> None:
        actual = sha256_tree(path) if path.exists() else None
        if actual != sha256:
            state = "is missing" if actual is None else f"has sha256 {actual[:12]}…"
            raise VerificationError(
                f"{self.where}: {path.name} {state}; expected {sha256[:12]}….",
                fix="convert again; a bundle is not edited by hand",
            )

    def _file(self, target: str, artifact: Artifact, report: ParityReport | None) -> dict[str, Any]:
        place, parts = self._ship(artifact.path, target)
        tolerance = Tolerance.from_json(self.bundle.manifest["targets"][target]["tolerance"])
        found = report if report is not None and report.verdict is Verdict.PASS else None
        clipping = artifact.details.get("clipping", {})
        return {
            "path": place.relative_to(self.root).as_posix(),
            "sha256": artifact.sha256,
            "size_bytes": artifact.size_bytes,
            "parts": parts,
            "precision": artifact.precision.value,
            "inputs": [s.to_json() for s in artifact.inputs],
            "outputs": [s.to_json() for s in artifact.outputs],
            "fusions": dict(artifact.fusions),
            "tolerance": tolerance.to_json(),
            **({"clipping": clipping} if clipping else {}),
            "verification": {
                "verdict": (Verdict.PASS if found else Verdict.NOT_RUN).value,
                "runtime": found.runtime_label if found else None,
                "max_abs": found.max_abs if found else None,
                "max_rel": found.max_rel if found else None,
                "accuracy": found.accuracy.accuracy if found and found.accuracy else None,
            },
        }

    def _ship(self, path: Path, target: str, function: str = "") -> tuple[Path, Any]:
        """Copy a model into the package; return its place, and a folder's files."""
        stem = f"{self.name}{'.' if function else ''}{function}"
        place = self.folder / f"{stem}{path.suffix}"
        if place.exists():  # two targets may write one kind of file
            place = self.folder / f"{stem}.{target}{path.suffix}"
        if not path.is_dir():
            shutil.copyfile(path, place)
            return place, None
        shutil.copytree(path, place)
        files = sorted(p for p in place.rglob("*") if p.is_file())
        return place, [file_entry(p, self.root) for p in files]

    def _streaming(self, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """Describe a causal model's step, where the artifacts hold one."""
        steps = {t: a.functions[STEP] for t, a in self.artifacts.items() if STEP in a.functions}
        if not steps:
            return None
        entries = {}
        for target, step in steps.items():
            artifact = self.artifacts[target]
            self._require_bytes(step.path, step.sha256)
            if step.path == artifact.path:
                place, parts = files[target]["path"], files[target]["parts"]
            else:
                copied, parts = self._ship(step.path, target, STEP)
                place = copied.relative_to(self.root).as_posix()
            entries[target] = {
                "path": place,
                "sha256": step.sha256,
                "size_bytes": step.size_bytes,
                "parts": parts,
                "entry": STEP if step.path == artifact.path else None,
                "inputs": [s.to_json() for s in step.inputs],
                "outputs": [s.to_json() for s in step.outputs],
            }
        first = next(iter(steps.values()))
        reset = self._reset([s.name for s in first.state_specs])
        return {
            "files": entries,
            "inputs": [s.to_json() for s in first.inputs if s.name not in first.state],
            "outputs": [s.to_json() for s in first.outputs if s.name not in first.state.values()],
            "states": [
                {
                    "name": s.name,
                    "next": first.state[s.name],
                    "shape": list(s.static(batch=1).shape),
                    "dtype": s.dtype,
                    "initial": reset[s.name],
                }
                for s in first.state_specs
            ],
        }

    def _reset(self, names: Sequence[str]) -> dict[str, float]:
        """Return the one value of each state before the first step, as the bundle saved it."""
        from flowexport.parity import read_state

        saved = read_state(self.bundle.path / self.bundle.manifest["streaming"]["reset"]).values
        values = {}
        for name in names:
            if name not in saved or len(np.unique(saved[name])) != 1:
                found = "missing" if name not in saved else "several values"
                raise InputError(
                    f"{self.where}: reset state {name} has {found}; expected one value, with"
                    " which clients fill it."
                )
            values[name] = float(saved[name].flat[0])
        return values

    def _sources(self, binary: Binary) -> list[dict[str, Any]]:
        dtypes = {s["name"]: s["dtype"] for s in self.bundle.manifest["inputs"]}
        sources = []
        for source in self.bundle.manifest["preprocessing"].get("sources", ()):
            if set(source["inputs"]) != set(dtypes):
                raise InputError(
                    f"{self.where}: preprocessing source {source['name']} makes"
                    f" {sorted(source['inputs'])}; expected {sorted(dtypes)}."
                )
            cases = []
            for name, raw in golden_samples(source).items():
                inputs = make_inputs(source, raw, dtypes)
                entry = binary.add("raw", raw)
                cases.append({"name": name, "raw": entry, "inputs": binary.add_all(inputs)})
            golden = {"max_abs": MAX_ABS, "reason": REASON, "cases": cases}
            sources.append({**source, "golden": golden})
        return sources

    def _evaluation(self, evaluation: Evaluation) -> dict[str, Any]:
        dataset = evaluation.dataset
        total = len(dataset)
        size = sum(v.nbytes for v in dataset.inputs.values())
        fitting = max(1, total * EVALUATION_BYTES // max(size, 1))
        chosen = choose_samples(dataset.targets, min(total, self.samples or fitting))
        binary = Binary(self.folder / "evaluation.bin", self.root)
        inputs = binary.add_all({n: v[chosen] for n, v in dataset.inputs.items()})
        top1 = evaluation.reference_logits.argmax(axis=1)[chosen]
        targets = binary.add("targets", dataset.targets[chosen].astype(np.int32))
        reference = binary.add("reference_top1", top1.astype(np.int32))
        steps = getattr(dataset, "lengths", None)
        lengths = None if steps is None else binary.add("lengths", steps[chosen].astype(np.int32))
        return {
            "file": binary.write(),
            "name": dataset.name,
            "attribution": dataset.attribution,
            "samples": len(chosen),
            "of_samples": total,
            "output": evaluation.output,
            "inputs": inputs,
            "targets": targets,
            "reference_top1": reference,
            "lengths": lengths,
        }


def _golden_cases(golden: Golden, binary: Binary) -> list[dict[str, Any]]:
    return [
        {
            "name": case,
            "batch": len(next(iter(feeds.values()))),
            "inputs": binary.add_all(feeds),
            "outputs": binary.add_all(golden.expected[case]),
        }
        for case, feeds in golden.cases.items()
    ]


def _task(manifest: Mapping[str, Any]) -> str:
    if not manifest["labels"]:
        return "other"
    ranks = [len(s["shape"]) for s in manifest["inputs"]]
    if ranks == [4]:
        return "image-classification"
    return "time-series-classification" if ranks[:1] == [3] else "other"
