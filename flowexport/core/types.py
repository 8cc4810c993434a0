"""Values that travel between the stages, and the protocol of a target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from flowexport.core.errors import InputError, UnknownNameError

Dim = int | str
"""A size, or the name of a dynamic dimension (``"batch"``)."""


class Precision(StrEnum):
    """Storage precision of an artifact's weights and activations.

    The quantised ones store the weights of linear and convolution layers in
    few bits; attention cores, normalisations and the layers that are kept stay
    in floating point (:func:`float_precision`).

    ``int8-dynamic``: activations rounded to 8 bits with a range taken at run time;
    ``int8-static``: with ranges calibrated on samples;
    ``int8-weights``: weights alone;
    ``palette8``, ``palette6``, ``palette4``: weights alone, as indices of 2^bits values.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    INT8_DYNAMIC = "int8-dynamic"
    INT8_STATIC = "int8-static"
    INT8_WEIGHTS = "int8-weights"
    PALETTE8 = "palette8"
    PALETTE6 = "palette6"
    PALETTE4 = "palette4"

    @property
    def quantised(self) -> bool:
        """Whether some layers are stored as integers or indices."""
        return self not in (Precision.FP32, Precision.FP16)


class Verdict(StrEnum):
    """What a check found; what was not executed is NOT_RUN, never PASS."""

    PASS = "PASS"
    FAIL = "FAIL"
    NOT_RUN = "NOT_RUN"


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and numpy dtype name of one model input or output."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "float32"

    @property
    def dynamic(self) -> bool:
        """Whether any dimension is dynamic."""
        return any(isinstance(d, str) for d in self.shape)

    def static(self, **sizes: int) -> TensorSpec:
        """Return the spec with named dimensions set; those not named become 1."""
        shape = tuple(sizes.get(d, 1) if isinstance(d, str) else d for d in self.shape)
        return TensorSpec(self.name, shape, self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(str(data["name"]), tuple(data["shape"]), str(data["dtype"]))

    def check(self, value: np.ndarray, where: str) -> None:
        """Raise InputError unless ``value`` has this dtype and shape."""
        fits = len(value.shape) == len(self.shape) and all(
            isinstance(want, str) or want == have
            for want, have in zip(self.shape, value.shape, strict=True)
        )
        if not fits:
            wanted = "x".join(str(d) for d in self.shape)
            got = "x".join(str(d) for d in value.shape)
            raise InputError(f"{where}: {self.name} has shape {got}; expected {wanted}.")
        if value.dtype != np.dtype(self.dtype):
            raise InputError(
                f"{where}: {self.name} has dtype {value.dtype.name}; expected {self.dtype}."
            )


@dataclass(frozen=True)
class Availability:
    """Whether a target can convert and run here, and if not, why and what mends it.

    ``converts`` and ``runs`` are apart: TensorRT builds engines without a GPU
    but cannot run them, Core ML converts on Linux and predicts on macOS only.
    """

    converts: bool
    runs: bool
    toolchain: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class Options:
    """What a recipe asks of one target; ``extra`` holds the target's own settings.

    Attributes:
        keep_float: module paths or globs (``encoder.layers.0.*``) of layers that a
            quantised precision leaves in floating point.
        calibration: ``.safetensors`` of the samples for INT8_STATIC, one array an
            input, samples first; the pipeline sets it.
        form_reason: why ``extra["form"]`` is set, where it was not the recipe that did it.
    """

    precision: Precision = Precision.FP32
    extra: Mapping[str, Any] = field(default_factory=dict)
    keep_float: tuple[str, ...] = ()
    calibration: Path | None = None
    form_reason: str | None = None


FORWARD, STEP = "forward", "step"
"""Names of a causal model's functions; ``forward_<length>`` is forward at another length."""


@dataclass(frozen=True)
class Function:
    """One more function of an artifact: a causal model's ``step``, or another length's forward.

    Attributes:
        path: the file that holds it: the artifact's own, or one beside it.
        state: state input -> the output that is its next value; empty for a forward.
    """

    path: Path
    sha256: str
    size_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: Mapping[str, str] = field(default_factory=dict)

    @property
    def state_specs(self) -> tuple[TensorSpec, ...]:
        """Return the inputs that are state."""
        return tuple(s for s in self.inputs if s.name in self.state)

    def to_json(self, root: Path) -> dict[str, Any]:
        """Return the manifest's entry, with ``path`` relative to ``root``."""
        return {
            "path": self.path.relative_to(root).as_posix(),
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "inputs": [s.to_json() for s in self.inputs],
            "outputs": [s.to_json() for s in self.outputs],
            "state": dict(self.state),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], root: Path) -> Function:
        return cls(
            path=root / str(data["path"]),
            sha256=str(data["sha256"]),
            size_bytes=int(data["size_bytes"]),
            inputs=tuple(TensorSpec.from_json(s) for s in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(s) for s in data["outputs"]),
            state=dict(data["state"]),
        )


@dataclass(frozen=True)
class Artifact:
    """One finished file (or folder) of one target.

    ``path`` is absolute in memory and relative to the bundle in the manifest.
    ``fusions`` counts fused operators *found in the finished file*.
    ``details`` holds what the target records of itself (opset, layer table,
    delegation, whether a rebuild gives the same bytes and why not).
    ``functions`` are those of a causal model beside its ``forward``; ``entry``
    names the one that this value stands for (see :meth:`function`).
    """

    target: str
    path: Path
    sha256: str
    size_bytes: int
    precision: Precision
    model: str
    recipe_sha256: str
    form: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fusions: Mapping[str, int] = field(default_factory=dict)
    toolchain: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    functions: Mapping[str, Function] = field(default_factory=dict)
    entry: str = FORWARD

    def function(self, name: str) -> Artifact:
        """Return the artifact as one of its functions, which a target then loads.

        Raises:
            UnknownNameError: there is no such function.
        """
        if name == self.entry:
            return self
        if name not in self.functions:
            where = f"artifact {self.target} {self.model}"
            raise UnknownNameError("function", name, (self.entry, *self.functions), where=where)
        chosen = self.functions[name]
        return replace(
            self,
            path=chosen.path,
            sha256=chosen.sha256,
            size_bytes=chosen.size_bytes,
            inputs=chosen.inputs,
            outputs=chosen.outputs,
            entry=name,
        )

    def to_json(self, root: Path) -> dict[str, Any]:
        """Return the manifest's entry, with ``path`` relative to ``root``."""
        data = asdict(replace(self, functions={}))
        data["functions"] = {n: f.to_json(root) for n, f in self.functions.items()}
        data["path"] = self.path.relative_to(root).as_posix()
        data["precision"] = self.precision.value
        data["inputs"] = [s.to_json() for s in self.inputs]
        data["outputs"] = [s.to_json() for s in self.outputs]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], root: Path) -> Artifact:
        fields = dict(data)
        fields["path"] = root / str(data["path"])
        fields["precision"] = Precision(data["precision"])
        fields["inputs"] = tuple(TensorSpec.from_json(s) for s in data["inputs"])
        fields["outputs"] = tuple(TensorSpec.from_json(s) for s in data["outputs"])
        entries = dict(data.get("functions") or {})
        fields["functions"] = {n: Function.from_json(f, root) for n, f in entries.items()}
        return cls(**fields)


@dataclass(frozen=True)
class RuntimeInfo:
    """What executed an artifact: ``interpreted`` and ``emulated`` are said, never hidden."""

    name: str
    version: str
    threads: int
    execution: str = "native"  # "native" | "interpreted" | "emulated"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        suffix = "" if self.execution == "native" else f" ({self.execution})"
        if suffix and "runner" in self.details:
            suffix = f" {self.execution} ({self.details['runner']})"
        return f"{self.name} {self.version}{suffix}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "label": self.label}


class Session(ABC):
    """A loaded artifact on a runtime; a context manager.

    ``run`` checks the feeds and the results; subclasses implement ``_run``.

    Attributes:
        max_batch: samples that one run takes at most where the batch is dynamic; None: any.
    """

    max_batch: int | None = None

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    @abstractmethod
    def info(self) -> RuntimeInfo: ...

    @abstractmethod
    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...

    def close(self) -> None:  # noqa: B027 - most runtimes free on garbage collection
        """Release the runtime's memory; may be called twice."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: one array an input, of exactly the artifact's names, dtypes and shapes.

        Returns:
            One array an output, in the artifact's order.

        Raises:
            InputError: a feed is missing, unknown or does not fit its spec.
        """
        where = f"run {self.artifact.target} {self.artifact.model}"
        wanted = {s.name for s in self.artifact.inputs}
        if set(feeds) != wanted:
            raise InputError(f"{where}: the feeds are {sorted(feeds)}; expected {sorted(wanted)}.")
        for spec in self.artifact.inputs:
            spec.check(feeds[spec.name], where)
        results = self._run(feeds)
        return {s.name: np.asarray(results[s.name]) for s in self.artifact.outputs}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Target(Protocol):
    """One file format with its converter and its runtime.

    ``program`` is a :class:`flowexport.lowering.LoweredProgram`; it is not
    named here because the core imports nothing of ours. A target whose files
    carry a causal model's ``step`` has ``streams = True``; one whose quantised
    files compute in half where they do not in integers, ``float_parts = Precision.FP16``.

    A target may also have ``check_model(spec, options, several)``, which refuses what a
    model cannot have in its format and returns the inputs that it takes as pixels;
    ``inspect_run(path)``, what a runtime says of a loaded file; ``file_feeds(artifact,
    feeds)`` where its files' inputs are not those of the artifact.
    """

    name: str
    suffix: str
    precisions: tuple[Precision, ...]

    def probe(self) -> Availability:
        """Say what works on this machine; never raises, imports lazily."""
        ...

    def validate(self, options: Options) -> None:
        """Raise InputError at once for options the target does not support."""
        ...

    def convert(self, program: Any, options: Options, out: Path) -> Artifact:
        """Write one file or folder under ``out`` and return its description.

        Runs in a child process of the pipeline's; may crash without harm.
        """
        ...

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session; raises UnavailableError where ``probe().runs`` is False."""
        ...

    def inspect(self, path: Path) -> dict[str, Any]:
        """Read a finished file: ``{"inputs", "outputs", "operators", "fusions"}``."""
        ...


def float_precision(target: Target, precision: Precision) -> Precision:
    """Return what a target's artifact computes in outside its quantised layers.

    It decides the precision that the program is lowered in and what the range
    check has to prove.
    """
    if not precision.quantised:
        return precision
    chosen: Precision = getattr(target, "float_parts", Precision.FP32)
    return chosen


@dataclass(frozen=True)
class Dataset:
    """Labelled samples as a model's inputs, preprocessed.

    Attributes:
        name: e.g. ``japanese-vowels-test``.
        inputs: one array an input, samples first.
        targets: integer class of each sample, (samples,), int64.
        labels: class names in output order.
        attribution: source and licence, one line.
        lengths: real steps of each sample, (samples,), int64, where a model
            answers after every step; None elsewhere.
    """

    name: str
    inputs: Mapping[str, np.ndarray]
    targets: np.ndarray
    labels: tuple[str, ...]
    attribution: str
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class ModelSpec:
    """One named model configuration that ``flowexport list`` shows.

    Attributes:
        name: ``family-size`` or ``family-task``.
        build: returns the torch module with fresh weights (any seed).
        inputs: specs; ``"batch"`` is the dynamic batch dimension.
        output_names: names of the results.
        labels: class names in output order, or empty.
        preprocessing: how raw samples become inputs (JSON-able).
        weights: absolute path of the shipped trained weights, or None.
        dataset: name of the evaluation data set, or None.
        paper: citation of the architecture.
        streaming: whether it is causal and exported with a ``step`` unless the recipe says no.
    """

    name: str
    build: Any
    inputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...] = ("logits",)
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    dataset: str | None = None
    paper: str = ""
    description: str = ""
    streaming: bool = False
