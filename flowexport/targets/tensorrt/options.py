"""What a recipe may say under ``targets.tensorrt``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, TensorSpec
from flowexport.targets.onnx.options import KEYS as ONNX_KEYS
from flowexport.targets.onnx.options import OnnxOptions

KEYS = (*ONNX_KEYS, "profile", "compute_capabilities", "timeout", "check_rebuild")
# RTX also knows 7.5, which refuses float32 matrix products, and 12.1.
DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
CAPABILITIES = ("7.5", *DEFAULT_CAPABILITIES, "12.1")

Range = tuple[int, int, int]


@dataclass(frozen=True)
class TensorRTOptions:
    """Settings of one engine.

    Attributes:
        onnx: settings of the ONNX file it is built from.
        profile: (minimum, optimum, maximum) of each dynamic dimension by name.
        compute_capabilities: GPU generations that the engine is built for
            (TensorRT-RTX; full TensorRT builds for the GPU that is present).
        timeout: seconds one build may take.
        check_rebuild: build twice and compare the bytes.
    """

    onnx: OnnxOptions = field(default_factory=OnnxOptions)
    profile: Mapping[str, Range] = field(default_factory=lambda: {"batch": (1, 1, 8)})
    compute_capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
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
        settings = cls(onnx=OnnxOptions.parse(onnx, "tensorrt"))
        if "profile" in extra:
            settings = replace(settings, profile={**settings.profile, **_profile(extra["profile"])})
        if "compute_capabilities" in extra:
            settings = replace(
                settings, compute_capabilities=_capabilities(extra["compute_capabilities"])
            )
        if "timeout" in extra:
            timeout = extra["timeout"]
            if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
                raise InputError(f"tensorrt: timeout is {timeout!r}; expected seconds above 0.")
            settings = replace(settings, timeout=float(timeout))
        if "check_rebuild" in extra:
            if not isinstance(extra["check_rebuild"], bool):
                raise InputError(
                    f"tensorrt: check_rebuild is {extra['check_rebuild']!r};"
                    " expected true or false."
                )
            settings = replace(settings, check_rebuild=extra["check_rebuild"])
        return settings

    def shapes(self, specs: tuple[TensorSpec, ...], model: str) -> dict[str, list[list[int]]]:
        """Return the optimization profile: minimum, optimum and maximum shape an input.

        Raises:
            InputError: a dynamic dimension has no range.
        """
        result = {}
        for spec in specs:
            if missing := [d for d in spec.shape if isinstance(d, str) and d not in self.profile]:
                raise InputError(
                    f"convert tensorrt {model}: input {spec.name} has the dynamic dimension"
                    f" {missing[0]!r} and the profile has {sorted(self.profile)};"
                    " expected a range for each.",
                    fix=f"set targets.tensorrt.profile.{missing[0]} to [min, opt, max]",
                )
            if spec.dynamic:
                result[spec.name] = [
                    [self.profile[d][i] if isinstance(d, str) else d for d in spec.shape]
                    for i in range(3)
                ]
        return result


def _profile(value: Any) -> dict[str, Range]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"tensorrt: profile is {value!r}; expected dimension names with [min, opt, max]."
        )
    result = {}
    for name, sizes in value.items():
        whole = isinstance(sizes, (list, tuple)) and all(type(s) is int for s in sizes)
        if not whole or len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise InputError(
                f"tensorrt: profile.{name} is {sizes!r};"
                " expected [min, opt, max] with 1 <= min <= opt <= max."
            )
        result[str(name)] = (sizes[0], sizes[1], sizes[2])
    return result


def _capabilities(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(
            f"tensorrt: compute_capabilities is {value!r};"
            f" expected a list of {', '.join(CAPABILITIES)}."
        )
    for one in value:
        if str(one) not in CAPABILITIES:
            raise UnknownNameError("compute capability", str(one), CAPABILITIES, where="tensorrt")
    return tuple(dict.fromkeys(str(one) for one in value))
