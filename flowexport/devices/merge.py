"""`flowexport report merge`: device reports and bundles into one comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowexport import __version__
from flowexport.bundle import Bundle, Staging, output_errors, write_json
from flowexport.core.errors import BundleError, InputError, VerificationError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Verdict
from flowexport.devices.desktop import judge_bundle
from flowexport.devices.difference import NOTE, compare_merges, read_merge
from flowexport.devices.judge import judge_report
from flowexport.devices.reading import MERGE_SCHEMA, read_device_report
from flowexport.devices.references import collect
from flowexport.devices.rows import KEY, Row
from flowexport.report.schema import validate

FILES = ("merge.json", "comparison.html", "comparison.md", "comparison.csv")


@dataclass(frozen=True)
class MergeResult:
    """A written comparison.

    Attributes:
        path: its folder.
        document: of ``merge.json``.
    """

    path: Path
    document: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.document["verdict"])

    @property
    def worse(self) -> list[Mapping[str, Any]]:
        """Entries of the difference that became worse."""
        difference = self.document["difference"]
        return [e for e in difference["entries"] if e["change"] == "worse"] if difference else []


def merge_reports(
    reports: Sequence[str | Path],
    out: str | Path,
    *,
    packages: Sequence[str | Path] = (),
    bundles: Sequence[str | Path] = (),
    against: str | Path | None = None,
    force: bool = False,
) -> MergeResult:
    """Compare devices; every statistic and verdict is computed from raw data.

    Args:
        reports: ``flowexport.report/1`` files; also a bundle or its report.json, as desktop rows.
        out: the comparison's folder.
        packages, bundles: whose goldens, evaluation sets and hashes the reports are held
            against; a bundle among ``reports`` serves as well.
        against: an earlier ``merge.json``, or its folder.
        force: replace an older comparison in ``out``.

    Returns:
        The comparison. A device that failed is FAIL in it, not an exception.

    Raises:
        BundleError: an input is of no known schema, or damaged.
        InputError: no report, one given twice, or a run of an unknown model.
        OutputError: ``out`` holds something else.
        VerificationError: a run of another model file than the reference's.
    """
    if not reports:
        raise InputError("merge: 0 reports were given; expected at least one.")
    inputs = [_Input.find(Path(r)) for r in reports]
    _refuse_twice(inputs)
    earlier = None if against is None else read_merge(Path(against))
    own = [i.bundle for i in inputs if i.bundle is not None]
    others = [b for b in map(Path, bundles) if b.resolve() not in {o.resolve() for o in own}]
    references = collect([Path(p) for p in packages], [*own, *others])
    rows: list[Row] = []
    described = []
    for given in inputs:
        if given.bundle is not None:
            found = judge_bundle(given.bundle, references)
        else:
            found = judge_report(read_device_report(given.file), given.file.name, references)
        described.append(given.to_json(len(found)))
        rows += found
    if not rows:
        raise InputError("merge: the reports hold 0 runs; expected at least one.")
    _same_files(rows)
    rows = _numbered(rows)
    document = _document(rows, described, earlier, against)
    validate(document, "merge")
    with (
        Staging(Path(out), force=force, kind="comparison", opener=read_merge) as staging,
        output_errors(staging.out),
    ):
        _write(staging.path, document, rows)
        place = staging.commit()
    return MergeResult(place, document, tuple(rows))


@dataclass(frozen=True)
class _Input:
    file: Path
    bundle: Path | None

    @classmethod
    def find(cls, path: Path) -> _Input:
        if path.is_dir():
            Bundle.open(path)
            return cls(path / "report.json", path)
        if path.name == "report.json" and (path.parent / "manifest.json").is_file():
            try:
                Bundle.open(path.parent)
            except BundleError:
                return cls(path, None)
            return cls(path, path.parent)
        return cls(path, None)

    def to_json(self, runs: int) -> dict[str, Any]:
        name = f"{self.bundle.resolve().name}/report.json" if self.bundle else self.file.name
        return {
            "name": name,
            "kind": "bundle" if self.bundle else "device",
            "sha256": sha256_file(self.file),
            "runs": runs,
        }


def _refuse_twice(inputs: Sequence[_Input]) -> None:
    seen: dict[str, Path] = {}
    for given in inputs:
        if not given.file.is_file():
            raise BundleError(
                f"report {given.file}: does not exist; expected a file or a bundle.",
                fix="flowexport verify BUNDLE --save writes a bundle's report",
            )
        digest = sha256_file(given.file)
        if digest in seen:
            raise InputError(
                f"merge {given.file}: has the content of {seen[digest]}; expected each report once."
            )
        seen[digest] = given.file


def _same_files(rows: Sequence[Row]) -> None:
    """Refuse runs of different files under one name where no reference has told them apart."""
    seen: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.model_sha256 is None:
            continue
        key = (str(row.key["model"]), str(row.key["format"]))
        first = seen.setdefault(key, row)
        if first.model_sha256 != row.model_sha256:
            raise VerificationError(
                f"merge {row.source}: {' '.join(key)} ran a file of sha256"
                f" {row.model_sha256[:12]}…; expected {str(first.model_sha256)[:12]}… as in"
                f" {first.source}.",
                fix="measure all devices with one package",
            )


def _numbered(rows: Sequence[Row]) -> list[Row]:
    """Tell repetitions of one setting apart by a number, in order."""
    counts: dict[tuple[Any, ...], int] = {}
    numbered = []
    for row in rows:
        identity = tuple(row.key[k] for k in KEY)
        counts[identity] = counts.get(identity, 0) + 1
        numbered.append(replace(row, key={**row.key, "repetition": counts[identity]}))
    return numbered


def _document(
    rows: Sequence[Row],
    inputs: Sequence[Mapping[str, Any]],
    earlier: Mapping[str, Any] | None,
    against: str | Path | None,
) -> dict[str, Any]:
    verdicts = {r.verdict for r in rows}
    overall = Verdict.NOT_RUN
    if Verdict.FAIL in verdicts:
        overall = Verdict.FAIL
    elif Verdict.PASS in verdicts:
        overall = Verdict.PASS
    difference = None
    if earlier is not None:
        difference = {
            "against": {"name": _name(Path(str(against))), "generated": earlier["generated"]},
            "rule": NOTE,
            "entries": compare_merges(rows, earlier),
        }
    return {
        "schema": MERGE_SCHEMA,
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "flowexport": __version__,
        "verdict": overall.value,
        "inputs": list(inputs),
        "rows": [r.to_json() for r in rows],
        "difference": difference,
    }


def _name(against: Path) -> str:
    place = against.resolve()
    return place.name if place.is_dir() else f"{place.parent.name}/{place.name}"


def _write(folder: Path, document: Mapping[str, Any], rows: Sequence[Row]) -> None:
    from flowexport.devices.tables import to_csv, to_markdown
    from flowexport.devices.view import render_comparison

    write_json(folder / "merge.json", document)
    (folder / "comparison.html").write_text(render_comparison(document), encoding="utf-8")
    (folder / "comparison.md").write_text(to_markdown(document), encoding="utf-8")
    (folder / "comparison.csv").write_text(to_csv(document), encoding="utf-8", newline="")
