"""The process that builds one engine; see :mod:`flowexport.targets.tensorrt.builder`.

``python -P -m flowexport.targets.tensorrt.build REQUEST RESULT FD``: two JSON
files, and an open descriptor for the steps. Imports no torch, so that it
starts fast and its memory is its own. TensorRT writes its verbose log to
stderr, and may end the process.
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

from flowexport.core.errors import FlowExportError
from flowexport.core.steps import STEP
from flowexport.targets.tensorrt.adapter import adapter

PR_SET_PDEATHSIG = 1
ADDR_NO_RANDOMIZE = 0x0040000


def build(request: dict[str, Any], steps: int) -> dict[str, Any]:
    """Build and write one engine; returns ``{"error"}`` or what was built.

    Args:
        steps: descriptor that takes one line a step of the build.
    """
    trt = importlib.import_module(request["module"])
    # The first logger made is the process's own: later ones are ignored.
    logger = trt.Logger(trt.Logger.VERBOSE)
    library = adapter(trt, request)
    plugin = request["plugin"]
    failures: list[str] = []
    if plugin:
        failures = _register(trt, plugin)
    builder = trt.Builder(logger)
    network = builder.create_network(library.network_flags())
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(request["onnx"]).read_bytes()):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        said = "; ".join([*failures, *errors])
        return {"error": f"the parser refuses the ONNX file: {said}"}
    if plugin:
        from flowexport.ops.flow_attention.tensorrt.plugin import require_plugins

        require_plugins(trt, network, plugin["expected"], request["where"])
    config = builder.create_builder_config()
    settings = library.configure(config)
    for index, shapes in enumerate(request["profiles"]):
        profile = builder.create_optimization_profile()
        try:
            for name, (low, best, high) in shapes.items():
                profile.set_shape(name, low, best, high)
            refused = config.add_optimization_profile(profile) < 0
        except ValueError:
            refused = True
        if refused:
            return {"error": f"the builder refuses optimization profile {index}: {shapes}"}
    config.progress_monitor = _monitor(trt, steps)
    if plugin and plugin["embed"]:
        config.plugins_to_serialize = [plugin["library"]]
    started = time.monotonic()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"error": "; ".join(["the builder gives no engine", *failures])}
    seconds = time.monotonic() - started
    Path(request["engine"]).write_bytes(engine)
    layers = library.finish(config, bytes(engine), logger)
    return {
        "layers": layers,
        "tables": max(1, len(request["profiles"])) if layers is None else 1,
        "seconds": seconds,
        "version": trt.__version__,
        "settings": settings,
        "network_layers": network.num_layers,
    }


def _register(trt: Any, plugin: dict[str, Any]) -> list[str]:
    """Register FlowAttention; returns the list that gathers what it refuses, in words."""
    if plugin["library"]:
        registry = trt.get_plugin_registry()
        if registry.load_library(plugin["library"]) is None:
            raise RuntimeError(f"TensorRT refuses the plugin library {plugin['library']}")
        return []
    from flowexport.ops.flow_attention.tensorrt.plugin import register_plugin

    return register_plugin(trt).failures


def _monitor(trt: Any, descriptor: int) -> Any:
    """Return a progress monitor that writes one line a finished step of a phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            line = f"{STEP}{phase} {step + 1}/{self.steps.get(phase, 0)}\n"
            os.write(descriptor, line.encode())
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


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
        result = build(request, int(arguments[2]))
    except FlowExportError as error:
        result = {"refused": error.message, "fix": error.fix}
    except MemoryError:
        result = {"error": "the builder ran out of memory"}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
