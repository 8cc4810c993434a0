"""Bisection of a bundle's artifact: the model rebuilt, run in float64, value against value.

>>> from flowexport.bisect import bisect
>>> bisect("out/digits", "tflite").first.module
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.bundle import Bundle
from flowexport.core.errors import CheckpointError, InputError, UnknownNameError
from flowexport.core.tolerances import Tolerance, outside
from flowexport.core.types import Target, TensorSpec
from flowexport.evidence import check_files, check_manifest
from flowexport.parity.bisect import Bisection, Step, Value
from flowexport.parity.bisect import bisect as compare_values
from flowexport.parity.metrics import compare
from flowexport.parity.noise import limit
from flowexport.progress import SILENT, Progress
from flowexport.recipes import ModelRef, Recipe, Weights, parse_model
from flowexport.registry import TARGETS
from flowexport.resolve import Subject, resolve
from flowexport.trials import Trial, doubles, trial_of

if TYPE_CHECKING:
    from torch import nn

# Operators that move values and change none.
MOVES = frozenset(
    (
        *(
            "view",
            "reshape",
            "unflatten",
            "flatten",
            "unsqueeze",
            "squeeze",
            "transpose",
            "permute",
        ),
        *("contiguous", "clone", "to", "_to_copy", "alias", "detach", "dropout", "t", "movedim"),
        *("chunk", "split", "split_with_sizes", "unbind"),
    )
)
STEP_PREFIX = "model."
"""Of the module paths inside a step, which wraps the model."""
PARTS = frozenset(("getitem", "slice", "select", "narrow", "index"))


def bisect(
    bundle: str | Path,
    target: str,
    *,
    function: str | None = None,
    case: str | None = None,
    model: str | None = None,
    weights: str | Path | None = None,
    threads: int = 1,
    progress: Progress = SILENT,
) -> Bisection:
    """Find the first operator whose value leaves the tolerance, by its PyTorch module path.

    The artifact's hash is not checked: a damaged file is what this is for.

    Args:
        bundle: a folder made by :func:`flowexport.convert`.
        target: of the artifact; one that can show its intermediate values.
        function: ``forward_<length>`` or ``step`` of a file that has several; the first that
            leaves the tolerance where None.
        case: one of the function's cases; the one with the largest error where None.
        model: ``file.py:factory`` where the bundle's model came from a file.
        weights: the checkpoint, where it did not ship with the model.
        threads: of the runtime.

    Raises:
        BundleError, UnknownNameError: no such bundle, target, function or case.
        InputError: the target shows no intermediate values, or the model cannot be rebuilt.
        CheckpointError: the rebuilt model has other weights than the bundle's.
    """
    opened = Bundle.open(Path(bundle))
    check_files(opened)
    check_manifest(opened.path, opened.manifest)
    artifact = opened.select((target,))[target]
    found = TARGETS.get(target)
    if not hasattr(found, "trace"):
        able = [n for n in opened.artifacts() if hasattr(TARGETS.get(n), "trace")]
        raise InputError(
            f"bisect {target}: its files show no intermediate values; expected one of:"
            f" {', '.join(able)}."
        )
    progress.stage("rebuild the model")
    subject = rebuild(opened.manifest, model, weights)
    names = (artifact.entry, *artifact.functions)
    if function is not None and function not in names:
        raise UnknownNameError("function", function, names, where=f"bundle {opened.path}")
    chosen, known = None, dict[str, None]()
    for name in names if function is None else (function,):
        trial = trial_of(opened, artifact.function(name), subject)
        known |= dict.fromkeys(trial.cases)
        if case is not None and case not in trial.cases:
            continue
        progress.stage(f"run {target}, {name}")
        entry = opened.manifest["targets"][target]["tolerance"]
        worst = _worst(found, trial, case, threads, Tolerance.from_json(entry), progress)
        if chosen is None or worst.error > worst.limit:
            chosen = trial, worst
        if worst.error > worst.limit:
            break
    if chosen is None:
        raise UnknownNameError("case", str(case), known, where=f"bundle {opened.path}")
    trial, worst = chosen
    feeds = {k: np.ascontiguousarray(v[:1]) for k, v in trial.cases[worst.case].items()}
    progress.stage("reference in float64")
    steps = reference_steps(trial.module, feeds)
    progress.stage(f"values of {target}")
    values = []
    for done, value in enumerate(found.trace(trial.artifact, feeds, threads=threads)):
        progress.step(done, None, value[0])
        if np.asarray(value[2]).dtype.kind == "f":
            values.append(Value(*value))
    progress.stage("compare")
    return compare_values(
        steps,
        values,
        function=trial.artifact.entry,
        case=worst.case,
        tolerance=worst.limit,
        output_error=worst.error,
    )


def rebuild(
    manifest: Mapping[str, Any], model: str | None = None, weights: str | Path | None = None
) -> Subject:
    """Build a bundle's model again, with the same weights.

    Raises:
        InputError: it came from a file that is not given.
        CheckpointError: the weights are not the bundle's.
    """
    recipe, where = manifest["recipe"], f"bisect {manifest['name']}"
    named = recipe["model"]
    if "factory" in named:
        if model is None:
            raise InputError(
                f"{where}: the model came from a file, which the bundle does not hold.",
                fix=f"--model path/to/file.py:{named['factory']}",
            )
        ref = parse_model(model, Path())
    elif "family" in named:
        ref = ModelRef(family=named["family"], config=named["config"])
    else:
        ref = ModelRef(name=named["name"])
    chosen = None
    if weights is not None:
        chosen = Weights(file=Path(weights).absolute())
    elif "random" in recipe["weights"]:
        chosen = Weights(seed=recipe["weights"]["random"])
    elif manifest["model"]["weights"] not in ("shipped", "as built"):
        raise CheckpointError(
            f"{where}: the weights came from {manifest['model']['weights']}, which the bundle"
            " does not hold.",
            fix=f"--weights path/to/{manifest['model']['weights']}",
        )
    subject = resolve(
        Recipe(
            name=recipe["name"],
            model=ref,
            weights=chosen,
            buckets=recipe.get("buckets"),
            inputs=recipe["inputs"] and tuple(TensorSpec.from_json(s) for s in recipe["inputs"]),
            outputs=recipe["outputs"] and tuple(recipe["outputs"]),
        )
    )
    if subject.weights_sha256 != manifest["model"]["weights_sha256"]:
        raise CheckpointError(
            f"{where}: the rebuilt model's weights have sha256 {subject.weights_sha256[:12]}…;"
            f" expected {manifest['model']['weights_sha256'][:12]}….",
            fix="--weights FILE, or --model FILE:FACTORY, with what the bundle was made from",
        )
    return subject


def reference_steps(model: nn.Module, feeds: Mapping[str, np.ndarray]) -> list[Step]:
    """Run a model in float64 on one sample and return every operator's value.

    Args:
        feeds: batch 1, in the order of the model's arguments.
    """
    import copy

    import torch

    from flowexport.lowering.program import module_path
    from flowexport.lowering.streaming import StepModule

    stepped = isinstance(model, StepModule)
    module = copy.deepcopy(model).double().eval()
    example = doubles(feeds)
    with torch.no_grad():
        exported = torch.export.export(module, example)
    kept: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            result = super().run_node(node)
            if node.op == "call_function" and isinstance(result, torch.Tensor):
                kept[node.name] = result.detach()
            return result

    graph = exported.module()
    with torch.no_grad():
        Recorder(graph).run(*example)
    sources: dict[str, tuple[str, ...]] = {}
    steps = []
    for node in graph.graph.nodes:  # type: ignore[union-attr]
        inputs = tuple(
            dict.fromkeys(n for a in node.all_input_nodes for n in sources.get(a.name, ()))
        )
        operator = _operator(node)
        value = kept.get(node.name)
        real = value is not None and value.is_floating_point() and value.numel() > 0
        if operator in MOVES or not real:
            sources[node.name] = inputs  # readers read what it moves
            continue
        assert value is not None
        sources[node.name] = (node.name,)
        steps.append(
            Step(
                node.name,
                module_path(node).removeprefix(STEP_PREFIX if stepped else ""),
                operator,
                value.double().numpy(),
                inputs,
                operator in PARTS,
            )
        )
    return steps


def _operator(node: Any) -> str:
    """Return an operator's name without its namespace and overload."""
    if node.op != "call_function":
        return str(node.op)
    name = getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0]


@dataclass(frozen=True)
class _Worst:
    """The case whose error is largest against its limit."""

    case: str
    error: float
    limit: float


def _inside(trial: Trial, tolerance: Tolerance) -> list[str]:
    """Return the cases that a file's calibrated ranges hold; all of them where they hold none."""
    artifact = trial.artifact
    clipping = artifact.details.get("clipping", {})
    prefix = f"{artifact.entry}/" if artifact.entry in artifact.functions else ""
    held = [
        name
        for name in trial.cases
        if not outside(name, clipping.get(prefix + name, {}).get("clipped"), tolerance)
    ]
    return held or list(trial.cases)


def _worst(
    target: Target,
    trial: Trial,
    case: str | None,
    threads: int,
    tolerance: Tolerance,
    progress: Progress,
) -> _Worst:
    """Run a function's cases inside the calibrated ranges, or one that is asked for."""
    from flowexport.parity import run_batched

    dtypes = {s.name: s.dtype for s in trial.artifact.outputs}
    worst = _Worst("", -1.0, tolerance.max_rel)
    with target.load(trial.artifact, threads=threads) as session:
        names = [case] if case is not None else _inside(trial, tolerance)
        for done, name in enumerate(names):
            progress.step(done, len(names), name)
            outputs = run_batched(session, trial.cases[name])
            for output, reference in trial.expected[name].items():
                found = compare(name, output, outputs[output], reference, dtype=dtypes[output])
                error = float("inf") if found.max_rel is None else found.max_rel
                noise = limit(trial.noise.get(name, {}).get(output), trial.artifact.precision)
                most = tolerance.max_rel if noise is None else min(tolerance.max_rel, noise)
                if error / most > worst.error / worst.limit:
                    worst = _Worst(name, error, most)
    return worst
