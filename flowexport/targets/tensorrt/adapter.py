"""Where TensorRT-RTX, full TensorRT 10 and full TensorRT 11 differ when they build.

Runs in the process that builds: standard library only. What is not executed
where there is no GPU (all of :class:`FullAdapter`) follows the documented
Python API and is tested against a double of it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

HARDWARE = ("none", "ampere_plus", "same_compute_capability")


class Adapter(ABC):
    """One of the libraries.

    Args:
        trt: the imported module.
        request: what the parent asked for; see :mod:`flowexport.targets.tensorrt.builder`.
    """

    def __init__(self, trt: Any, request: dict[str, Any]) -> None:
        self.trt, self.request = trt, request

    def network_flags(self) -> int:
        """Return the flags of a strongly typed network: precision is in the ONNX file.

        Since TensorRT 11 there is no other kind and the flag is gone.
        """
        flags = self.trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def configure(self, config: Any) -> dict[str, Any]:
        """Set what both have, then what one has; returns what was set, for the manifest."""
        trt = self.trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # TF32 rounds float32 factors to 10 bits; precision is the ONNX file's to decide.
        config.clear_flag(trt.BuilderFlag.TF32)
        # More streams would put the slices of a fused qkv side by side, with two waits each.
        config.max_aux_streams = self.request["aux_streams"]
        said = {"strongly_typed": True, "tf32": False, "aux_streams": self.request["aux_streams"]}
        return {**said, **self._own(config)}

    @abstractmethod
    def _own(self, config: Any) -> dict[str, Any]:
        """Set what only this builder has; returns what was set."""

    def finish(self, config: Any, engine: bytes, logger: Any) -> list[dict[str, str]] | None:
        """Save what a later build can use; return the layer table where the log has none."""
        return None


class RtxAdapter(Adapter):
    """TensorRT-RTX: builds without a GPU, for the generations it is told.

    It has a timing cache and hardware compatibility in its interface only, and
    builds nothing refittable without a GPU; the options refuse them.
    """

    def _own(self, config: Any) -> dict[str, Any]:
        wanted = self.request["compute_capabilities"]
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            value = getattr(self.trt.ComputeCapability, "SM" + capability.replace(".", ""), None)
            if value is None or not config.set_compute_capability(value, index):
                raise RuntimeError(f"the builder refuses compute capability {capability}")
        return {"compute_capabilities": wanted}


class FullAdapter(Adapter):
    """Full TensorRT: builds for the GPU that is here."""

    def _own(self, config: Any) -> dict[str, Any]:
        trt, request = self.trt, self.request
        said: dict[str, Any] = {"compute_capabilities": ["of the GPU that built it"]}
        level = request["hardware_compatibility"]
        if level != "none":
            levels = trt.HardwareCompatibilityLevel
            if not hasattr(levels, level.upper()):  # SAME_COMPUTE_CAPABILITY came with 10.8
                raise RuntimeError(
                    f"TensorRT {trt.__version__} has no hardware compatibility {level}"
                )
            config.hardware_compatibility_level = getattr(levels, level.upper())
            said["compute_capabilities"] = [
                "8.0 and above" if level == "ampere_plus" else "as the GPU that built it"
            ]
        said["hardware_compatibility"] = level
        if request["version_compatible"]:
            # The engine then carries a lean runtime: code that its user must allow to run.
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if request["refit"]:
            config.set_flag(trt.BuilderFlag.REFIT)
        said |= {"version_compatible": request["version_compatible"], "refit": request["refit"]}
        cache = request["timing_cache"]
        if cache:
            path = Path(cache)
            data = path.read_bytes() if path.exists() else b""
            # A cache of another GPU or version must not decide tactics: mismatches are refused.
            self._cache = config.create_timing_cache(data)
            if self._cache is None or not config.set_timing_cache(self._cache, False):
                raise RuntimeError(f"the timing cache {path} is of another GPU or TensorRT")
        said["timing_cache"] = bool(cache)
        return said

    def finish(self, config: Any, engine: bytes, logger: Any) -> list[dict[str, str]] | None:
        trt = self.trt
        if self.request["timing_cache"]:
            path = Path(self.request["timing_cache"])
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(bytes(config.get_timing_cache().serialize()))
            partial.replace(path)
        runtime = trt.Runtime(logger)
        # Built a moment ago, from what the user gave: what it carries may run.
        runtime.engine_host_code_allowed = True
        built = runtime.deserialize_cuda_engine(engine)
        if built is None:
            raise RuntimeError("the engine just built cannot be read back")
        inspector = built.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        layers = json.loads(text)["Layers"]
        return [{"name": str(one["Name"]), "type": str(one["LayerType"])} for one in layers]


def adapter(trt: Any, request: dict[str, Any]) -> Adapter:
    """Return the adapter of an imported module."""
    return RtxAdapter(trt, request) if request["rtx"] else FullAdapter(trt, request)
