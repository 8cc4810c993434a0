"""Running the builder in a process of its own, and reading its log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowexport.core.errors import ConversionError
from flowexport.targets.tensorrt.sdk import SDK

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), ")
_PREFIX = re.compile(r"^(\[[^]]*\] )?\[TRT[^]]*\] \[(?P<level>[A-Z])\] ")


@dataclass(frozen=True)
class Layer:
    """One layer of the finished engine, as the builder names it."""

    name: str
    type: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Build:
    """A finished engine's facts; ``layers`` come from the builder's own table."""

    engine: Path
    seconds: float
    version: str
    compute_capabilities: tuple[str, ...]
    network_layers: int
    layers: tuple[Layer, ...]


def build_engine(
    sdk: SDK,
    onnx: Path,
    engine: Path,
    *,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    compute_capabilities: Sequence[str],
    timeout: float,
    model: str,
) -> Build:
    """Build an engine in a child process, because the parser can end its process.

    Args:
        sdk: which library.
        onnx: the file; precision is as it says (strongly typed).
        engine: file to write, in a folder of its own.
        shapes: minimum, optimum and maximum shape of each dynamic input.
        compute_capabilities: GPU generations, for TensorRT-RTX.
        timeout: seconds.
        model: name for messages.

    Raises:
        ConversionError: with the builder's last words.
    """
    folder = engine.parent
    request, result, log = (folder / f"build.{what}" for what in ("request", "result", "log"))
    request.write_text(
        json.dumps(
            {
                "module": sdk.module,
                "rtx": sdk.rtx,
                "onnx": os.path.relpath(onnx, folder),
                "engine": engine.name,
                "shapes": {name: [list(s) for s in three] for name, three in shapes.items()},
                "compute_capabilities": list(compute_capabilities),
            }
        ),
        encoding="utf-8",
    )
    # Relative names: the length of a path moves addresses, and they are in the engine.
    script = str(Path(__file__).with_name("build.py"))
    command = [sys.executable, "-P", script, request.name, result.name]
    where = f"convert tensorrt {model}"
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ConversionError(
                f"{where}: the build took more than {timeout:g} s.",
                fix="raise the option 'timeout'",
            ) from None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if not result.exists():
        raise ConversionError(f"{where}: the builder {_ended(code)}.{_last_words(text)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise ConversionError(f"{where}: {found['error']}.{_last_words(text)}")
    layers = parse_layers(text)
    if not layers:
        raise ConversionError(f"{where}: the builder's log has no layer table.{_last_words(text)}")
    for leftover in (request, result, log):
        leftover.unlink()
    return Build(
        engine=engine,
        seconds=found["seconds"],
        version=found["version"],
        compute_capabilities=tuple(found["compute_capabilities"]),
        network_layers=found["network_layers"],
        layers=layers,
    )


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
        return f"process died of signal {signal.Signals(-code).name}"
    return f"process ended with code {code}"


def _last_words(log: str, count: int = 5) -> str:
    """Return the log's last errors and unlabelled lines, which is what an abort leaves."""
    said = []
    for line in log.splitlines():
        prefix = _PREFIX.match(line)
        if line.strip() and (prefix is None or prefix["level"] in "EF"):
            said.append(_PREFIX.sub("", line).strip()[:300])
    return " The builder's last lines: " + " | ".join(said[-count:]) if said else ""
