"""The TensorRT target."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from flowexport import __version__
from flowexport.core.errors import InputError, UnavailableError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Availability, Options, Precision, Session
from flowexport.lowering import LoweredProgram
from flowexport.targets.onnx import TARGET as ONNX
from flowexport.targets.onnx.options import PRECISIONS
from flowexport.targets.tensorrt import sdk
from flowexport.targets.tensorrt.options import TensorRTOptions

INSTALL = "pip install 'flowexport[tensorrt]'"
SIDECAR = ".layers.json"
# A rebuild is compared where it costs little; above, the manifest says that it was not.
REBUILD_LIMIT_S = 120.0


class TensorRTTarget:
    """One ``.engine`` file with its layer table; runs on an NVIDIA GPU only."""

    name = "tensorrt"
    suffix = ".engine"
    precisions: tuple[Precision, ...] = PRECISIONS

    def probe(self) -> Availability:
        """Say which library is here and whether a GPU is; never raises."""
        problem = sdk.driver_problem()
        found = sdk.find(gpu=problem is None)
        if found is None:
            return Availability(
                False, False, reason="neither tensorrt_rtx nor tensorrt is installed", fix=INSTALL
            )
        toolchain = {found.module: found.version}
        if problem:
            converts = found.rtx  # full TensorRT times its kernels on the GPU
            fix = "verify the bundle on a machine with an NVIDIA GPU"
            return Availability(converts, False, toolchain, problem, fix if converts else INSTALL)
        if not _torch_sees_gpu():
            return Availability(
                True,
                False,
                toolchain,
                "torch is built without CUDA and holds the engine's buffers",
                "pip install torch with CUDA (https://pytorch.org/get-started)",
            )
        return Availability(True, True, toolchain)

    def validate(self, options: Options) -> None:
        """Raise InputError or UnknownNameError unless the options are TensorRT's."""
        TensorRTOptions.parse(options)

    def convert(self, program: LoweredProgram, options: Options, out: Path) -> Artifact:
        """Write ``<model>.engine`` and ``<model>.layers.json``.

        The ONNX target's file is built with its functions inlined: without a
        plugin TensorRT finds functions by name alone and would give every
        node the first one's body.

        Raises:
            UnavailableError: no library is here that can build.
            InputError: the profile lacks a dynamic dimension.
            LoweringError, ConversionError: a stage refused the program.
        """
        import onnx

        from flowexport.targets.onnx.read import inline
        from flowexport.targets.tensorrt.builder import build_engine

        settings = TensorRTOptions.parse(options)
        shapes = settings.shapes(program.inputs, program.model)
        availability = self.probe()
        library = sdk.find(gpu=sdk.driver_problem() is None)
        if library is None or not availability.converts:
            raise UnavailableError(
                f"convert tensorrt {program.model}: {availability.reason}.", fix=availability.fix
            )
        path = out / f"{program.model}{self.suffix}"
        with tempfile.TemporaryDirectory(prefix=".tensorrt-", dir=out) as folder:
            scratch = Path(folder)
            source = ONNX.convert(program, _onnx_options(program, options), scratch)
            inlined = scratch / "inlined.onnx"
            inlined.write_bytes(
                inline(onnx.load(source.path)).SerializeToString(deterministic=True)
            )
            common: dict[str, Any] = {
                "shapes": shapes,
                "compute_capabilities": settings.compute_capabilities,
                "timeout": settings.timeout,
                "model": program.model,
            }
            built = build_engine(library, inlined, _folder(scratch, "1") / path.name, **common)
            same: bool | None = None
            reason: str | None = "the option check_rebuild is off"
            if settings.check_rebuild and built.seconds > REBUILD_LIMIT_S:
                reason = f"one build took {built.seconds:.0f} s; a second was not made"
            elif settings.check_rebuild:
                again = build_engine(library, inlined, _folder(scratch, "2") / path.name, **common)
                same = sha256_file(built.engine) == sha256_file(again.engine)
                reason = None if same else "a second build of the same file gave other bytes"
            built.engine.replace(path)
        details = {
            "builder": f"{library.label} {built.version}",
            "compute_capabilities": list(built.compute_capabilities),
            "profile": shapes,
            "build_seconds": built.seconds,
            "network_layers": built.network_layers,
            "layer_count": len(built.layers),
            "layer_types": dict(Counter(layer.type for layer in built.layers)),
            "layers": [layer.to_json() for layer in built.layers],
            "onnx_sha256": source.sha256,
            "attentions": source.details["attentions"],
            "deterministic": same,
            "deterministic_reason": reason,
        }
        fusions = dict.fromkeys(source.fusions, 0)
        form = f"decomposed: {source.form}" if fusions else source.form
        sidecar = {
            "model": program.model,
            "precision": program.precision.value,
            "flowexport_version": __version__,
            "engine_sha256": sha256_file(path),
            "inputs": [s.to_json() for s in program.inputs],
            "outputs": [s.to_json() for s in program.outputs],
            "fusions": fusions,
            "form": form,
            **{k: v for k, v in details.items() if k != "build_seconds"},
        }
        sidecar_path(path).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
        return Artifact(
            target=self.name,
            path=path,
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
            precision=program.precision,
            model=program.model,
            recipe_sha256=program.recipe_sha256,
            form=form,
            inputs=program.inputs,
            outputs=program.outputs,
            fusions=fusions,
            toolchain={**source.toolchain, library.module: built.version},
            options=dict(options.extra),
            details=details,
        )

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session on the GPU; ``threads`` has no meaning there.

        Raises:
            UnavailableError: there is no GPU, driver, or library.
            BundleError: the engine does not fit this GPU or library.
        """
        from flowexport.targets.tensorrt.session import TensorRTSession

        availability = self.probe()
        library = None
        if availability.runs:  # an engine runs only on the library that built it
            builders = (name for name in sdk.PACKAGES if name in artifact.toolchain)
            library = next((found for found in map(sdk.installed, builders) if found), None)
        if library is None:
            reason = availability.reason or "the library that built the engine is not installed"
            raise UnavailableError(
                f"load tensorrt {artifact.model}: {reason}.", fix=availability.fix or INSTALL
            )
        return TensorRTSession(artifact, library)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Return what the layer table beside an engine says; the engine itself needs a GPU.

        Raises:
            InputError: no engine, no layer table, or one of another engine.
        """
        where = f"read tensorrt {path.name}"
        table = sidecar_path(path)
        try:
            size, digest = path.stat().st_size, sha256_file(path)
            found = json.loads(table.read_text(encoding="utf-8"))
            built = found.pop("engine_sha256")
            types = Counter(layer["type"] for layer in found["layers"])
        except OSError as error:
            raise InputError(
                f"{where}: {error.filename} cannot be read: {error.strerror}.",
                fix=f"keep {table.name} beside the engine",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: {table.name} is no layer table of ours.") from error
        if built != digest:
            raise InputError(
                f"{where}: the engine has sha256 {digest[:12]}; {table.name} expects"
                f" {str(built)[:12]}.",
                fix="convert again",
            )
        operators = dict(sorted(types.items(), key=lambda item: (-item[1], item[0])))
        return {**found, "operators": operators, "size_bytes": size}


def sidecar_path(engine: Path) -> Path:
    """Return where an engine's layer table lies."""
    return engine.with_suffix(SIDECAR)


def _folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path


def _onnx_options(program: LoweredProgram, options: Options) -> Options:
    from flowexport.targets.onnx.options import KEYS

    return Options(program.precision, {k: v for k, v in options.extra.items() if k in KEYS})


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


TARGET = TensorRTTarget()
