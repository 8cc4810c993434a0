"""The process that builds one engine; see :mod:`flowexport.targets.tensorrt.builder`.

``python -P build.py REQUEST RESULT``, both JSON files; imports nothing of
ours, so that it starts fast and holds no torch. TensorRT writes its verbose
log to stderr, and may end the process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
ADDR_NO_RANDOMIZE = 0x0040000


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build and write one engine; returns ``{"error"}`` or what was built."""
    trt = importlib.import_module(request["module"])
    rtx = bool(request["rtx"])
    # The first logger made is the process's own: later ones are ignored.
    logger = trt.Logger(trt.Logger.VERBOSE)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(request["onnx"]).read_bytes()):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return {"error": "the parser refuses the ONNX file: " + "; ".join(errors)}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 rounds float32 factors to 10 bits; precision is the ONNX file's to decide.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in request["shapes"].items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            return {"error": f"the builder refuses the optimization profile {request['shapes']}"}
    capabilities = set_capabilities(trt, rtx, config, request["compute_capabilities"])
    started = time.monotonic()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"error": "the builder gives no engine"}
    Path(request["engine"]).write_bytes(engine)
    return {
        "seconds": time.monotonic() - started,
        "version": trt.__version__,
        "compute_capabilities": capabilities,
        "network_layers": network.num_layers,
    }


def network_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network: precision is in the ONNX file.

    Since 11 there is no other kind and the flag may be gone.
    """
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def set_capabilities(trt: Any, rtx: bool, config: Any, wanted: list[str]) -> list[str]:
    """Ask TensorRT-RTX for GPU generations; full TensorRT builds for the GPU that is here."""
    if not rtx:
        return ["of the GPU that built it"]
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        value = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
        if not config.set_compute_capability(value, index):
            raise RuntimeError(f"the builder refuses compute capability {capability}")
    return wanted


def fix_addresses() -> None:
    """Start this process again without address randomisation (Linux).

    TensorRT-RTX numbers its kernels in the order of their addresses, so a
    second process would write other bytes for the same network. Where the
    kernel or a container forbids it, the engine still builds.
    """
    if sys.platform != "linux":
        return
    personality = ctypes.CDLL(None).personality
    now = personality(0xFFFFFFFF)
    if now == -1 or now & ADDR_NO_RANDOMIZE or personality(now | ADDR_NO_RANDOMIZE) == -1:
        return
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, sys.orig_argv)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends (Linux, where TensorRT is)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    die_with_parent()
    fix_addresses()
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        result = build(request)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
