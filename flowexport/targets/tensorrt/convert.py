"""From a lowered program to an engine with its layer table."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowexport import __version__
from flowexport.core.errors import ConversionError, FlowExportError, InputError, UnavailableError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Options, Precision
from flowexport.lowering import LoweredProgram
from flowexport.lowering.artifact import finished
from flowexport.ops.flow_attention.tensorrt.build import kernel_problem, source_hash
from flowexport.ops.flow_attention.tensorrt.kernel import MAX_WIDTH
from flowexport.ops.flow_attention.tensorrt.plugin_fields import NAME, NAMESPACE, VERSION
from flowexport.ops.segments import loops
from flowexport.targets.onnx import TARGET as ONNX
from flowexport.targets.onnx.options import KEYS as ONNX_KEYS
from flowexport.targets.tensorrt import sdk
from flowexport.targets.tensorrt.builder import Build, Plugin, Request, build_engine
from flowexport.targets.tensorrt.options import TensorRTOptions
from flowexport.targets.tensorrt.source import too_wide, with_plugin, without_plugin
from flowexport.targets.tensorrt.weights import find_weights

SIDECAR = ".layers.json"
# A rebuild is compared where it costs little; above, the manifest says that it was not.
REBUILD_LIMIT_S = 120.0
# A field's name that every serialised plugin has, the C++ one too: its places in the engine.
MARK = b"competition_axis"


def sidecar_path(engine: Path) -> Path:
    """Return where an engine's layer table lies."""
    return engine.with_suffix(SIDECAR)


@dataclass(frozen=True)
class Decision:
    """Whether the attentions become plugins, and why not where they do not."""

    plugin: bool
    reason: str
    fix: str | None = None


def decide(program: LoweredProgram, settings: TensorRTOptions, capability: str | None) -> Decision:
    """Settle whether to build with the plugin.

    Building needs no kernel. Running does, so with a GPU here that could not
    get one the engine is decomposed, unless the recipe asks for the plugin.

    Args:
        capability: of the GPU that is here, as ``"89"``, or None.

    Raises:
        InputError: the plugin is asked for and cannot compute an attention.
        UnavailableError: it is asked for, and nothing here gives its kernel.
    """
    sites = [s for s in program.attentions if s.op == NAME]
    if not sites:
        return Decision(False, f"the model has no {NAME}")
    if settings.plugin is False:
        return Decision(False, "switched off (--no-plugin)")
    where = f"convert tensorrt {program.model}"
    problem: FlowExportError | None = None
    wide = too_wide([s for site in sites for s in (site.q_shape, site.v_shape)], MAX_WIDTH)
    if wide:
        problem = InputError(f"{where}: {wide}.", fix="--no-plugin")
    elif capability is not None and settings.plugin_library is None:
        missing = kernel_problem(capability)
        if missing is not None:
            problem = UnavailableError(
                f"{where}: the GPU here needs the plugin's kernel: {missing.message}",
                fix=f"{missing.fix}; or --no-plugin",
            )
    if problem is None:
        return Decision(True, "one plugin layer an attention")
    if settings.plugin:
        raise problem
    return Decision(False, problem.message, problem.fix)


def convert(program: LoweredProgram, options: Options, out: Path, library: sdk.SDK) -> Artifact:
    """Write ``<model>.engine`` and ``<model>.layers.json``; see :class:`TensorRTTarget`."""
    settings = TensorRTOptions.parse(options)
    profiles = settings.shapes(program.inputs, program.model)
    where = f"convert tensorrt {program.model}"
    settings.check_library(library)
    decision = decide(program, settings, sdk.gpu_capability())
    path = out / f"{program.model}.engine"
    with tempfile.TemporaryDirectory(prefix=".tensorrt-", dir=out) as folder:
        scratch = Path(folder)
        with loops(False):  # TensorRT-RTX 1.7 fails to build some of ONNX's Scans
            source = ONNX.convert(program, _onnx_options(options), scratch)
        plugin = None
        if decision.plugin:
            onnx, count = with_plugin(source.path, scratch, where)
            if count != sum(site.op == NAME for site in program.attentions):
                raise ConversionError(f"{where}: the ONNX file lost a {NAME} node.")
            plugin = Plugin(count, settings.plugin_library, settings.embed_library)
        else:
            onnx = without_plugin(source.path, scratch)
        request = Request(
            onnx=onnx,
            profiles=profiles,
            model=program.model,
            plugin=plugin,
            compute_capabilities=settings.compute_capabilities,
            timeout=settings.timeout,
            aux_streams=settings.aux_streams,
            hardware_compatibility=settings.hardware_compatibility,
            version_compatible=settings.version_compatible,
            refit=settings.refit,
            timing_cache=settings.timing_cache,
        )
        built = build_engine(library, request, _folder(scratch, "1") / path.name)
        same, reason = _again(library, request, built, settings, scratch)
        weights = find_weights(built.engine.read_bytes(), onnx)
        built.engine.replace(path)
    details = {
        "builder": f"{library.label} {built.version}",
        **built.settings,
        "profiles": profiles,
        "build_seconds": built.seconds,
        "network_layers": built.network_layers,
        "layer_tables": built.tables,
        "layer_count": len(built.layers),
        "layer_types": dict(Counter(layer.type for layer in built.layers)),
        "layers": [layer.to_json() for layer in built.layers],
        "plugin": _plugin_facts(decision, plugin, built, path),
        "onnx_sha256": source.sha256,
        "weights": weights,
        "attentions": source.details["attentions"],
        **{k: source.details[k] for k in ("quantisation", "clipping") if k in source.details},
        "deterministic": same,
        "deterministic_reason": reason,
    }
    if not decision.plugin and decision.fix:
        details["warnings"] = [f"{decision.reason} Built without the plugin. Fix: {decision.fix}"]
    fusions = dict.fromkeys(source.fusions, 0)
    form = source.form
    if plugin is not None:
        fusions[NAME] = len(built.plugin_layers) // built.tables
        form = f"plugin {NAMESPACE}::{NAME} {VERSION}"
    elif fusions:
        form = f"decomposed: {source.form}"
    artifact = finished(
        "tensorrt",
        path,
        program,
        options,
        form=form,
        fusions=fusions,
        toolchain={**source.toolchain, library.module: built.version},
        details=details,
    )
    _write_sidecar(artifact, program)
    return artifact


def _onnx_options(options: Options) -> Options:
    """Return what the ONNX file is made with; TensorRT takes symmetric integers only."""
    extra = {k: v for k, v in options.extra.items() if k in ONNX_KEYS}
    if options.precision is Precision.INT8_STATIC:
        extra["symmetric"] = True
    return replace(options, extra=extra)


def _again(
    library: sdk.SDK, request: Request, first: Build, settings: TensorRTOptions, scratch: Path
) -> tuple[bool | None, str | None]:
    """Build a second time; returns whether the bytes are the same, and why not or not known."""
    if not settings.check_rebuild:
        return None, "the option check_rebuild is off"
    if first.seconds > REBUILD_LIMIT_S:
        return None, f"one build took {first.seconds:.0f} s; a second was not made"
    again = build_engine(library, request, _folder(scratch, "2") / first.engine.name)
    if sha256_file(first.engine) == sha256_file(again.engine):
        return True, None
    reason = "a second build of the same file gave other bytes"
    if not library.rtx:
        reason += ": TensorRT times its kernels, and the timings differ (see timing_cache)"
    return False, reason


def _plugin_facts(
    decision: Decision, plugin: Plugin | None, built: Build, engine: Path
) -> dict[str, Any]:
    """Return what the manifest says of the plugin: which, its hash, its place in the engine."""
    if plugin is None:
        return {"used": False, "reason": decision.reason, "fix": decision.fix}
    blob = engine.read_bytes()
    places = []
    at = blob.find(MARK)
    while at >= 0:
        places.append(at)
        at = blob.find(MARK, at + 1)
    if len(places) < plugin.expected:
        raise ConversionError(
            f"convert tensorrt {engine.stem}: the engine holds {len(places)} plugins' fields;"
            f" expected at least {plugin.expected}."
        )
    return {
        "used": True,
        "name": f"{NAMESPACE}::{NAME}",
        "version": VERSION,
        "creator": "python" if plugin.library is None else "c++",
        "kernel_source_sha256": source_hash(),
        "library_sha256": plugin.library and sha256_file(plugin.library),
        "embedded": plugin.embed,
        "layers": list(built.plugin_layers),
        "byte_offsets": places,
    }


def _write_sidecar(artifact: Artifact, program: LoweredProgram) -> None:
    sidecar = {
        "model": artifact.model,
        "precision": artifact.precision.value,
        "metadata": {
            "model": program.model,
            "precision": program.precision.value,
            "recipe_sha256": program.recipe_sha256,
            "labels": list(program.labels),
            "preprocessing": dict(program.preprocessing),
        },
        "flowexport_version": __version__,
        "engine_sha256": artifact.sha256,
        "inputs": [s.to_json() for s in artifact.inputs],
        "outputs": [s.to_json() for s in artifact.outputs],
        "fusions": dict(artifact.fusions),
        "form": artifact.form,
        **{k: v for k, v in artifact.details.items() if k != "build_seconds"},
    }
    path = sidecar_path(artifact.path)
    path.write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")


def _folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path
