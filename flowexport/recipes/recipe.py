"""A recipe as a value: what to export and what each artifact is held to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowexport.core.errors import InputError, RecipeError, UnknownNameError
from flowexport.core.types import Dim, Options, Precision, TensorSpec
from flowexport.recipes.lines import Keys, Located, load_yaml
from flowexport.recipes.schema import check_document
from flowexport.recipes.tolerances import DEFAULT_TOLERANCES

SCHEMA = "flowexport.recipe/1"

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True)
class ModelRef:
    """Where a model comes from: exactly one of a name, a family, or a file's factory.

    Attributes:
        name: of a registered model.
        family: architecture, built with ``config``.
        file, factory: ``path/to/file.py:factory``; the factory returns a module.
    """

    name: str | None = None
    family: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    factory: str | None = None

    def __str__(self) -> str:
        if self.file is not None:
            return f"{self.file}:{self.factory}"
        return self.name or str(self.family)


@dataclass(frozen=True)
class Weights:
    """Which weights: shipped with the model, a checkpoint's file, or random from a seed."""

    file: Path | None = None
    seed: int | None = None

    def __str__(self) -> str:
        if self.file is not None:
            return str(self.file)
        return "shipped" if self.seed is None else f"random (seed {self.seed})"


@dataclass(frozen=True)
class Calibration:
    """Samples that int8-static's ranges are measured on: a registered set's, or a file's.

    Attributes:
        dataset: a registered data set's name, or None.
        file: ``.npz`` with one array an input, samples first, and ``targets``, or None.
        samples: as many, spread over the classes.
    """

    dataset: str | None = None
    file: Path | None = None
    samples: int = 128

    def __str__(self) -> str:
        return self.dataset or str(self.file)


@dataclass(frozen=True)
class Bench:
    """How long latency is measured, and with how many threads."""

    warmup: int = 10
    min_runs: int = 50
    min_seconds: float = 1.0
    threads: int = 1


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        inputs: overrides of the model's own input specs, or None.
        streaming: more lengths of a causal model's forward where its step is asked for;
            False where it is refused, None where the model decides.
        buckets: the static lengths of one named dimension, by its name; or None.
        targets: options by target name; None stands for every registered target.
        calibration: samples for int8-static.
        keep_float: layers that quantised precisions leave in floating point, on every target.
        max_accuracy_drop: points (0..100), instead of every tolerance's own.
        tolerances: limits with their reason, by precision.
        target_tolerances: limits of one target alone, by target.
        fusions: fused operators that a finished file must contain, by target.
        where: ``file:line`` by key path, for messages about what only later stages know.
    """

    name: str
    model: ModelRef
    weights: Weights | None = None
    description: str = ""
    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None
    streaming: tuple[int, ...] | bool | None = None
    buckets: Mapping[str, tuple[int, ...]] | None = None
    targets: Mapping[str, Options] | None = None
    precision: Precision = Precision.FP32
    dataset: str | None = None
    limit: int | None = None
    calibration: Calibration | None = None
    keep_float: tuple[str, ...] = ()
    max_accuracy_drop: float | None = None
    tolerances: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: DEFAULT_TOLERANCES)
    target_tolerances: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fusions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    bench: Bench = field(default_factory=Bench)
    seed: int = 0
    source: Located | None = field(default=None, compare=False, repr=False)

    def where(self, *path: str) -> str:
        """Return ``file:line`` of a key, or the recipe's name where no file stands behind it."""
        return self.source.where(path) if self.source else f"recipe {self.name}"

    def options(self, target: str) -> Options:
        """Return what the recipe asks of one target."""
        options = (self.targets or {}).get(target) or Options(self.precision)
        return replace(options, keep_float=(*self.keep_float, *options.keep_float))

    def tolerance(self, target: str, precision: Precision) -> Mapping[str, Any]:
        """Return the limits that hold for one artifact.

        A quantised precision without limits of its own gets the default ones.

        Raises:
            RecipeError: the recipe has none for this precision.
        """
        limits = self._limits(target, precision)
        if self.max_accuracy_drop is None:
            return limits
        return {**limits, "max_accuracy_drop": self.max_accuracy_drop}

    def _limits(self, target: str, precision: Precision) -> Mapping[str, Any]:
        own = self.target_tolerances.get(target)
        if own is not None:
            return own
        if precision.value not in self.tolerances and precision.quantised:
            return DEFAULT_TOLERANCES[precision.value]
        if precision.value not in self.tolerances:
            raise RecipeError(
                f"{self.where('tolerances')}: tolerances has {sorted(self.tolerances)};"
                f" expected {precision.value!r} for target {target}.",
                fix=f"add `tolerances: {{{precision.value}: {{max_rel: ..., reason: ...}}}}`",
            )
        return self.tolerances[precision.value]

    def with_precision(self, precision: Precision) -> Recipe:
        """Return the recipe with one precision for every target."""
        targets = self.targets and {
            name: replace(options, precision=precision) for name, options in self.targets.items()
        }
        return replace(self, precision=precision, targets=targets)

    def _streaming_json(self) -> dict[str, Any]:
        """Return the key only where the recipe has it, so that other hashes stay."""
        if self.streaming is None:
            return {}
        asked = self.streaming is not False
        lengths = list(self.streaming) if isinstance(self.streaming, tuple) else []
        return {"streaming": {"lengths": lengths} if asked else False}

    def _quantisation_json(self, calibration_sha256: str | None) -> dict[str, Any]:
        """Return the keys that the recipe has and its precisions use."""
        data: dict[str, Any] = {}
        if calibration_sha256 is not None and self.calibration is not None:
            samples = self.calibration.samples
            data["calibration"] = {"sha256": calibration_sha256, "samples": samples}
        if self.keep_float:
            data["keep_float"] = list(self.keep_float)
        if self.max_accuracy_drop is not None:
            data["max_accuracy_drop"] = self.max_accuracy_drop
        return data

    def to_json(
        self,
        weights_sha256: str | None,
        file_sha256: str | None,
        calibration_sha256: str | None = None,
    ) -> dict[str, Any]:
        """Return all that decides the artifacts, free of this machine's paths.

        Args:
            weights_sha256: hash of the weights' file, None for random ones.
            file_sha256: hash of a bring-your-own model's file.
            calibration_sha256: hash of the calibration samples, None where none are used.
        """
        model: dict[str, Any] = {}
        if self.model.file is not None:
            model = {"file_sha256": file_sha256, "factory": self.model.factory}
        elif self.model.family is not None:
            model = {"family": self.model.family, "config": dict(self.model.config)}
        else:
            model = {"name": self.model.name}
        seed = self.weights.seed if self.weights else None
        return {
            "schema": SCHEMA,
            "name": self.name,
            "model": model,
            "weights": {"sha256": weights_sha256} if seed is None else {"random": seed},
            "inputs": self.inputs and [s.to_json() for s in self.inputs],
            "outputs": self.outputs and list(self.outputs),
            "labels": self.labels and list(self.labels),
            "preprocessing": self.preprocessing and dict(self.preprocessing),
            "precision": self.precision.value,
            **self._streaming_json(),
            **({"buckets": {k: list(v) for k, v in self.buckets.items()}} if self.buckets else {}),
            **self._quantisation_json(calibration_sha256),
            "targets": self.targets
            and {
                name: {
                    "precision": options.precision.value,
                    **({"keep_float": list(options.keep_float)} if options.keep_float else {}),
                    **options.extra,
                }
                for name, options in self.targets.items()
            },
            "evaluation": self.dataset and {"dataset": self.dataset, "limit": self.limit},
            "tolerances": {k: dict(v) for k, v in self.tolerances.items()},
            "target_tolerances": {k: dict(v) for k, v in self.target_tolerances.items()},
            "fusions": {k: dict(v) for k, v in self.fusions.items()},
            "seed": self.seed,
        }


def _streaming(data: Any) -> tuple[int, ...] | bool | None:
    if isinstance(data, dict):
        return tuple(data["lengths"])
    return () if data is True else data


def _buckets(data: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]] | None:
    return None if data is None else {name: tuple(lengths) for name, lengths in data.items()}


def hash_json(document: Mapping[str, Any]) -> str:
    """Return the hex sha256 of a document's canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256(text.encode()).hexdigest()


def load_recipe(path: Path, known_targets: Iterable[str]) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: it cannot be read, or breaks the schema; with file and line.
        UnknownNameError: it names a target that is not registered.
    """
    located = load_yaml(path)
    check_document(located)
    data = located.value
    base = path.absolute().parent
    _check_accuracy_limits(located)
    _check_lengths(located)
    known = sorted(known_targets)
    for key in ("targets", "fusions"):
        for name in data.get(key) or {}:
            if name not in known:
                raise UnknownNameError("target", name, known, where=located.where((key, name)))
    precision = Precision(data.get("precision", "fp32"))
    targets = data.get("targets")
    evaluation = data.get("evaluation") or {}
    return Recipe(
        name=data.get("name") or path.stem,
        description=data.get("description", ""),
        model=_model(data["model"], base, located),
        weights=_weights(data.get("weights"), base),
        inputs=_inputs(data.get("inputs"), located),
        outputs=tuple(data["outputs"]) if "outputs" in data else None,
        labels=tuple(data["labels"]) if "labels" in data else None,
        preprocessing=data.get("preprocessing"),
        streaming=_streaming(data.get("streaming")),
        buckets=_buckets(data.get("buckets")),
        targets=targets and {n: _options(t or {}, precision) for n, t in targets.items()},
        precision=precision,
        dataset=evaluation.get("dataset"),
        limit=evaluation.get("limit"),
        calibration=Calibration(**data["calibration"]) if "calibration" in data else None,
        keep_float=tuple(data.get("keep_float") or ()),
        tolerances=data.get("tolerances") or DEFAULT_TOLERANCES,
        target_tolerances={
            n: t["tolerance"] for n, t in (targets or {}).items() if t and "tolerance" in t
        },
        fusions=data.get("fusions") or {},
        bench=Bench(**(data.get("bench") or {})),
        seed=data.get("seed", 0),
        source=located,
    )


def parse_model(text: str, base: Path) -> ModelRef:
    """Read ``name`` or ``path/to/file.py:factory`` (relative to ``base``)."""
    file, colon, factory = text.rpartition(":")
    if colon and file.endswith(".py"):
        if not factory.isidentifier():
            raise InputError(f"model {text}: the factory is {factory!r}; expected a function name.")
        return ModelRef(file=(base / file).absolute(), factory=factory)
    if text.endswith(".py"):
        raise InputError(
            f"model {text}: names no factory; expected path/to/file.py:factory.",
            fix=f"{text}:build, if `build` returns the module",
        )
    return ModelRef(name=text)


def parse_shape(name: str, text: str) -> TensorSpec:
    """Read one input's spec: ``1x128x12``, ``batchx29x12`` or ``batchx64:int64``.

    Raises:
        InputError: a dimension is no positive number and no name, or the dtype is unknown.
    """
    shape_text, _, dtype = text.partition(":")
    dims: list[Dim] = []
    for part in shape_text.split("x"):
        if part.isascii() and part.isdigit() and int(part) > 0:
            dims.append(int(part))
        elif re.fullmatch(r"[a-wyz_]+", part):
            dims.append(part)
        else:
            raise InputError(
                f"input {name}: shape has the dimension {part!r} in {text!r};"
                " expected positive numbers or names joined by 'x'.",
                fix="for example 1x128x12, or batchx128x12 for a dynamic batch",
            )
    if dtype and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES, where=f"input {name}")
    return TensorSpec(name, tuple(dims), dtype or "float32")


def _check_accuracy_limits(located: Located) -> None:
    """Refuse a limit on accuracy where no evaluation set would measure it."""
    data = located.value
    if "evaluation" in data:
        return
    limits: dict[Keys, Any] = {
        ("tolerances", p): t for p, t in (data.get("tolerances") or {}).items()
    }
    for name, settings in (data.get("targets") or {}).items():
        limits["targets", name, "tolerance"] = (settings or {}).get("tolerance") or {}
    for path, tolerance in limits.items():
        for key in ("max_accuracy_drop", "min_prediction_agreement"):
            if key in tolerance:
                raise RecipeError(
                    f"{located.where((*path, key))}: {key} limits the accuracy, but the recipe has"
                    " no evaluation; expected `evaluation: {dataset: ...}`."
                )


def _check_lengths(located: Located) -> None:
    """Refuse lengths, of streaming or of buckets, that do not increase."""
    data = located.value
    lists = [(("buckets", name), lengths) for name, lengths in (data.get("buckets") or {}).items()]
    if isinstance(data.get("streaming"), dict):
        lists.append((("streaming", "lengths"), data["streaming"]["lengths"]))
    for path, lengths in lists:
        for before, length in pairwise(lengths):
            if length <= before:
                wrong = "is there twice" if length == before else f"follows {before}"
                raise RecipeError(
                    f"{located.where(path)}: {'.'.join(path)} is {lengths}: {length} {wrong};"
                    " expected increasing lengths.",
                    fix=f"{path[-1]}: {sorted(set(lengths))}",
                )


def _model(data: Any, base: Path, located: Located) -> ModelRef:
    if isinstance(data, str):
        try:
            return parse_model(data, base)
        except InputError as error:
            raise RecipeError(f"{located.where(('model',))}: {error.message}", fix=error.fix) from (
                error
            )
    return ModelRef(family=data["family"], config=data.get("config") or {})


def _weights(data: Any, base: Path) -> Weights | None:
    if data is None:
        return None
    if isinstance(data, dict):
        return Weights(seed=data["random"])
    return Weights() if data == "shipped" else Weights(file=(base / data).absolute())


def _inputs(data: Mapping[str, str] | None, located: Located) -> tuple[TensorSpec, ...] | None:
    if data is None:
        return None
    specs = []
    for name, text in data.items():
        try:
            specs.append(parse_shape(name, text))
        except (InputError, UnknownNameError) as error:
            where = located.where(("inputs", name))
            raise RecipeError(f"{where}: {error.message}", fix=error.fix) from error
    return tuple(specs)


def _options(data: Mapping[str, Any], default: Precision) -> Options:
    extra = {k: v for k, v in data.items() if k not in ("precision", "tolerance", "keep_float")}
    precision = Precision(data.get("precision", default))
    return Options(precision, extra, tuple(data.get("keep_float") or ()))
