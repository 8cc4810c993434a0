"""From what the user named (a recipe, a model, a file's factory) to a module with weights."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowexport.buckets import Buckets, bucket_inputs, pad_dataset
from flowexport.core.errors import (
    CheckpointError,
    FlowExportError,
    InputError,
    RecipeError,
    UnknownNameError,
)
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Dataset, ModelSpec, TensorSpec
from flowexport.recipes import ModelRef, Recipe, hash_json, load_recipe, parse_model
from flowexport.registry import DATASETS, MODELS, TARGETS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Subject:
    """What is exported: a module with its weights, and all that is known of it.

    Attributes:
        spec: the model's description, with the recipe's overrides applied.
        module: in eval mode, float32.
        weights_sha256: hash over the names, dtypes, shapes and values of the state dict.
        calibration: samples that int8-static's ranges are measured on, None where none are asked.
        lengths: more lengths of forward where the model is exported with its step, else None.
        buckets: the inputs by length where the model is exported at several, else None;
            ``spec`` has those of the longest.
        recipe_document: all that decides the artifacts, and ``recipe_sha256`` its hash.
    """

    recipe: Recipe
    spec: ModelSpec
    module: nn.Module
    dataset: Dataset | None
    weights_sha256: str
    recipe_document: Mapping[str, Any]
    recipe_sha256: str
    lengths: tuple[int, ...] | None = None
    buckets: Buckets | None = None
    calibration: Dataset | None = None

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with flowexport, by name."""
    folder = Path(str(files("flowexport_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str | Path | Recipe) -> Recipe:
    """Return the recipe that a user means.

    Args:
        source: a recipe's name or path, a model's name, or ``path/to/file.py:factory``.

    Raises:
        RecipeError: the recipe cannot be read or is wrong.
        UnknownNameError: nothing has this name.
    """
    if isinstance(source, Recipe):
        return source
    text = str(source)
    if text.endswith((".yaml", ".yml")) or isinstance(source, Path):
        return load_recipe(Path(text), TARGETS.names())
    if ".py" in text:
        model = parse_model(text, Path())
        return Recipe(name=f"{Path(str(model.file)).stem}-{model.factory}", model=model)
    shipped = shipped_recipes()
    if text in shipped:
        return load_recipe(shipped[text], TARGETS.names())
    if text in MODELS.names():
        return Recipe(name=text, model=ModelRef(name=text))
    raise UnknownNameError("recipe or model", text, {*shipped, *MODELS.names()})


def resolve(recipe: Recipe, *, calibrated: bool = False) -> Subject:
    """Build the model, load its weights and its evaluation set.

    Args:
        calibrated: load the recipe's calibration samples too.

    Raises:
        UnknownNameError: the model, family or data set is not registered.
        InputError: the model's file, factory or input shapes do not fit.
        CheckpointError: the weights are missing, unreadable, unsafe or another model's.
    """
    import torch

    from flowexport.calibration import load_calibration, samples_sha256

    seed = recipe.weights.seed if recipe.weights else None
    torch.manual_seed(seed or 0)
    spec, module = _build(recipe)
    spec = _with_overrides(spec, recipe)
    path = _weights_file(recipe, spec)
    if path is not None:
        from flowexport_models import load_weights

        load_weights(module, path)
    module = module.float().eval()
    buckets = bucket_inputs(recipe, spec)
    for inputs in (buckets or {}).values():  # the longest comes last
        spec = _try_forward(module, replace(spec, inputs=tuple(inputs)), recipe)
    if buckets is None and (recipe.model.file is not None or recipe.inputs is not None):
        spec = _try_forward(module, spec, recipe)
    lengths = _lengths(recipe, spec, module)
    weights_sha256 = state_sha256(module)
    file = recipe.model.file
    dataset = _dataset(recipe, spec)
    calibration = load_calibration(recipe, spec.inputs, dataset) if calibrated else None
    document = recipe.to_json(
        weights_sha256,
        sha256_file(file) if file else None,
        samples_sha256(calibration) if calibration else None,
    )
    return Subject(
        recipe=recipe,
        spec=spec,
        module=module,
        dataset=dataset,
        weights_sha256=weights_sha256,
        recipe_document=document,
        recipe_sha256=hash_json(document),
        lengths=lengths,
        buckets=buckets,
        calibration=calibration,
    )


def state_sha256(module: nn.Module) -> str:
    """Return the hex sha256 of a module's state dict, whatever file it came from."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build(recipe: Recipe) -> tuple[ModelSpec, nn.Module]:
    model = recipe.model
    if model.file is not None:
        module = _bring_your_own(model.file, str(model.factory))
        if recipe.inputs is None:
            raise InputError(
                f"model {model}: the inputs are unknown; expected a shape for each.",
                fix="--input NAME:1x128x12 for each argument of forward, in order",
            )
        return ModelSpec(recipe.name, None, recipe.inputs, recipe.outputs or ()), module
    if model.family is not None:
        from flowexport_models import build_spec

        try:
            spec = replace(build_spec(model.family, **model.config), name=recipe.name)
        except FlowExportError as error:
            where = recipe.where("model", "config")
            raise RecipeError(f"{where}: {error.message}", fix=error.fix) from error
    else:
        spec = MODELS.get(str(model.name), where=recipe.where("model"))
    return spec, spec.build()


def _bring_your_own(file: Path, factory: str) -> nn.Module:
    """Import a user's file and call its factory."""
    from torch import nn

    where = f"model {file}:{factory}"
    if not file.is_file():
        raise InputError(f"model {file}: does not exist; expected a Python file.")
    name = f"flowexport_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))  # its neighbours, as when Python runs the file
    try:
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"{where}: importing it raised {_said(error, file)}.") from error
        build = getattr(module, factory, None)
        if not callable(build):
            callables = [k for k, v in vars(module).items() if callable(v) and k[0] != "_"]
            raise UnknownNameError("factory", factory, callables, where=f"model {file}")
        try:
            built = build()
        except Exception as error:
            raise InputError(f"{where}: {factory}() raised {_said(error, file)}.") from error
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(built, nn.Module):
        raise InputError(
            f"{where}: {factory}() returned a {type(built).__name__}; expected a torch.nn.Module."
        )
    return built


def _with_overrides(spec: ModelSpec, recipe: Recipe) -> ModelSpec:
    inputs = spec.inputs
    if recipe.inputs is not None and recipe.model.file is None:
        overrides = {s.name: s for s in recipe.inputs}
        known = [s.name for s in spec.inputs]
        for name in overrides:
            if name not in known:
                raise UnknownNameError("input", name, known, where=recipe.where("inputs", name))
        inputs = tuple(overrides.get(s.name, s) for s in spec.inputs)
    return replace(
        spec,
        inputs=inputs,
        output_names=recipe.outputs or spec.output_names,
        labels=spec.labels if recipe.labels is None else recipe.labels,
        preprocessing=spec.preprocessing if recipe.preprocessing is None else recipe.preprocessing,
        dataset=recipe.dataset or (spec.dataset if recipe.source is None else None),
    )


def _weights_file(recipe: Recipe, spec: ModelSpec) -> Path | None:
    """Return the checkpoint to load, or None for the module as it was built."""
    weights = recipe.weights
    if weights is not None and weights.seed is not None:
        return None
    if weights is not None and weights.file is not None:
        return weights.file
    if spec.weights is not None:
        return spec.weights
    if recipe.model.file is not None and weights is None:
        return None
    raise CheckpointError(
        f"load {spec.name}: no trained weights ship with this model; expected a checkpoint.",
        fix="--weights FILE, or `weights: {random: 0}` in the recipe to try the export only",
    )


def _try_forward(module: nn.Module, spec: ModelSpec, recipe: Recipe) -> ModelSpec:
    """Run the module once on its declared shapes, and name its results where nobody has."""
    import torch

    names = {d for s in spec.inputs for d in s.shape if isinstance(d, str)}
    tensors = [zeros(s.static(**dict.fromkeys(names, 2))) for s in spec.inputs]
    try:
        with torch.no_grad():
            results = module(*tensors)
    except Exception as error:
        shapes = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in spec.inputs)
        where = recipe.where("buckets") if recipe.buckets else f"model {recipe.model}"
        raise InputError(
            f"{where}: forward refuses the input {shapes}: {_said(error, None)};"
            " expected shapes that the model takes.",
            fix=f"mend --input or the recipe's `{'buckets' if recipe.buckets else 'inputs'}`",
        ) from error
    if isinstance(results, torch.Tensor):
        results = (results,)
    elif isinstance(results, Mapping):
        results = tuple(results.values())
    if not isinstance(results, (tuple, list)) or not all(
        isinstance(r, torch.Tensor) for r in results
    ):
        raise InputError(
            f"model {recipe.model}: forward returns a {type(results).__name__};"
            " expected a tensor, or a sequence or mapping of tensors."
        )
    if not spec.output_names:
        many = len(results) > 1
        outputs = tuple(f"output_{i}" for i in range(len(results))) if many else ("output",)
        return replace(spec, output_names=outputs)
    if len(results) != len(spec.output_names):
        raise InputError(
            f"{recipe.where('outputs')}: outputs has {len(spec.output_names)} names;"
            f" expected {len(results)}, one a result of forward."
        )
    return spec


def _lengths(recipe: Recipe, spec: ModelSpec, module: nn.Module) -> tuple[int, ...] | None:
    """Return the lengths that ``streaming`` adds, or None where no step is exported."""
    from flowexport.lowering import check_streaming

    asked = spec.streaming if recipe.streaming is None else recipe.streaming
    if asked is False:
        return None
    lengths = asked if isinstance(asked, tuple) else ()
    check_streaming(module, spec.inputs, spec.output_names, lengths, recipe.where("streaming"))
    return lengths


def zeros(spec: TensorSpec) -> Any:
    """Return a tensor of zeros of a static spec."""
    import torch

    shape = [int(d) for d in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _dataset(recipe: Recipe, spec: ModelSpec) -> Dataset | None:
    if spec.dataset is None:
        return None
    dataset = DATASETS.get(spec.dataset, where=recipe.where("evaluation", "dataset"))()
    if recipe.buckets:
        dataset = pad_dataset(recipe, dataset, spec)
    if recipe.limit is None or recipe.limit >= len(dataset):
        return dataset
    return replace(
        dataset,
        name=f"{dataset.name}-first-{recipe.limit}",
        inputs={k: v[: recipe.limit] for k, v in dataset.inputs.items()},
        lengths=None if dataset.lengths is None else dataset.lengths[: recipe.limit],
        targets=dataset.targets[: recipe.limit],
    )


def _said(error: Exception, file: Path | None) -> str:
    """Return an exception in one line, with the line of the user's file it came from."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, FlowExportError):
        return error.message.rstrip(".")
    text = f"{type(error).__name__}: {lines[0].rstrip('.')}"
    if isinstance(error, SyntaxError):
        return f"{text} (line {error.lineno})"
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if file is not None and f.filename == str(file)]
    return f"{text} (line {own[-1]})" if own else text
