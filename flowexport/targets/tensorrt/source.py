"""The ONNX file as TensorRT takes it: with the plugin's nodes, or all inlined."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flowexport.core.errors import ConversionError
from flowexport.ops.flow_attention.tensorrt.plugin_fields import NAME, NAMESPACE, VERSION
from flowexport.targets.onnx.function import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def plugin_nodes(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that the plugin computes."""
    return [n for n in model.graph.node if n.domain == DOMAIN and n.op_type == NAME]


def with_plugin(path: Path, folder: Path, where: str) -> tuple[Path, int]:
    """Return the file for a build with the plugin, and how many nodes are the plugin's.

    The file itself where it has no other functions; else a copy in ``folder``
    with those inlined, because TensorRT finds functions by name alone.

    Raises:
        ConversionError: a node asks for a plugin that is not this one, which
            TensorRT would inline silently.
    """
    import onnx
    import onnx.inliner

    model = onnx.load(path)
    nodes = plugin_nodes(model)
    for node in nodes:
        _check(node, where)
    others = [(f.domain, f.name) for f in model.functions if (f.domain, f.name) != (DOMAIN, NAME)]
    if not others:
        return path, len(nodes)
    inlined = onnx.inliner.inline_selected_functions(model, others)
    return _write(inlined, folder / "plugin.onnx"), len(plugin_nodes(inlined))


def without_plugin(path: Path, folder: Path) -> Path:
    """Return a copy of the file with every function inlined.

    Left in place, TensorRT would give every node the first function's body: it
    looks at the name and not at the overload.
    """
    import onnx

    from flowexport.targets.onnx.read import inline

    return _write(inline(onnx.load(path)), folder / "inlined.onnx")


def too_wide(shapes: Iterable[tuple[int | str, ...]], most: int) -> str | None:
    """Return why the kernel cannot take attentions of these q and v shapes, or None."""
    for shape in shapes:
        width = shape[-1]
        if not isinstance(width, int) or width > most:
            return f"an attention has width {width}; the kernel takes a fixed width up to {most}"
    return None


def _check(node: NodeProto, where: str) -> None:
    import onnx

    given = {
        a.name: onnx.helper.get_attribute_value(a)
        for a in node.attribute
        if a.name in ("plugin_namespace", "plugin_version")
    }
    found = {k: v.decode() if isinstance(v, bytes) else str(v) for k, v in given.items()}
    if found != {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}:
        raise ConversionError(
            f"{where}: node {node.name} has the plugin attributes {found}; expected"
            f" plugin_namespace={NAMESPACE!r} and plugin_version={VERSION!r}: TensorRT inlines"
            " a node of another version and says nothing.",
            fix="convert the model again, or --no-plugin to have every node inlined",
        )


def _write(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path
