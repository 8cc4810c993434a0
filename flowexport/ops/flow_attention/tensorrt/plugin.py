"""``flowexport::FlowAttention`` version 1 as a Python TensorRT plugin (IPluginV3, V3ONE).

The C++ library in ``plugin_cpp/`` is the same plugin, same fields, same kernel;
this one needs no TensorRT headers, so it is what the builder registers where
the library is not there. It works with ``tensorrt`` and ``tensorrt_rtx``.

Inputs q (B, L, H, D), k (B, S, H, D), v (B, S, H, M); output (B, L, H, M);
linear, one of float32, float16, bfloat16 for all four. The kernel itself is
needed only where an engine runs: it is looked up by the hash of its source,
which every engine carries, or taken from the engine when embedding was asked
for and running embedded code is allowed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError, UnavailableError
from flowexport.ops.flow_attention.tensorrt.build import build_cuda, cache_dir, source_hash
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary, problem
from flowexport.ops.flow_attention.tensorrt.workspace import workspace_bytes
from flowexport.ops.flow_attention.variant import FlowVariant

NAME = "FlowAttention"
NAMESPACE = "flowexport"
VERSION = "1"

_TEXT = ("feature_map", "flow_axis", "competition_axis")
_FLOAT = ("eps", "outer_eps")
_ATTRIBUTES = (*_TEXT, *_FLOAT, "causal", "clamp")
_SOURCE, _CODE = "kernel_source_sha256", "kernel_library"


@dataclass
class Kernels:
    """Where plugins find the compiled kernel.

    Attributes:
        library: a compiled CUDA library; looked up or built when None.
        embed: put ``library``'s bytes into engines that are built.
        allow_embedded: run the native code an engine carries. Only for
            engines you trust like a program you install.
        failures: what plugins refused, in words.
        created: the variant of each plugin that the ONNX parser made, by node name.
        embedded_once: whether a plugin of this build carries the library already.
        embedded: the library that a plugin of a loaded engine carried.
    """

    library: Path | None = None
    embed: bool = False
    allow_embedded: bool = False
    failures: list[str] = field(default_factory=list)
    created: dict[str, FlowVariant] = field(default_factory=dict)
    embedded_once: bool = False
    embedded: bytes = b""


def _told(method: Any) -> Any:
    """Keep the words of what a callback raises: TensorRT prints an exception and goes on."""

    @wraps(method)
    def wrapper(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as error:
            if str(error) not in self.kernels.failures:
                self.kernels.failures.append(str(error))
            raise

    return wrapper


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
    for path in sorted(cache_dir().glob(f"flow_attention-sm*-{wanted[:16]}.so")):
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
        return KernelLibrary(build_cuda())
    raise UnavailableError(
        f"plugin {NAME}: the engine was built with kernel source {wanted[:16]}, this is"
        f" {source_hash()[:16]}; expected the same.",
        fix="build the engine again, or pass the kernel library it was built with",
    )


@cache
def _plugin_class(trt: Any) -> type:
    """Make the plugin class for one of the two TensorRT modules."""
    types = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}

    def shape(desc: Any) -> tuple[int, ...]:
        return tuple(int(x) for x in desc)

    class FlowAttentionPlugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """One FlowAttention node; see the module's docstring."""

        def __init__(
            self, variant: FlowVariant, kernels: Kernels, source: str, embedded: bytes
        ) -> None:
            for base in FlowAttentionPlugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = NAME, NAMESPACE
            self.plugin_version, self.num_outputs = VERSION, 1
            self.variant, self.kernels = variant, kernels
            self.source, self.embedded = source, embedded
            self.kernel: KernelLibrary | None = None

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = FlowAttentionPlugin(self.variant, self.kernels, self.source, self.embedded)
            copy.kernel = self.kernel
            return copy

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        @_told
        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
        ) -> list[Any]:
            if len(inputs) != 3 or any(len(x) != 4 for x in inputs):
                ranks = [len(x) for x in inputs]
                raise InputError(
                    f"plugin {NAME}: inputs have {ranks} dimensions; expected q, k, v of 4."
                )
            result = trt.DimsExprs(4)
            for axis, source in enumerate((0, 0, 0, 2)):
                result[axis] = inputs[source][axis]
            return [result]

        def supports_format_combination(
            self, position: int, tensors: Sequence[Any], num_inputs: int
        ) -> bool:
            one, first = tensors[position].desc, tensors[0].desc
            linear = one.format == trt.TensorFormat.LINEAR
            return linear and one.type in types and one.type == first.type

        @_told
        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            check_shapes([shape(x.desc.dims) for x in inputs])
            for bound in ("min", "max"):
                self._check([shape(getattr(x, bound)) for x in inputs], "float32")

        def _check(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> int:
            check_shapes(shapes)
            (q, k, v) = shapes
            needs_same = self.variant.causal or self.variant.flow_axis == "heads"
            if needs_same and q[1] != k[1]:
                raise InputError(
                    f"plugin {NAME}: q has {q[1]} tokens and k {k[1]}; expected as many"
                    " (the variant is causal or sums over heads)."
                )
            return workspace_bytes(problem(q, k, v, dtype, self.variant))

        @_told
        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return self._check([shape(x.max) for x in inputs], "float32")

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            return None

        @_told
        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self._check([shape(x.dims) for x in inputs], types[inputs[0].type])

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            v = self.variant
            fields = [
                *((name, getattr(v, name).encode(), "CHAR") for name in _TEXT),
                *((name, np.array([getattr(v, name)], np.float32), "FLOAT32") for name in _FLOAT),
                ("causal", np.array([int(v.causal)], np.int32), "INT32"),
                (_SOURCE, self.source.encode(), "CHAR"),
            ]
            if v.clamp is not None:
                fields.append(("clamp", np.array(v.clamp, np.float32), "FLOAT32"))
            if self.embedded:
                fields.append((_CODE, self.embedded, "CHAR"))
            self._data = [data for _, data, _ in fields]  # TensorRT keeps pointers only
            self._fields = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, data, getattr(trt.PluginFieldType, kind))
                    for name, data, kind in fields
                ]
            )
            return self._fields

        @_told
        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self.kernel is None:
                self.kernel = find_kernel(self.source, self.kernels)
            q, k, v = (shape(x.dims) for x in input_desc)
            described = problem(q, k, v, types[input_desc[0].type], self.variant)
            self.kernel.launch_pointers(
                described,
                *(int(inputs[0]), int(inputs[1]), int(inputs[2]), int(outputs[0])),
                int(workspace),
                self.kernel.workspace(described),
                int(stream),
            )

    return FlowAttentionPlugin


@cache
def _creator_class(trt: Any) -> type:
    class FlowAttentionCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugin from ONNX attributes (build) or an engine's fields (runtime)."""

        def __init__(self, kernels: Kernels) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            kinds = trt.PluginFieldType
            self.field_names = trt.PluginFieldCollection(
                [
                    *(trt.PluginField(name, b"", kinds.CHAR) for name in _TEXT),
                    *(trt.PluginField(n, np.array([]), kinds.FLOAT32) for n in (*_FLOAT, "clamp")),
                    trt.PluginField("causal", np.array([]), kinds.INT32),
                ]
            )
            self.kernels = kernels

        @_told
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {one.name: one.data for one in fields}
            known = {*_ATTRIBUTES, _SOURCE, _CODE, "plugin_version", "plugin_namespace"}
            if unknown := sorted(set(found) - known):
                raise InputError(
                    f"plugin {NAME} {name}: unknown field {unknown[0]!r};"
                    f" expected one of {sorted(_ATTRIBUTES)}."
                )
            variant = parse_fields({k: v for k, v in found.items() if k in _ATTRIBUTES})
            kernels = self.kernels
            source, embedded = source_hash(), b""
            if phase == trt.TensorRTPhase.BUILD:
                kernels.created[name] = variant
                if kernels.embed and kernels.library and not kernels.embedded_once:
                    embedded = kernels.library.read_bytes()
                    kernels.embedded_once = True
            else:
                # The C++ plugin writes no hash: its kernel is built in.
                source = bytes(found.get(_SOURCE, b"")).decode().rstrip("\0") or source_hash()
                embedded = bytes(found.get(_CODE, b""))
                kernels.embedded = embedded or kernels.embedded
            return _plugin_class(trt)(variant, kernels, source, embedded)

    return FlowAttentionCreator


_creators: dict[str, Any] = {}


def register_plugin(
    trt: Any,
    *,
    library: Path | None = None,
    embed: bool = False,
    allow_embedded: bool = False,
) -> Kernels:
    """Register the plugin with a TensorRT module; once a process, later calls change settings.

    Args:
        trt: the imported ``tensorrt`` or ``tensorrt_rtx``, after its one
            logger was made.
        library: a compiled CUDA library (``build.build_cuda``); without it
            engines are built all the same and running them looks it up.
        embed: put the library into engines.
        allow_embedded: run native code that engines carry.

    Returns:
        The settings; ``failures`` gathers what plugins refused, in words,
        ``created`` the variant of every node that became a plugin.

    Raises:
        InputError: ``embed`` without a library, or the registry refused.
    """
    if embed and library is None:
        raise InputError(f"plugin {NAME}: embed needs a library; expected its path.")
    kernels = Kernels(library, embed, allow_embedded)
    creator = _creators.get(trt.__name__)
    if creator is not None:
        creator.kernels = kernels
        return kernels
    creator = _creator_class(trt)(kernels)
    if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise InputError(
            f"plugin {NAME}: {trt.__name__} refused the creator; expected no other plugin"
            f" {NAMESPACE}::{NAME} version {VERSION}.",
            fix="load either the C++ library or the Python plugin, not both",
        )
    _creators[trt.__name__] = creator  # the registry does not keep it alive
    return kernels


def require_plugins(trt: Any, network: Any, expected: int, where: str) -> None:
    """Fail unless the parsed network has one plugin layer for each FlowAttention node.

    TensorRT inlines a node silently when it knows no plugin of the node's
    name, namespace and version.

    Args:
        trt: the TensorRT module.
        network: what the ONNX parser filled.
        expected: FlowAttention nodes in the ONNX file.
        where: ``<stage> <target> <model>`` for the message.

    Raises:
        ConversionError: the numbers differ; the message says why where known.
    """
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    found = sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)
    if found == expected:
        return
    creator = _creators.get(trt.__name__)
    said = "; ".join(creator.kernels.failures) if creator else "no plugin is registered"
    raise ConversionError(
        f"{where}: the network has {found} FlowAttention plugin layers; expected {expected},"
        f" one a node{f' ({said})' if said else ''}.",
        fix=f"the nodes need plugin_namespace={NAMESPACE!r} and plugin_version={VERSION!r}",
    )


def make_rtx_shim(folder: Path) -> Path:
    """Make the folder that lets TensorRT-RTX's parser find its own library.

    With any V3ONE plugin the parser opens the bare name ``libtensorrt_rtx.so``,
    which the wheel does not ship, and the process ends. A symbolic link of
    that name cures it, in a folder that is on ``LD_LIBRARY_PATH`` when the
    process starts.

    Returns:
        ``folder``, made if need be.

    Raises:
        UnavailableError: TensorRT-RTX is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [p for place in places for p in sorted(Path(place).rglob("libtensorrt_rtx.so.*"))]
    if not found:
        raise UnavailableError(
            "plugin: no libtensorrt_rtx.so.* beside the package tensorrt_rtx_libs; expected one.",
            fix="pip install 'flowexport[tensorrt]'",
        )
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libtensorrt_rtx.so"
    if not link.is_symlink() or link.resolve() != found[0].resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(found[0])
    return folder


def builder_environment(
    module: str, folder: Path, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment for a process that builds with the plugin.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        folder: where the link may lie; must outlive the process.
        environment: to start from; this process's own by default.
    """
    result = dict(os.environ if environment is None else environment)
    if module == "tensorrt_rtx":
        paths = [str(make_rtx_shim(folder)), result.get("LD_LIBRARY_PATH", "")]
        result["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in paths if p)
    return result
