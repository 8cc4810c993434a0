"""The ONNX target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import ConversionError, UnavailableError
from flowexport.core.stored import stored
from flowexport.core.toolchain import installed_versions
from flowexport.core.types import (
    Artifact,
    Availability,
    Options,
    Precision,
    Session,
)
from flowexport.lowering import LoweredProgram
from flowexport.lowering.artifact import finished
from flowexport.ops.installed import installed_ops
from flowexport.targets.onnx.options import PRECISIONS, OnnxOptions

if TYPE_CHECKING:
    from onnx import ModelProto

    from flowexport.lowering.quantisation import Quantisation
    from flowexport.targets.onnx.export import SiteForm

NEEDED = ("onnx", "onnxscript", "onnxsim")
RUNTIME = "onnxruntime"
# A protobuf message has at most 2 GiB; the rest is room for the graph.
MAX_BYTES = 2**31 - 2**24


class OnnxTarget:
    """One ``.onnx`` file; runs on ONNX Runtime's CPU provider."""

    name = "onnx"
    streams = True
    suffix = ".onnx"
    precisions: tuple[Precision, ...] = PRECISIONS

    def probe(self) -> Availability:
        """Say which packages are here; never raises."""
        missing = [name for name in (*NEEDED, RUNTIME) if find_spec(name) is None]
        return Availability(
            converts=not set(missing) & set(NEEDED),
            runs=RUNTIME not in missing,
            toolchain=installed_versions(*NEEDED, RUNTIME),
            reason=f"not installed: {', '.join(missing)}" if missing else None,
            fix="pip install flowexport" if missing else None,
        )

    def validate(self, options: Options) -> None:
        """Raise InputError or UnknownNameError unless the options are ONNX's."""
        OnnxOptions.parse(options)

    def convert(self, program: LoweredProgram, options: Options, out: Path) -> Artifact:
        """Write ``<model>.onnx``, and ``<model>.<function>.onnx`` for a causal model's functions.

        Args:
            program: of the options' precision, float32 for a quantised one, attention nodes
                in place.
            options: ``extra``: ``opset``, ``form``.
            out: an existing folder.

        Raises:
            LoweringError, ConversionError: a stage refused the program.
        """
        from flowexport.targets.onnx.integer import ranges
        from flowexport.targets.onnx.read import constants, fusions, inline, operators, scalars

        settings = OnnxOptions.parse(options)
        weights = program.exported.state_dict.values()
        if (size := sum(w.numel() * w.element_size() for w in weights)) > MAX_BYTES:
            raise ConversionError(
                f"convert onnx {program.model}: the weights have {size} bytes;"
                f" expected at most {MAX_BYTES} in one file.",
                fix="convert with --precision fp16",
            )
        path = out / f"{program.model}{self.suffix}"
        model, sites, quantised = _write(program, settings, options, path)
        clipping = dict(quantised.clipping) if quantised is not None else {}
        places, others = {}, {}
        for name, function in program.functions.items():
            beside = out / f"{program.model}.{name}{self.suffix}"
            written, _, more = _write(function, settings, options, beside, name)
            others[name] = {
                "scalars": scalars(written),
                "stored": stored(constants(written)),
                "fusions": fusions(written),
                "ranges": ranges(written),
            }
            clipping |= more.clipping if more is not None else {}
            places[name] = beside
        return finished(
            self.name,
            path,
            program,
            options,
            form=form_summary([site.form for site in sites]),
            fusions={**dict.fromkeys((s.op for s in sites), 0), **fusions(model)},
            toolchain=installed_versions("torch", *NEEDED),
            details={
                "opset": settings.opset,
                "ir_version": model.ir_version,
                "nodes": len(model.graph.node),
                "nodes_inlined": sum(operators(inline(model)).values()),
                "functions": len(model.functions),
                "scalars": scalars(model),
                "stored": stored(constants(model)),
                "ranges": ranges(model),
                **({"clipping": clipping} if clipping else {}),
                **({"beside": others} if others else {}),
                "attentions": [site.to_json() for site in sites],
                "deterministic": True,
                **({"quantisation": quantised.to_json()} if quantised else {}),
            },
            functions=program.functions,
            places=places,
        )

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session on ONNX Runtime.

        Raises:
            UnavailableError: ONNX Runtime is not installed.
            BundleError: the file is no ONNX model.
        """
        from flowexport.targets.onnx.session import OnnxSession

        if find_spec(RUNTIME) is None:
            raise UnavailableError(
                f"load onnx {artifact.model}: onnxruntime is not installed.",
                fix="pip install flowexport",
            )
        return OnnxSession(artifact, threads)

    def trace(
        self, artifact: Artifact, feeds: Mapping[str, np.ndarray], *, threads: int = 1
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield name, operator and array of every value that the file computes."""
        from flowexport.targets.onnx.trace import trace

        yield from trace(artifact, feeds, threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Return inputs, outputs, operators (also inlined), fusions, metadata and size.

        Raises:
            InputError: the file is no complete ONNX model.
        """
        from flowexport.targets.onnx.read import describe

        return describe(path)


def _write(
    program: LoweredProgram,
    settings: OnnxOptions,
    options: Options,
    path: Path,
    function: str = "",
) -> tuple[ModelProto, tuple[SiteForm, ...], Quantisation | None]:
    """Write one program to one file."""
    from flowexport.targets.onnx.export import export
    from flowexport.targets.onnx.finish import finish
    from flowexport.targets.onnx.quantise import quantise

    precision = options.precision
    model, sites = export(
        program,
        installed_ops(),
        opset=settings.opset,
        pinned=settings.form,
        precision=precision if precision.quantised else None,
    )
    model = finish(model, program, form_summary([site.form for site in sites]))
    quantised = None
    if precision.quantised:
        model, quantised = quantise(
            model, program, options, symmetric=settings.symmetric, function=function
        )
    path.write_bytes(model.SerializeToString(deterministic=True))
    return model, sites, quantised


def form_summary(forms: Sequence[str]) -> str:
    """Return ``published``, or ``left x7, published x12`` where sites differ."""
    counts = Counter(forms)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} x{n}" for name, n in sorted(counts.items())) or "no attention"


TARGET = OnnxTarget()
