"""The Core ML target: one ML Program package, batch 1."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowexport.core.errors import ConversionError, InputError, UnavailableError
from flowexport.core.hashing import sha256_tree, size_tree
from flowexport.core.toolchain import installed_versions
from flowexport.core.types import (
    Artifact,
    Availability,
    Function,
    Options,
    Precision,
    Session,
    TensorSpec,
)
from flowexport.lowering import LoweredProgram, decompose, require_static, specialise
from flowexport.ops.installed import installed_ops
from flowexport.targets.coreml import package
from flowexport.targets.coreml.convert import join_packages, require_dtypes, to_package
from flowexport.targets.coreml.options import PRECISIONS, CoreMLOptions
from flowexport.targets.coreml.session import INTERPRETED, on_macos, open_session

MULTIFUNCTION = "iOS18"
_INSTALL = "pip install 'flowexport[coreml]'"


class CoreMLTarget:
    """Converts with coremltools, runs with Core ML or interpreted; see ``core.types.Target``."""

    name = "coreml"
    streams = True
    suffix = ".mlpackage"
    precisions = PRECISIONS

    def probe(self) -> Availability:
        """Say whether coremltools is installed, and what runs its packages here."""
        if importlib.util.find_spec("coremltools") is None:
            return Availability(False, False, reason="not installed: coremltools", fix=_INSTALL)
        native = on_macos()
        return Availability(
            converts=True,
            runs=True,
            toolchain=installed_versions("coremltools", "torch"),
            reason=None if native else INTERPRETED,
            fix=None if native else "run `flowexport verify BUNDLE --target coreml` on a Mac",
        )

    def validate(self, options: Options) -> None:
        """Raise InputError or UnknownNameError for what Core ML does not support."""
        CoreMLOptions.parse(options)

    def convert(self, program: LoweredProgram, options: Options, out: Path) -> Artifact:
        """Write ``<model>.mlpackage`` under ``out``: batch 1, named float32 inputs and outputs.

        A causal model's functions are those of the one package, which needs iOS 18.

        Raises:
            InputError: an option, a dynamic dimension or an input's dtype.
            UnavailableError: coremltools is not installed.
            ConversionError: it refused the program, lost a name or shape, or
                left an ``inverse`` that adds an ε to its argument.
        """
        settings = CoreMLOptions.parse(options)
        require_static(
            program,
            self.name,
            "give the length in the shape; several lengths need one bucket (function) each",
        )
        require_dtypes(program)
        system = _system(program, settings, options)
        self._require_converter(program.model)
        ops = installed_ops()
        static = specialise(program, ops)
        plain, choices = decompose(static, self.name, ops, pinned=settings.form)

        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{program.model}{self.suffix}"
        package.remove(path)
        functions = {name: specialise(f, ops) for name, f in program.functions.items()}
        if functions:
            others = {
                name: decompose(f, self.name, ops, pinned=settings.form)[0]
                for name, f in functions.items()
            }
            with TemporaryDirectory(dir=out) as folder:
                parts = {}
                for name, part in {program.entry: plain, **others}.items():
                    parts[name] = Path(folder) / f"{name}{self.suffix}"
                    to_package(part, options.precision, system, parts[name])
                join_packages(parts, program.entry, program.model, path)
        else:
            to_package(plain, options.precision, system, path)
        form = "+".join(sorted({c.form for c in choices})) or "none"
        toolchain = installed_versions("coremltools", "torch")
        spec = package.read_spec(path)
        self._check(spec, static)
        for name, function in functions.items():
            self._check(spec, function, name)
        state = {n: dict(f.state) for n, f in functions.items() if f.state}
        _describe(
            spec,
            f"{program.model}, made by flowexport",
            {
                "model": program.model,
                "labels": list(program.labels),
                "preprocessing": dict(program.preprocessing),
                "precision": options.precision.value,
                "form": form,
                "recipe_sha256": program.recipe_sha256,
                "toolchain": toolchain,
                **({"state": state} if state else {}),
            },
        )
        package.write_spec(path, spec)
        operators = package.operator_counts(spec)
        sha256, size = sha256_tree(path), size_tree(path)
        return Artifact(
            target=self.name,
            path=path,
            sha256=sha256,
            size_bytes=size,
            precision=options.precision,
            model=program.model,
            recipe_sha256=program.recipe_sha256,
            form=form,
            inputs=static.inputs,
            outputs=static.outputs,
            fusions={op.name: operators.get(op.name, 0) for op in ops},
            toolchain=toolchain,
            options=dict(options.extra),
            details={
                "batch": 1,
                "deployment_target": system,
                "operators": operators,
                "arithmetic": "float16" if options.precision is Precision.FP16 else "float32",
                "sites": [
                    {"module": s.module_path, "form": c.form, "reason": c.reason}
                    for s, c in zip(static.attentions, choices, strict=True)
                ],
            },
            functions={
                name: Function(path, sha256, size, f.inputs, f.outputs, state=f.state)
                for name, f in functions.items()
            },
            entry=program.entry,
        )

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session on Core ML, or on the interpreter where there is no macOS.

        Raises:
            InputError: the package is corrupt.
        """
        return open_session(artifact, threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Read a finished package.

        Raises:
            InputError: the path is no ML Program package, or a part is missing or cut.
        """
        self._require_converter(path.name)
        spec = package.read_spec(path)
        inputs, outputs = package.features(spec)
        operators = package.operator_counts(spec)
        described = package.user_metadata(spec)
        return {
            "inputs": [s.to_json() for s in inputs],
            "outputs": [s.to_json() for s in outputs],
            "functions": package.functions(spec),
            "operators": operators,
            "fusions": {op.name: operators.get(op.name, 0) for op in installed_ops()},
            "metadata": described,
            "labels": described.get("labels", []),
            "size_bytes": size_tree(path),
        }

    def _check(self, spec: Any, program: LoweredProgram, function: str = "") -> None:
        """Raise ConversionError unless the package has the program's ends and exact divisions."""
        for kind, found, wanted in zip(
            ("inputs", "outputs"),
            package.features(spec, function),
            (program.inputs, program.outputs),
            strict=True,
        ):
            if found != list(wanted):
                raise ConversionError(
                    f"convert coreml {program.model}: the {kind} are {_listed(found)};"
                    f" expected {_listed(wanted)}."
                )
        for name, epsilon in package.rounding_inverses(spec):
            raise ConversionError(
                f"convert coreml {program.model}: inverse {name} has epsilon {epsilon:g};"
                " expected 0 (it computes 1/(x + epsilon)).",
                fix="write the division as a/x with a tensor a",
            )

    def _require_converter(self, model: str) -> None:
        found = self.probe()
        if not found.converts:
            raise UnavailableError(f"convert coreml {model}: {found.reason}.", fix=found.fix)


def _system(program: LoweredProgram, settings: CoreMLOptions, options: Options) -> str:
    """Return the oldest system that can run the package.

    Raises:
        InputError: the recipe wants an older one than functions need.
    """
    if not program.functions:
        return settings.deployment_target
    if options.extra.get("deployment_target", MULTIFUNCTION) != MULTIFUNCTION:
        raise InputError(
            f"convert coreml {program.model}: deployment_target is {settings.deployment_target};"
            f" expected {MULTIFUNCTION}, the first with several functions in a package.",
            fix=f"deployment_target: {MULTIFUNCTION}, or `streaming: false` for forward alone",
        )
    return MULTIFUNCTION


def _describe(spec: Any, short: str, entries: dict[str, Any]) -> None:
    spec.description.metadata.shortDescription = short
    for key, value in entries.items():
        text = json.dumps(value, sort_keys=True)
        spec.description.metadata.userDefined[package.PREFIX + key] = text


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in specs)


TARGET = CoreMLTarget()
