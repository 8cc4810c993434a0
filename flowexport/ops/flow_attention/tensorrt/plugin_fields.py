"""What the plugin's fields, shapes and kernels mean; nothing here imports TensorRT."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import InputError, UnavailableError
from flowexport.ops.flow_attention.tensorrt.build import (
    build_cuda,
    cache_dir,
    cached_cuda,
    source_hash,
)
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary
from flowexport.ops.flow_attention.variant import FlowVariant

NAME = "FlowAttention"
NAMESPACE = "flowexport"
VERSION = "1"

TEXT_FIELDS = ("feature_map", "flow_axis", "competition_axis")
FLOAT_FIELDS = ("eps", "outer_eps")
ATTRIBUTES = (*TEXT_FIELDS, *FLOAT_FIELDS, "causal", "clamp")
SOURCE_FIELD, CODE_FIELD = "kernel_source_sha256", "kernel_library"


@dataclass
class Kernels:
    """Where plugins find the compiled kernel.

    Attributes:
        library: a compiled CUDA library; looked up or built when None.
        embed: put ``library``'s bytes into engines that are built.
        allow_embedded: run the native code an engine carries. Only for
            engines you trust like a program you install.
        capability: of the GPU that runs the kernel, as ``"89"``; None compiles for all.
        failures: what plugins refused, in words.
        created: the variant of each plugin that the ONNX parser made, by node name.
        embedded_once: whether a plugin of this build carries the library already.
        embedded: the library that a plugin of a loaded engine carried.
    """

    library: Path | None = None
    embed: bool = False
    allow_embedded: bool = False
    capability: str | None = None
    failures: list[str] = field(default_factory=list)
    created: dict[str, FlowVariant] = field(default_factory=dict)
    embedded_once: bool = False
    embedded: bytes = b""


def parse_fields(fields: Mapping[str, Any]) -> FlowVariant:
    """Read the variant from plugin fields or ONNX attributes, by name.

    Args:
        fields: text fields as str or bytes, numbers as arrays of one element,
            ``clamp`` as two floats or absent.

    Raises:
        InputError: a field has another size or a value nobody published.
    """

    def text(name: str, default: str) -> str:
        value = fields.get(name, default)
        if isinstance(value, np.ndarray):
            value = value.tobytes()
        return (value.decode() if isinstance(value, bytes) else str(value)).rstrip("\0")

    def numbers(name: str, count: int) -> list[float] | None:
        if name not in fields:
            return None
        value = np.atleast_1d(np.asarray(fields[name], dtype=np.float64))
        if value.size == 0:
            return None
        if value.size != count:
            raise InputError(
                f"plugin {NAME}: field {name} has {value.size} values; expected {count}."
            )
        return [float(x) for x in value]

    default = FlowVariant()
    clamp = numbers("clamp", 2)
    causal = numbers("causal", 1)
    return FlowVariant(
        feature_map=text("feature_map", default.feature_map),
        clamp=None if clamp is None else (clamp[0], clamp[1]),
        eps=(numbers("eps", 1) or [default.eps])[0],
        outer_eps=(numbers("outer_eps", 1) or [default.outer_eps])[0],
        causal=bool(causal and causal[0]),
        flow_axis=text("flow_axis", default.flow_axis),
        competition_axis=text("competition_axis", default.competition_axis),
    )


def check_shapes(shapes: Sequence[Sequence[int]], where: str = f"plugin {NAME}") -> None:
    """Raise InputError unless shapes are q, k, v's; -1 stands for a dimension not yet known."""
    if len(shapes) != 3 or any(len(s) != 4 for s in shapes):
        raise InputError(
            f"{where}: inputs have shapes {[tuple(s) for s in shapes]};"
            " expected q, k, v of 4 dimensions (B, N, H, D)."
        )
    q, k, v = shapes
    for what, members in (
        ("batch", (q[0], k[0], v[0])),
        ("heads", (q[2], k[2], v[2])),
        ("source tokens", (k[1], v[1])),
        ("width", (q[3], k[3])),
    ):
        if len({m for m in members if m >= 0}) > 1:
            raise InputError(f"{where}: {what} are {members}; expected one number.")
    for what, width in (("width", q[3]), ("value width", v[3])):
        if not 1 <= width <= 128:
            raise InputError(f"{where}: {what} is {width}; expected a fixed number from 1 to 128.")


def find_kernel(wanted: str, kernels: Kernels) -> KernelLibrary:
    """Return the CUDA library for the source hash an engine was built with.

    Raises:
        UnavailableError: there is none, and none can be compiled here.
    """
    if kernels.library is not None:
        return KernelLibrary(kernels.library)
    if (path := cached_cuda(kernels.capability, wanted)) is not None:
        return KernelLibrary(path)
    if kernels.embedded and kernels.allow_embedded:
        embedded = kernels.embedded
        digest = hashlib.sha256(embedded).hexdigest()
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"embedded-{digest}.so"
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            handle, partial = tempfile.mkstemp(dir=folder, suffix=".so")
            with os.fdopen(handle, "wb") as stream:
                stream.write(embedded)
            Path(partial).replace(path)
        return KernelLibrary(path)
    if wanted == source_hash():
        one = () if kernels.capability is None else ((kernels.capability,),)
        return KernelLibrary(build_cuda(*one))
    raise UnavailableError(
        f"plugin {NAME}: the engine was built with kernel source {wanted[:16]}, this is"
        f" {source_hash()[:16]}; expected the same.",
        fix="build the engine again, or pass the kernel library it was built with",
    )
