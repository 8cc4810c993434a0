"""Running the builder in a process of its own, and reading its log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowexport.core.errors import ConversionError
from flowexport.ops.flow_attention.tensorrt.rtx import builder_environment
from flowexport.targets.tensorrt.sdk import SDK

PLUGIN_TYPES = ("custom_layer", "PluginV3")
"""What TensorRT-RTX and full TensorRT call a plugin in the layer table."""

Shapes = Mapping[str, Sequence[Sequence[int]]]
"""(minimum, optimum, maximum) shape of each dynamic input."""

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), ")
_PREFIX = re.compile(r"^(\[[^]]*\] )?\[TRT[^]]*\] \[(?P<level>[A-Z])\] ")
_LOG_TAIL = 300


@dataclass(frozen=True)
class Layer:
    """One layer of the finished engine, as the builder names it."""

    name: str
    type: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Plugin:
    """The FlowAttention plugin for one build.

    Attributes:
        expected: FlowAttention nodes in the ONNX file.
        library: the C++ plugin library; None takes the Python plugin.
        embed: whether the engine carries the library.
    """

    expected: int
    library: Path | None = None
    embed: bool = False


@dataclass(frozen=True)
class Request:
    """What one engine is built from.

    Attributes:
        onnx: the file; precision is as it says (strongly typed).
        profiles: the optimization profiles; empty where nothing is dynamic.
        model: name for messages.
        plugin: None where the file has no node for it.
        compute_capabilities: GPU generations, for TensorRT-RTX.
        timeout: seconds.
        aux_streams: streams beside the caller's that TensorRT may use.
        hardware_compatibility, version_compatible, refit, timing_cache: of full
            TensorRT; see :class:`flowexport.targets.tensorrt.options.TensorRTOptions`.
    """

    onnx: Path
    profiles: Sequence[Shapes]
    model: str
    plugin: Plugin | None = None
    compute_capabilities: Sequence[str] = ()
    timeout: float = 3600.0
    aux_streams: int = 0
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    timing_cache: Path | None = None

    @property
    def where(self) -> str:
        return f"convert tensorrt {self.model}"


@dataclass(frozen=True)
class Build:
    """A finished engine's facts; ``layers`` come from the builder itself.

    Attributes:
        tables: layer tables in ``layers``, one after another: TensorRT-RTX has one a profile.
        settings: what was set on the builder, for the manifest.
    """

    engine: Path
    seconds: float
    version: str
    network_layers: int
    layers: tuple[Layer, ...]
    tables: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plugin_layers(self) -> tuple[int, ...]:
        """Return the places of plugins in the layer table."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.type in PLUGIN_TYPES)


def build_engine(sdk: SDK, request: Request, engine: Path) -> Build:
    """Build an engine in a child process, because TensorRT can end its process.

    Args:
        sdk: which library.
        engine: file to write, in a folder of its own.

    Raises:
        ConversionError: with the builder's last words; the end of its log goes to stderr.
    """
    folder = engine.parent
    asked, result, log = (folder / f"build.{what}" for what in ("request", "result", "log"))
    asked.write_text(json.dumps(_to_json(sdk, request, engine)), encoding="utf-8")
    try:
        code = _run_child(sdk, request, asked, result, log)
        built = _read(request, engine, result, code, _text(log))
    except ConversionError:
        print("\n".join(_text(log).splitlines()[-_LOG_TAIL:]), file=sys.stderr)
        engine.unlink(missing_ok=True)
        raise
    for leftover in (asked, result, log):
        leftover.unlink()
    return built


def _run_child(sdk: SDK, request: Request, asked: Path, result: Path, log: Path) -> int:
    """Run the builder's process to its end; returns its exit code."""
    folder = asked.parent
    # Relative names: the length of a path moves addresses, and they are in the engine.
    module = "flowexport.targets.tensorrt.build"
    steps = os.dup(2)  # a converter's log: who shows progress reads it there
    command = [sys.executable, "-P", "-m", module, asked.name, result.name, str(steps)]
    environment = None
    if request.plugin is not None:
        environment = builder_environment(sdk.module, folder / "lib", start=folder)
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            pass_fds=(steps,),
        )
        os.close(steps)
        try:
            return child.wait(request.timeout)
        except subprocess.TimeoutExpired:
            raise ConversionError(
                f"{request.where}: the build took more than {request.timeout:g} s.",
                fix="raise the option 'timeout'",
            ) from None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def _read(request: Request, engine: Path, result: Path, code: int, log: str) -> Build:
    """Return what was built, its plugins counted, or raise with what the child said."""
    found = _found(result, code, request.where, log)
    layers = parse_layers(log)
    if found["layers"] is not None:
        layers = tuple(Layer(**one) for one in found["layers"])
    if not layers:
        raise ConversionError(f"{request.where}: the builder's log has no layer table.")
    built = Build(
        engine=engine,
        seconds=found["seconds"],
        version=found["version"],
        network_layers=found["network_layers"],
        layers=layers,
        tables=found["tables"],
        settings=found["settings"],
    )
    expected = built.tables * (request.plugin.expected if request.plugin else 0)
    if len(built.plugin_layers) != expected:
        raise ConversionError(
            f"{request.where}: the engine has {len(built.plugin_layers)} plugin layers;"
            f" expected {expected}, one a FlowAttention node and profile.",
            fix="--no-plugin builds the attention from TensorRT's own layers",
        )
    return built


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _to_json(sdk: SDK, request: Request, engine: Path) -> dict[str, Any]:
    folder = engine.parent
    plugin = request.plugin and {
        "expected": request.plugin.expected,
        "library": request.plugin.library and os.path.relpath(request.plugin.library, folder),
        "embed": request.plugin.embed,
    }
    return {
        "module": sdk.module,
        "rtx": sdk.rtx,
        "where": request.where,
        "onnx": os.path.relpath(request.onnx, folder),
        "engine": engine.name,
        "profiles": [
            {name: [list(s) for s in three] for name, three in shapes.items()}
            for shapes in request.profiles
        ],
        "plugin": plugin,
        "compute_capabilities": list(request.compute_capabilities),
        "aux_streams": request.aux_streams,
        "hardware_compatibility": request.hardware_compatibility,
        "version_compatible": request.version_compatible,
        "refit": request.refit,
        "timing_cache": request.timing_cache and str(request.timing_cache.absolute()),
    }


def _found(result: Path, code: int, where: str, log: str) -> dict[str, Any]:
    """Return what the child wrote, or raise with what it said."""
    if not result.exists():
        raise ConversionError(f"{where}: the builder {_ended(code)}.{_last_words(log)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "refused" in found:
        raise ConversionError(found["refused"], fix=found["fix"])
    if "error" in found:
        memory = "memory" in found["error"] or _OUT_OF_MEMORY.search(log)
        raise ConversionError(
            f"{where}: {found['error']}.{_last_words(log)}", fix=_MEMORY_FIX if memory else None
        )
    return found


_OUT_OF_MEMORY = re.compile(r"std::bad_alloc|OutOfMemory|out of memory", re.IGNORECASE)
_MEMORY_FIX = "give the build more memory, or smaller maxima in the option 'profiles'"


def parse_layers(log: str) -> tuple[Layer, ...]:
    """Return the layer table of a verbose log (``ProfilingVerbosity.DETAILED``)."""
    lines = iter(log.splitlines())
    for line in lines:
        if _PREFIX.sub("", line).strip() == "Layers:":
            break
    layers = []
    for line in lines:
        found = _LAYER.match(line)
        if found is None:
            break
        layers.append(Layer(found["name"], found["type"]))
    return tuple(layers)


def _ended(code: int) -> str:
    if code < 0:
        hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
        return f"process died of signal {signal.Signals(-code).name}{hint}"
    return f"process ended with code {code}"


def _last_words(log: str, count: int = 5) -> str:
    """Return the log's last errors and unlabelled lines, which is what an abort leaves."""
    said = []
    for line in log.splitlines():
        prefix = _PREFIX.match(line)
        if line.strip() and (prefix is None or prefix["level"] in "EF"):
            said.append(_PREFIX.sub("", line).strip()[:300])
    return " The builder's last lines: " + " | ".join(said[-count:]) if said else ""
