"""What a recipe may say under ``targets.tensorrt``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, TensorSpec
from flowexport.targets.onnx.options import KEYS as ONNX_KEYS
from flowexport.targets.onnx.options import OnnxOptions
from flowexport.targets.tensorrt.adapter import HARDWARE
from flowexport.targets.tensorrt.sdk import SDK

# RTX also knows 7.5, which refuses float32 matrix products, and 12.1.
DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
CAPABILITIES = ("7.5", *DEFAULT_CAPABILITIES, "12.1")

FULL_ONLY = ("hardware_compatibility", "version_compatible", "refit", "timing_cache")
"""Options that TensorRT-RTX does not have, or has in name only."""

Range = tuple[int, int, int]


@dataclass(frozen=True)
class TensorRTOptions:
    """Settings of one engine.

    Attributes:
        onnx: settings of the ONNX file it is built from.
        profiles: optimization profiles: (minimum, optimum, maximum) of each
            dynamic dimension by name. The first one has ``batch`` if the
            recipe's does not.
        plugin: whether attentions become the fused plugin; None takes it
            unless this machine has a GPU and no way to get the kernel.
        plugin_library: the C++ plugin library to build with; None takes the
            Python plugin, the same in every field.
        embed_library: whether the engine carries that library.
        compute_capabilities: GPU generations that the engine is built for
            (TensorRT-RTX; full TensorRT builds for the GPU that is present).
        aux_streams: streams beside the caller's that TensorRT may use.
        hardware_compatibility: ``none``, ``ampere_plus`` or ``same_compute_capability``.
        version_compatible: the engine runs on later versions; it then carries code.
        refit: weights can be replaced in the engine.
        timing_cache: file that keeps measured tactics from build to build.
        timeout: seconds one build may take.
        check_rebuild: build twice and compare the bytes.
    """

    onnx: OnnxOptions = field(default_factory=OnnxOptions)
    profiles: tuple[Mapping[str, Range], ...] = ({"batch": (1, 1, 8)},)
    plugin: bool | None = None
    plugin_library: Path | None = None
    embed_library: bool = False
    compute_capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    aux_streams: int = 0
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    timing_cache: Path | None = None
    timeout: float = 3600.0
    check_rebuild: bool = True

    @classmethod
    def parse(cls, options: Options) -> TensorRTOptions:
        """Read a recipe's options.

        Raises:
            InputError, UnknownNameError: naming the supported choices.
        """
        extra = options.extra
        for key in extra:
            if key not in KEYS:
                raise UnknownNameError("option", key, KEYS, where="tensorrt")
        onnx = replace(options, extra={k: v for k, v in extra.items() if k in ONNX_KEYS})
        settings = cls(
            onnx=OnnxOptions.parse(onnx, "tensorrt"),
            **{k: _READ[k](k, v) for k, v in extra.items() if k in _READ},
        )
        if settings.embed_library and settings.plugin_library is None:
            raise InputError(
                "tensorrt: embed_library is true and there is no plugin_library; expected its path."
            )
        if settings.plugin is False and settings.plugin_library is not None:
            raise InputError(
                "tensorrt: plugin_library is given and plugin is false; expected one of the two."
            )
        return settings

    def check_library(self, library: SDK) -> None:
        """Raise InputError where an option is full TensorRT's and the library is not."""
        asked = [k for k in FULL_ONLY if getattr(self, k) not in (None, False, "none")]
        if library.rtx and asked:
            raise InputError(
                f"tensorrt: {asked[0]} is asked for; {library.label} does not have it.",
                fix="pip install 'flowexport[tensorrt-full]' on a machine with a GPU",
            )

    def shapes(self, specs: tuple[TensorSpec, ...], model: str) -> list[dict[str, list[list[int]]]]:
        """Return one mapping a profile: minimum, optimum and maximum shape of each dynamic input.

        Raises:
            InputError: a dynamic dimension has no range.
        """
        return [found for p in self.profiles if (found := _shapes(p, specs, model))]


def _shapes(
    profile: Mapping[str, Range], specs: tuple[TensorSpec, ...], model: str
) -> dict[str, list[list[int]]]:
    result = {}
    for spec in specs:
        if missing := [d for d in spec.shape if isinstance(d, str) and d not in profile]:
            raise InputError(
                f"convert tensorrt {model}: input {spec.name} has the dynamic dimension"
                f" {missing[0]!r} and a profile has {sorted(profile)};"
                " expected a range for each.",
                fix=f"set {missing[0]}: [min, opt, max] in targets.tensorrt.profiles",
            )
        if spec.dynamic:
            result[spec.name] = [
                [profile[d][i] if isinstance(d, str) else d for d in spec.shape] for i in range(3)
            ]
    return result


def _profiles(key: str, value: Any) -> tuple[dict[str, Range], ...]:
    several = value if isinstance(value, (list, tuple)) else [value]
    if not several or not all(isinstance(one, Mapping) for one in several):
        raise InputError(
            f"tensorrt: profiles is {value!r}; expected dimension names with [min, opt, max],"
            " or a list of such."
        )
    return tuple({"batch": (1, 1, 8), **_profile(one)} for one in several)


def _profile(value: Mapping[str, Any]) -> dict[str, Range]:
    result = {}
    for name, sizes in value.items():
        whole = isinstance(sizes, (list, tuple)) and all(type(s) is int for s in sizes)
        if not whole or len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise InputError(
                f"tensorrt: profiles.{name} is {sizes!r};"
                " expected [min, opt, max] with 1 <= min <= opt <= max."
            )
        result[str(name)] = (sizes[0], sizes[1], sizes[2])
    return result


def _capabilities(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(
            f"tensorrt: compute_capabilities is {value!r};"
            f" expected a list of {', '.join(CAPABILITIES)}."
        )
    for one in value:
        if str(one) not in CAPABILITIES:
            raise UnknownNameError("compute capability", str(one), CAPABILITIES, where="tensorrt")
    return tuple(dict.fromkeys(str(one) for one in value))


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"tensorrt: {key} is {value!r}; expected true or false.")
    return value


def _plugin(key: str, value: Any) -> bool | None:
    return None if value == "auto" else _flag(key, value)


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise InputError(f"tensorrt: {key} is {value!r}; expected seconds above 0.")
    return float(value)


def _count(key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 16:
        raise InputError(f"tensorrt: {key} is {value!r}; expected a whole number from 0 to 16.")
    return value


def _level(key: str, value: Any) -> str:
    if value not in HARDWARE:
        raise UnknownNameError(key, str(value), HARDWARE, where="tensorrt")
    return str(value)


def _library(key: str, value: Any) -> Path:
    path = Path(str(value)).absolute()
    if not path.is_file():
        raise InputError(
            f"tensorrt: {key} is {value}, which is no file; expected the built C++ plugin.",
            fix="build it with CMake (flowexport/ops/flow_attention/tensorrt/README.md), or leave"
            f" {key} out to build with the Python plugin",
        )
    return path


def _file(key: str, value: Any) -> Path:
    path = Path(str(value)).absolute()
    if not path.parent.is_dir():
        raise InputError(f"tensorrt: {key} is {value}; expected a file in a folder that exists.")
    return path


_READ: Mapping[str, Any] = {
    "profiles": _profiles,
    "plugin": _plugin,
    "plugin_library": _library,
    "embed_library": _flag,
    "compute_capabilities": _capabilities,
    "aux_streams": _count,
    "hardware_compatibility": _level,
    "version_compatible": _flag,
    "refit": _flag,
    "timing_cache": _file,
    "timeout": _seconds,
    "check_rebuild": _flag,
}
KEYS = (*ONNX_KEYS, *_READ)
