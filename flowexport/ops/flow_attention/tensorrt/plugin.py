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

from collections.abc import Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError
from flowexport.ops.flow_attention.tensorrt.build import source_hash
from flowexport.ops.flow_attention.tensorrt.kernel import KernelLibrary, problem
from flowexport.ops.flow_attention.tensorrt.plugin_fields import (
    ATTRIBUTES,
    CODE_FIELD,
    FLOAT_FIELDS,
    NAME,
    NAMESPACE,
    SOURCE_FIELD,
    TEXT_FIELDS,
    VERSION,
    Kernels,
    check_shapes,
    find_kernel,
    parse_fields,
)
from flowexport.ops.flow_attention.tensorrt.workspace import workspace_bytes
from flowexport.ops.flow_attention.variant import FlowVariant


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
                *((name, getattr(v, name).encode(), "CHAR") for name in TEXT_FIELDS),
                *(
                    (name, np.array([getattr(v, name)], np.float32), "FLOAT32")
                    for name in FLOAT_FIELDS
                ),
                ("causal", np.array([int(v.causal)], np.int32), "INT32"),
                (SOURCE_FIELD, self.source.encode(), "CHAR"),
            ]
            if v.clamp is not None:
                fields.append(("clamp", np.array(v.clamp, np.float32), "FLOAT32"))
            if self.embedded:
                fields.append((CODE_FIELD, self.embedded, "CHAR"))
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
                    *(trt.PluginField(name, b"", kinds.CHAR) for name in TEXT_FIELDS),
                    *(
                        trt.PluginField(n, np.array([]), kinds.FLOAT32)
                        for n in (*FLOAT_FIELDS, "clamp")
                    ),
                    trt.PluginField("causal", b"", kinds.INT32),
                ]
            )
            self.kernels = kernels

        @_told
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {one.name: one.data for one in fields}
            known = {*ATTRIBUTES, SOURCE_FIELD, CODE_FIELD, "plugin_version", "plugin_namespace"}
            if unknown := sorted(set(found) - known):
                raise InputError(
                    f"plugin {NAME} {name}: unknown field {unknown[0]!r};"
                    f" expected one of {sorted(ATTRIBUTES)}."
                )
            variant = parse_fields({k: v for k, v in found.items() if k in ATTRIBUTES})
            kernels = self.kernels
            source, embedded = source_hash(), b""
            if phase == trt.TensorRTPhase.BUILD:
                kernels.created[name] = variant
                if kernels.embed and kernels.library and not kernels.embedded_once:
                    embedded = kernels.library.read_bytes()
                    kernels.embedded_once = True
            else:
                # The C++ plugin writes no hash: its kernel is built in.
                source = bytes(found.get(SOURCE_FIELD, b"")).decode().rstrip("\0") or source_hash()
                embedded = bytes(found.get(CODE_FIELD, b""))
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
    capability: str | None = None,
) -> Kernels:
    """Register the plugin with a TensorRT module; once a process, later calls change settings.

    Args:
        trt: the imported ``tensorrt`` or ``tensorrt_rtx``, after its one
            logger was made.
        library: a compiled CUDA library (``build.build_cuda``); without it
            engines are built all the same and running them looks it up.
        embed: put the library into engines.
        allow_embedded: run native code that engines carry.
        capability: of the GPU that runs engines, as ``"89"``.

    Returns:
        The settings; ``failures`` gathers what plugins refused, in words,
        ``created`` the variant of every node that became a plugin.

    Raises:
        InputError: ``embed`` without a library, or the registry refused.
    """
    if embed and library is None:
        raise InputError(f"plugin {NAME}: embed needs a library; expected its path.")
    kernels = Kernels(library, embed, allow_embedded, capability)
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
    said = "; ".join(creator.kernels.failures) if creator else ""
    if trt.get_plugin_registry().get_creator(NAME, VERSION, NAMESPACE) is None:
        said = "no plugin is registered"
    raise ConversionError(
        f"{where}: the network has {found} FlowAttention plugin layers; expected {expected},"
        f" one a node{f' ({said})' if said else ''}.",
        fix=f"the nodes need plugin_namespace={NAMESPACE!r} and plugin_version={VERSION!r}",
    )
