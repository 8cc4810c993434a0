"""The TFLite target: one static-batch .tflite file, verified on LiteRT."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError, UnavailableError
from flowexport.core.pixels import Pixels
from flowexport.core.stored import stored
from flowexport.core.toolchain import installed_versions
from flowexport.core.types import (
    FORWARD,
    Artifact,
    Availability,
    ModelSpec,
    Options,
    Precision,
    Session,
    TensorSpec,
)
from flowexport.lowering import LoweredProgram, check_static, decompose, specialise
from flowexport.lowering.artifact import finished
from flowexport.lowering.passes import fold_norm_affine, spell_out_norms
from flowexport.ops.descriptor import AttentionSite, Choice
from flowexport.ops.installed import installed_ops
from flowexport.targets.tflite import compat, flatbuffer, metadata
from flowexport.targets.tflite.constants import constants
from flowexport.targets.tflite.convert import store_weights_in_half, to_flatbuffer
from flowexport.targets.tflite.ends import ImageEnd, image_end
from flowexport.targets.tflite.options import PRECISIONS, TFLiteOptions
from flowexport.targets.tflite.quantise import quantise
from flowexport.targets.tflite.ranges import ranges
from flowexport.targets.tflite.reshapes import without_copies
from flowexport.targets.tflite.session import TFLiteSession, delegations, file_feeds

_CONVERTERS = {"litert-torch": "litert_torch", "ai-edge-quantizer": "ai_edge_quantizer"}
_RUNTIME = {"ai-edge-litert": "ai_edge_litert"}
_SIGNATURE = "serving_default"
_INSTALL = "pip install 'flowexport[tflite]'"
_LENGTHS = (
    "give the length in the shape, or several as `buckets: {length: [29, 64]}` in the recipe:"
    " one signature each"
)


class TFLiteTarget:
    """Converts with litert-torch, runs with ai-edge-litert; see ``core.types.Target``."""

    name = "tflite"
    streams = True
    suffix = ".tflite"
    precisions = PRECISIONS

    def probe(self) -> Availability:
        """Say whether the converter and the runtime are installed."""
        missing = [
            package
            for package, module in {**_CONVERTERS, **_RUNTIME}.items()
            if importlib.util.find_spec(module) is None
        ]
        reason = None
        if missing:
            reason = f"not installed: {', '.join(missing)}"
        runs = "ai-edge-litert" not in missing
        if runs:
            try:
                import ai_edge_litert.interpreter  # noqa: F401 - the wheel may not load here
            except Exception as error:
                runs = False
                reason = f"ai-edge-litert cannot be imported: {error}"
        return Availability(
            converts=not missing and runs,
            runs=runs,
            toolchain=installed_versions(*_CONVERTERS, *_RUNTIME, "torch"),
            reason=reason,
            fix=_INSTALL if reason else None,
        )

    def validate(self, options: Options) -> None:
        """Raise InputError or UnknownNameError for what TFLite does not support."""
        TFLiteOptions.parse(options)

    def check_model(self, spec: ModelSpec, options: Options, several: bool) -> dict[str, Pixels]:
        """Refuse, before any long work, what a file of this model cannot have.

        Args:
            several: whether the file holds several functions.

        Returns:
            The inputs that the file takes as 8-bit pixels.

        Raises:
            InputError: a dimension other than the batch is dynamic, or layout or
                input_dtype does not fit the inputs.
        """
        settings = TFLiteOptions.parse(options)
        where = f"convert tflite {spec.name}"
        check_static(spec.inputs, where, _LENGTHS)
        end = image_end(spec.inputs, spec.preprocessing, settings, where)
        return {end.spec.name: end.pixels} if end is not None and end.pixels is not None else {}

    def convert(self, program: LoweredProgram, options: Options, out: Path) -> Artifact:
        """Write ``<model>.tflite`` under ``out``: batch 1, named inputs and outputs.

        A causal model's step, and other lengths, are signatures of the one file and share
        its weights.

        FP16 stores the weights of linear and convolution layers in half
        precision; LiteRT widens them and computes in float32 on a CPU.

        Raises:
            InputError: an option or a dynamic dimension that TFLite does not support.
            UnavailableError: the converter is not installed.
            ConversionError: it refused the program, or lost a name or shape.
        """
        settings = TFLiteOptions.parse(options)
        check_static(program.inputs, f"convert tflite {program.model}", _LENGTHS)
        self._require_converter(program.model)
        where = f"convert tflite {program.model}"
        image = image_end(program.inputs, program.preprocessing, settings, where)
        ops = installed_ops()
        static = specialise(program, ops)
        # What the weights are stored in decides the form; the arithmetic is float32.
        plain, choices = decompose(
            replace(_folded(static), precision=options.precision),
            self.name,
            ops,
            pinned=settings.form,
        )
        plain = replace(plain, precision=Precision.FP32)
        functions = {name: specialise(f, ops) for name, f in program.functions.items()}
        others = {
            name: decompose(_folded(f), self.name, ops, pinned=settings.form)[0]
            for name, f in functions.items()
        }
        alone = not others and program.entry == FORWARD
        main = _SIGNATURE if alone else program.entry
        content: Any = to_flatbuffer({main: plain, **others}, image)
        if options.precision is Precision.FP16:
            content = store_weights_in_half(content, program.model)
        quantised = None
        if options.precision.quantised:
            content, quantised = quantise(
                content, {main: plain, **others}, options, per_channel=settings.per_channel
            )

        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{program.model}{self.suffix}"
        path.write_bytes(content)
        del content
        form = "+".join(sorted({c.form for c in choices})) or "none"
        toolchain = installed_versions(*_CONVERTERS, *_RUNTIME, "torch")
        if options.precision is Precision.FP32:
            del toolchain["ai-edge-quantizer"]
        header = {
            "model": program.model,
            "precision": options.precision.value,
            "form": form,
            "recipe_sha256": program.recipe_sha256,
            "preprocessing": dict(program.preprocessing),
            "toolchain": toolchain,
        }
        if functions:
            header["state"] = {n: dict(f.state) for n, f in functions.items() if f.state}
        if settings.compat is not None:
            compat.require_compatible(flatbuffer.read_model(path), settings.compat, program.model)
            header["compat"] = settings.compat
        if image is not None:
            header["image"] = image.to_json()
        self._describe(path, static, header, image)
        operators = self._check(path, static, None if image is None else image.spec)
        for name, function in functions.items():
            self._check(path, function, None, name)
        details = self._details(path, options.precision, operators, static.attentions, choices)
        if quantised is not None:
            details["quantisation"] = quantised.to_json()
            details["clipping"] = dict(quantised.clipping)
        details |= {k: header[k] for k in ("compat", "image") if k in header}
        pixels = image is not None and image.pixels is not None
        details["warnings"] = [
            w for n, s in details["delegation"].items() for w in _torn(n, s, pixels=pixels)
        ]
        return finished(
            self.name,
            path,
            static,
            options,
            form=form,
            fusions=_fusions(operators, [op.name for op in ops]),
            toolchain=toolchain,
            details=details,
            functions=functions,
        )

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session on LiteRT's CPU interpreter.

        Raises:
            UnavailableError: ai-edge-litert is not installed.
            InputError: the file is corrupt or another model's.
        """
        self._require_runtime(artifact.model)
        return TFLiteSession(artifact, threads)

    def file_feeds(
        self, artifact: Artifact, feeds: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return what the file takes for feeds of the artifact's specs."""
        return file_feeds(artifact, feeds)

    def trace(
        self, artifact: Artifact, feeds: Mapping[str, np.ndarray], *, threads: int = 1
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield name, operator and array of every value that the file computes."""
        from flowexport.targets.tflite.trace import trace

        yield from trace(artifact, feeds, threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Read a finished file.

        Raises:
            InputError: the file is no TFLite model, or truncated.
        """
        self._require_runtime(path.name)
        model = flatbuffer.read_model(path)
        inputs, outputs = flatbuffer.signature(model)
        operators = flatbuffer.operator_counts(model)
        header, labels = metadata.read_files(path)
        if flatbuffer.names_files(model, metadata.BUFFER_NAME, metadata.HEADER_FILE) and not header:
            raise InputError(
                f"inspect tflite: {path} has lost the files behind its flatbuffer (truncated).",
                fix="convert it again",
            )
        return {
            "inputs": [s.to_json() for s in inputs],
            "outputs": [s.to_json() for s in outputs],
            "signatures": flatbuffer.signatures(model),
            "operators": operators,
            "scalars": flatbuffer.scalars(model),
            "stored": stored(constants(model)),
            "ranges": ranges(model),
            "fusions": _fusions(operators, [op.name for op in installed_ops()]),
            "metadata": header,
            "labels": labels,
            "constant_bytes": flatbuffer.constant_bytes(model),
            "size_bytes": path.stat().st_size,
        }

    def inspect_run(self, path: Path) -> dict[str, Any]:
        """Load a finished file and say how XNNPACK takes each signature.

        Returns:
            ``{"delegation": {signature: partitions, operators outside, ...}}``.
        """
        self._require_runtime(path.name)
        return {"delegation": delegations(path)}

    def _describe(
        self,
        path: Path,
        program: LoweredProgram,
        header: dict[str, Any],
        image: ImageEnd | None,
    ) -> None:
        """Rewrite the file with its metadata inside and the labels behind it."""
        model = flatbuffer.read_model(path)
        without_copies(model)
        inputs, outputs = flatbuffer.signature(model)
        described = metadata.metadata_buffer(
            program.model,
            f"{program.model}, made by flowexport",
            [s.name for s in inputs],
            [s.name for s in outputs],
            labelled=program.outputs[0].name if program.labels else None,
            image=metadata.image_facts(program.inputs, program.preprocessing, image),
        )
        temporary = path.with_suffix(".partial")
        flatbuffer.write_model(model, temporary, {metadata.BUFFER_NAME: described})
        metadata.append_files(temporary, header, program.labels)
        temporary.replace(path)

    def _check(
        self,
        path: Path,
        program: LoweredProgram,
        image: TensorSpec | None,
        name: str | None = None,
    ) -> dict[str, int]:
        """Return the operators of a file whose signature has exactly the program's ends.

        Args:
            image: of the file, in place of the program's input.
        """
        model = flatbuffer.read_model(path)
        for kind, found, wanted in zip(
            ("inputs", "outputs"),
            flatbuffer.signature(model, name),
            (program.inputs if image is None else (image,), program.outputs),
            strict=True,
        ):
            if {s.name: s for s in found} != {s.name: s for s in wanted}:
                raise ConversionError(
                    f"convert tflite {program.model}: the {kind} are {_listed(found)};"
                    f" expected {_listed(wanted)}."
                )
        return flatbuffer.operator_counts(model)

    def _details(
        self,
        path: Path,
        precision: Precision,
        operators: dict[str, int],
        sites: Sequence[AttentionSite],
        choices: Sequence[Choice],
    ) -> dict[str, Any]:
        half = precision is Precision.FP16
        model = flatbuffer.read_model(path)
        return {
            "batch": 1,
            "delegation": delegations(path),
            "operators": operators,
            "constant_bytes": flatbuffer.constant_bytes(model),
            "scalars": flatbuffer.scalars(model),
            "stored": stored(constants(model)),
            "ranges": ranges(model),
            "arithmetic": "float32 on a CPU; weights are stored as float16" if half else "float32",
            "sites": [
                {"module": s.module_path, "form": c.form, "reason": c.reason}
                for s, c in zip(sites, choices, strict=True)
            ],
        }

    def _require_converter(self, model: str) -> None:
        found = self.probe()
        if not found.converts:
            raise UnavailableError(f"convert tflite {model}: {found.reason}.", fix=found.fix)

    def _require_runtime(self, model: str) -> None:
        found = self.probe()
        if not found.runs:
            raise UnavailableError(f"load tflite {model}: {found.reason}.", fix=found.fix)


def _torn(name: str, split: Mapping[str, Any], *, pixels: bool) -> list[str]:
    """Return the warning on a signature that XNNPACK does not run as one piece.

    Args:
        pixels: the input is uint8, whose CAST in front XNNPACK does not take.
    """
    if split["partitions"] == 1 and split["not_delegated"] in ({}, {"CAST": 1} if pixels else {}):
        return []
    left = [f"{count} {op}" for op, count in split["not_delegated"].items()]
    where = "; ".join(split["outside"][:5])
    more = len(split["outside"]) - 5
    return [
        f"{name} runs in {split['partitions']} XNNPACK partitions; outside:"
        f" {', '.join(left) or 'nothing'}"
        + (f" ({where}{f' and {more} more' if more > 0 else ''})" if where else "")
    ]


def _folded(program: LoweredProgram) -> LoweredProgram:
    """Return the program with its layer norms in the fewest operators: XNNPACK has none."""
    return replace(program, exported=spell_out_norms(fold_norm_affine(program.exported)))


def _fusions(operators: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    """Count the attentions kept as one operator: TFLite has none, a custom one would show."""
    return {name: operators.get(name, 0) for name in names}


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in specs)


TARGET = TFLiteTarget()
