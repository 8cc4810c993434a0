"""A package, opened as a client opens it: schema first, then every hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from flowexport.core.errors import BundleError
from flowexport.core.hashing import sha256_file, sha256_tree
from flowexport.package.binary import read_tensor
from flowexport.report.schema import check_document

SCHEMA = "flowexport.package/1"
MANIFEST = "manifest.json"
FIX = "`flowexport package BUNDLE --out DIR` makes a package"


@cache
def package_schema() -> dict[str, Any]:
    """Return the published schema of a package's manifest."""
    path = Path(__file__).parent / "schemas" / "package.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def check_manifest(manifest: Any, where: str, *, whole: bool = True) -> None:
    """Raise BundleError unless a manifest has the schema's name and, ``whole``, follows it."""
    found = manifest.get("schema") if isinstance(manifest, Mapping) else None
    if found != SCHEMA:
        raise BundleError(f"{where}: schema is {found!r}; expected {SCHEMA!r}.", fix=FIX)
    if whole:
        check_document(manifest, package_schema(), where)


@dataclass(frozen=True)
class Package:
    """A finished package.

    Attributes:
        path: the folder.
        manifest: its ``manifest.json``.
        sha256: of that file; device reports name it.
    """

    path: Path
    manifest: Mapping[str, Any]
    sha256: str

    @classmethod
    def open(cls, path: Path, *, check_files: bool = True, check_schema: bool = True) -> Self:
        """Read a package.

        Args:
            check_files: hold every file against its hash, too.
            check_schema: False: only the schema's name must be right.

        Raises:
            BundleError: no package, of another schema, or a file is missing or changed.
        """
        file = path / MANIFEST
        if not file.is_file():
            raise BundleError(
                f"package {path}: holds no {MANIFEST}; expected a folder made by"
                " `flowexport package`.",
                fix=FIX,
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"package {file}: cannot be read ({error}).", fix=FIX) from error
        check_manifest(manifest, f"package {file}", whole=check_schema)
        package = cls(path.resolve(), manifest, sha256_file(file))
        if check_files:
            package.check()
        return package

    def check(self) -> None:
        """Raise BundleError where a file is missing, changed or outside the package."""
        for name, entry in self.manifest["files"].items():
            path = self.path / name
            if not path.resolve().is_relative_to(self.path):
                raise BundleError(f"package {self.path}: {name} is outside; expected inside.")
            self._hold(name, sha256_file(path) if path.is_file() else None, entry["sha256"])
        for model in self.manifest["models"]:
            steps = model["streaming"]["files"].values() if model["streaming"] else ()
            for entry in (*model["files"].values(), *steps):
                self._hold(entry["path"], sha256_tree(self.path / entry["path"]), entry["sha256"])
            for part in ("golden", "evaluation"):
                if model[part] is not None:
                    file = model[part]["file"]
                    listed = self.manifest["files"].get(file["path"], {}).get("sha256")
                    self._hold(file["path"], listed, file["sha256"])

    def _hold(self, name: str, actual: str | None, expected: str) -> None:
        if actual != expected:
            state = "is missing" if actual is None else f"has sha256 {actual[:12]}…"
            raise BundleError(
                f"package {self.path}: {name} {state}; expected {expected[:12]}….",
                fix="package again; a package is not edited by hand",
            )

    def model(self, name: str) -> Mapping[str, Any] | None:
        """Return the entry of a model id, or None."""
        return next((m for m in self.manifest["models"] if m["id"] == name), None)

    def golden(
        self, model: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
        """Return inputs and expected outputs: case -> name -> array."""
        data, where = self._read(model["golden"]["file"]), f"package {self.path}: golden"
        inputs, outputs = (
            {
                case["name"]: {t["name"]: read_tensor(data, t, where) for t in case[kind]}
                for case in model["golden"]["cases"]
            }
            for kind in ("inputs", "outputs")
        )
        return inputs, outputs

    def evaluation(self, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return ``targets``, ``reference_top1`` and ``input/<name>`` of the evaluation set."""
        entry = model["evaluation"]
        data, where = self._read(entry["file"]), f"package {self.path}: evaluation"
        tensors = {k: read_tensor(data, entry[k], where) for k in ("targets", "reference_top1")}
        for tensor in entry["inputs"]:
            tensors[f"input/{tensor['name']}"] = read_tensor(data, tensor, where)
        return tensors

    def preprocessing(
        self, model: Mapping[str, Any]
    ) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """Return the expected inputs: (source, case) -> input -> array; ``raw`` is among them."""
        data, where = self._read(model["golden"]["file"]), f"package {self.path}: preprocessing"
        return {
            (source["name"], case["name"]): {
                "raw": read_tensor(data, case["raw"], where),
                **{f"input/{t['name']}": read_tensor(data, t, where) for t in case["inputs"]},
            }
            for source in model["preprocessing"]["sources"]
            for case in source["golden"]["cases"]
        }

    def _read(self, entry: Mapping[str, Any]) -> bytes:
        return (self.path / entry["path"]).read_bytes()
