"""The Core ML target: one ML Program package, batch 1."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError, UnavailableError
from flowexport.core.hashing import size_tree
from flowexport.core.pixels import Pixels
from flowexport.core.stored import stored as numbers
from flowexport.core.toolchain import installed_versions
from flowexport.core.types import (
    STEP,
    Artifact,
    Availability,
    ModelSpec,
    Options,
    Precision,
    Session,
    TensorSpec,
)
from flowexport.lowering import (
    LoweredProgram,
    check_static,
    specialise,
)
from flowexport.lowering.artifact import finished
from flowexport.ops.installed import installed_ops
from flowexport.targets.coreml import package
from flowexport.targets.coreml.activations import ranges
from flowexport.targets.coreml.blobs import pack
from flowexport.targets.coreml.convert import (
    check_flexible,
    join_packages,
    require_dtypes,
    stored,
)
from flowexport.targets.coreml.describe import describe
from flowexport.targets.coreml.ends import ImageEnd, check_classifier, image_input
from flowexport.targets.coreml.names import shorten, table
from flowexport.targets.coreml.options import PRECISIONS, CoreMLOptions
from flowexport.targets.coreml.part import FLOAT_PARTS, Part, computed
from flowexport.targets.coreml.places import require_kept
from flowexport.targets.coreml.session import INTERPRETED, on_macos, open_session
from flowexport.targets.coreml.stateful import (
    FUNCTION,
    measure_drift,
    require_step,
    stateful_step,
)

MAC_SCRIPT = "verify_on_mac.py"
"""Lies beside the package: runs it on a Mac, without flowexport."""
_INSTALL = "pip install 'flowexport[coreml]'"

_ONE_LENGTH = (
    "give the length in the shape, one bucket (function) a length, or a range:"
    " `flexible: {NAME: {range: [8, 64]}}`"
)


class CoreMLTarget:
    """Converts with coremltools, runs with Core ML or interpreted; see ``core.types.Target``."""

    name = "coreml"
    streams = True
    suffix = ".mlpackage"
    precisions: tuple[Precision, ...] = PRECISIONS
    float_parts = FLOAT_PARTS

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
            fix=None if native else f"run the bundle's coreml/{MAC_SCRIPT} on a Mac",
        )

    def validate(self, options: Options) -> None:
        """Raise InputError or UnknownNameError for what Core ML does not support."""
        CoreMLOptions.parse(options)

    def check_model(self, spec: ModelSpec, options: Options, several: bool) -> dict[str, Pixels]:
        """Refuse, before any long work, what a package of this model cannot have.

        Args:
            several: whether the package holds several functions.

        Returns:
            The inputs that the package takes as 8-bit images.

        Raises:
            InputError: the deployment target, the labels, or the inputs do not fit.
        """
        settings = CoreMLOptions.parse(options)
        where = f"convert coreml {spec.name}"
        settings.system(where, *settings.held(spec.inputs, several, options.precision))
        if settings.flexible:
            check_flexible(spec.inputs, settings.flexible, where)
        else:
            check_static(spec.inputs, where, _ONE_LENGTH)
        require_dtypes(spec.inputs, where)
        if settings.stateful and not several:
            raise InputError(
                f"{where}: stateful is asked for, but the model has no step; expected a causal one."
            )
        if settings.classifier:
            check_classifier(spec.labels, where)
        return image_input(spec.inputs, spec.preprocessing, where) if settings.image else {}

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
        where = f"convert coreml {program.model}"
        if settings.flexible:
            check_flexible(program.inputs, settings.flexible, where)
        else:
            check_static(program.inputs, where, _ONE_LENGTH)
        require_dtypes(program.inputs, where)
        held = settings.held(program.inputs, bool(program.functions), options.precision)
        system = settings.system(where, *held)
        self._require_converter(program.model)
        if settings.stateful:
            require_step(program)
        ops = installed_ops()
        static = {
            name: specialise(part, ops)
            for name, part in {program.entry: program, **program.functions}.items()
        }
        main = static[program.entry]
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{program.model}{self.suffix}"
        package.remove(path)
        shutil.copyfile(Path(__file__).with_name(MAC_SCRIPT), out / MAC_SCRIPT)
        made: dict[str, Part] = {}
        with TemporaryDirectory(dir=out) as folder:
            for name, part in static.items():
                place = Path(folder) / f"{name}{self.suffix}" if len(static) > 1 else path
                own = "" if name == program.entry else name
                made[name] = Part.make(part, options, settings, system, place, own)
            if settings.stateful:
                static[FUNCTION] = stateful_step(made[STEP].program, settings.stateful)
                place = Path(folder) / f"{FUNCTION}{self.suffix}"
                # Not decomposed again: the passes there take a buffer for a constant.
                made[FUNCTION] = Part.save(static[FUNCTION], (), options, settings, system, place)
            if len(static) > 1:
                parts = {name: part.path for name, part in made.items()}
                separate = {name: size_tree(p) for name, p in parts.items()}
                join_packages(parts, program.entry, program.model, path)
        first = made[program.entry]
        choices = first.choices
        form = "+".join(sorted({c.form for c in choices})) or "none"
        toolchain = installed_versions("coremltools", "torch")
        spec = package.read_spec(path)
        details: dict[str, Any] = {
            "batch": 1,
            "deployment_target": system,
            "arithmetic": "float16" if computed(options) is Precision.FP16 else "float32",
            "sites": [
                {"module": s.module_path, "form": c.form, "reason": c.reason}
                for s, c in zip(main.attentions, choices, strict=True)
            ],
        }
        if first.quantised is not None:
            details["quantisation"] = first.quantised.to_json()
        if first.image is not None:
            details["image"] = first.image.to_json()
        if first.classes:
            details["classes"] = list(first.classes)
        for name, part in static.items():
            function = name if len(static) > 1 else ""
            self._check(spec, part, function, first.image, settings)
            if made[name].written.kept:
                kept = require_kept(
                    spec, made[name].written.kept, function or "main", program.model
                )
                details["kept_fp32"] = {**details.get("kept_fp32", {}), name: kept}
        state = {n: dict(f.state) for n, f in program.functions.items() if f.state}
        pack(path, spec)
        renamed = shorten(spec)
        describe(
            spec,
            main,
            settings.metadata,
            first.image,
            {
                "model": program.model,
                "labels": list(program.labels),
                "preprocessing": dict(program.preprocessing),
                "precision": options.precision.value,
                "form": form,
                "recipe_sha256": program.recipe_sha256,
                "toolchain": toolchain,
                "places": table({n: p.written.paths for n, p in made.items()}, renamed),
                **({"state": state} if state else {}),
            },
        )
        package.write_spec(path, spec)
        details["operators"] = operators = package.operator_counts(spec)
        details["scalars"] = package.scalars(spec)
        details["stored"] = numbers(package.constants(path, spec))
        details["ranges"] = ranges(path, spec)
        for one in made.values():
            clipped = {} if one.quantised is None else one.quantised.clipping
            details["clipping"] = {**details.get("clipping", {}), **clipped}
        if settings.stateful:
            found = measure_drift(path, made[STEP].program, settings.stateful, tell=_tell)
            details["stateful"] = found.to_json()
        if len(static) > 1:
            details["size"] = {"shared_bytes": size_tree(path), "separate_bytes": separate}
        return finished(
            self.name,
            path,
            main,
            options,
            form=form,
            fusions={op.name: operators.get(op.name, 0) for op in ops},
            toolchain=toolchain,
            details=details,
            functions={name: f for name, f in static.items() if name != program.entry},
        )

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session on Core ML, or on the interpreter where there is no macOS.

        Raises:
            InputError: the package is corrupt.
        """
        return open_session(artifact, threads)

    def trace(
        self, artifact: Artifact, feeds: Mapping[str, np.ndarray], *, threads: int = 1
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield name, operator and array of every value that the file computes."""
        from flowexport.targets.coreml.trace import trace

        yield from trace(artifact, feeds)

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
            "scalars": package.scalars(spec),
            "stored": numbers(package.constants(path, spec)),
            "ranges": ranges(path, spec),
            "fusions": {op.name: operators.get(op.name, 0) for op in installed_ops()},
            "metadata": described,
            "labels": described.get("labels", []),
            "size_bytes": size_tree(path),
        }

    def _check(
        self,
        spec: Any,
        program: LoweredProgram,
        function: str,
        image: ImageEnd | None,
        settings: CoreMLOptions,
    ) -> None:
        """Raise ConversionError unless the package has the program's ends and exact divisions."""
        tensors = [s for s in program.inputs if image is None or s.name != image.name]
        for kind, found, wanted in zip(
            ("inputs", "outputs"),
            package.features(spec, function),
            (tensors, list(program.outputs)),
            strict=True,
        ):
            wanted = [_described(stored(s), settings.largest, kind) for s in wanted]
            if found != wanted:
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


def _described(spec: TensorSpec, largest: Mapping[str, int], kind: str) -> TensorSpec:
    """Return a spec as a package's description has it: inputs of the largest size, and no
    shape for an output whose size is known at run time."""
    if not spec.dynamic:
        return spec
    sizes = tuple(largest.get(d, d) if isinstance(d, str) else d for d in spec.shape)
    return replace(spec, shape=sizes if kind == "inputs" else ())


def _tell(done: int, total: int) -> None:
    print(f"step {done} of {total} with the state inside", flush=True)


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in specs)


TARGET = CoreMLTarget()
