"""The TensorRT target."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from flowexport.core.errors import InputError, UnavailableError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Availability, Options, Precision, Session
from flowexport.lowering import LoweredProgram
from flowexport.targets.onnx.options import FLOATS
from flowexport.targets.tensorrt import sdk
from flowexport.targets.tensorrt.options import TensorRTOptions

INSTALL = "pip install 'flowexport[tensorrt]'"


class TensorRTTarget:
    """One ``.engine`` file with its layer table; runs on an NVIDIA GPU only."""

    name = "tensorrt"
    suffix = ".engine"
    has_plugin = True
    # int8-dynamic takes its ranges at run time, which TensorRT does not.
    precisions: tuple[Precision, ...] = (*FLOATS, Precision.INT8_STATIC, Precision.INT8_WEIGHTS)

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
        """Raise InputError or UnknownNameError unless the library here has these options."""
        settings = TensorRTOptions.parse(options)
        if (library := sdk.find(gpu=sdk.driver_problem() is None)) is not None:
            settings.check_library(library)

    def convert(self, program: LoweredProgram, options: Options, out: Path) -> Artifact:
        """Write ``<model>.engine`` and ``<model>.layers.json``.

        The engine is built from the ONNX target's file: its attention nodes
        become plugins, or their functions are inlined.

        Raises:
            UnavailableError: no library is here that can build, or no kernel
                for a plugin that was asked for.
            InputError: a profile lacks a dynamic dimension, or an option is not the library's.
            LoweringError, ConversionError: a stage refused the program.
        """
        from flowexport.targets.tensorrt.convert import convert

        TensorRTOptions.parse(options).shapes(program.inputs, program.model)
        availability = self.probe()
        library = sdk.find(gpu=sdk.driver_problem() is None)
        if library is None or not availability.converts:
            raise UnavailableError(
                f"convert tensorrt {program.model}: {availability.reason}.", fix=availability.fix
            )
        return convert(program, options, out, library)

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
        from flowexport.targets.tensorrt.convert import sidecar_path
        from flowexport.targets.tensorrt.weights import changed_weights

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
        changed = changed_weights(path.read_bytes(), found.get("weights", []))
        return {**found, "operators": operators, "size_bytes": size, "mismatches": changed}


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


TARGET = TensorRTTarget()
