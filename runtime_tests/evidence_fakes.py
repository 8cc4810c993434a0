"""A target in memory for the tests of parity, bench and report: a numpy classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import UnavailableError
from flowexport.core.hashing import sha256_tree
from flowexport.core.reports import Tolerance
from flowexport.core.types import (
    Artifact,
    Availability,
    Dataset,
    Options,
    Precision,
    RuntimeInfo,
    Session,
    TensorSpec,
)
from flowexport.parity import Evaluation, Golden, make_cases

STEPS, CHANNELS, CLASSES = 7, 3, 4
INPUTS = (
    TensorSpec("x", ("batch", STEPS, CHANNELS)),
    TensorSpec("padding_mask", ("batch", STEPS)),
)
OUTPUTS = (TensorSpec("logits", ("batch", CLASSES)), TensorSpec("state", ("batch", CHANNELS)))
TOLERANCE = Tolerance(
    max_rel=1e-5,
    reason="fp32 rounding of sums of some tens of products",
    min_cosine=0.99999,
    min_sqnr_db=80.0,
    min_top1_agreement=1.0,
    max_accuracy_drop=0.0,
    min_prediction_agreement=1.0,
)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {"w": rng.standard_normal((CHANNELS, CLASSES)), "b": rng.standard_normal(CLASSES)}


def forward(
    parameters: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], dtype: Any
) -> dict[str, np.ndarray]:
    """Mean over the real steps, then a linear classifier."""
    x, mask = feeds["x"].astype(dtype), feeds["padding_mask"].astype(dtype)[:, :, None]
    state = np.tanh((x * mask).sum(axis=1) / mask.sum(axis=1))
    logits = state @ parameters["w"].astype(dtype) + parameters["b"].astype(dtype)
    return {"logits": logits, "state": state}


def dataset(samples: int = 40) -> Dataset:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, STEPS + 1, samples)
    mask = (np.arange(STEPS) < lengths[:, None]).astype(np.float32)
    x = rng.standard_normal((samples, STEPS, CHANNELS)).astype(np.float32) * mask[:, :, None]
    feeds = {"x": x, "padding_mask": mask}
    targets = forward(weights(), feeds, np.float64)["logits"].argmax(axis=1)
    targets[::10] = (targets[::10] + 1) % CLASSES  # the reference errs on a tenth
    return Dataset("fakes-test", feeds, targets, tuple("abcd"), "made up, public domain")


def golden() -> Golden:
    cases = make_cases(INPUTS, dataset())
    expected = {c: forward(weights(), feeds, np.float64) for c, feeds in cases.items()}
    return Golden(cases, expected, "0" * 64)


def evaluation() -> Evaluation:
    data = dataset()
    logits = forward(weights(), data.inputs, np.float64)["logits"]
    return Evaluation(data, "logits", logits, "0" * 64)


Damage = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


class FakeSession(Session):
    def __init__(self, artifact: Artifact, target: FakeTarget) -> None:
        super().__init__(artifact)
        self.target = target
        self.batches: list[int] = []

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo("numpy", np.__version__, 1, self.target.execution)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        self.batches.append(len(feeds["x"]))
        result = forward(self.target.parameters, feeds, self.target.dtype)
        return self.target.damage({k: v.astype(np.float32) for k, v in result.items()})


@dataclass
class FakeTarget:
    """Implements the Target protocol; ``damage`` changes what a run returns."""

    name: str = "fake"
    suffix: str = ".npz"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    parameters: dict[str, np.ndarray] = field(default_factory=weights)
    dtype: Any = np.float32
    damage: Damage = dict
    fusions: dict[str, int] = field(default_factory=lambda: {"FlowAttention": 2})
    execution: str = "native"
    load_error: Exception | None = None
    sessions: list[FakeSession] = field(default_factory=list)

    def probe(self) -> Availability:
        return Availability(True, True)

    def validate(self, options: Options) -> None:
        pass

    def convert(
        self, program: Any, options: Options, out: Path, *, batch: Any = "batch"
    ) -> Artifact:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}.npz"
        np.savez(path, **self.parameters)

        def fixed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(s.name, (batch, *s.shape[1:]), s.dtype) for s in specs)

        return Artifact(
            target=self.name,
            path=path,
            sha256=sha256_tree(path),
            size_bytes=path.stat().st_size,
            precision=Precision.FP32,
            model="fake-classifier",
            recipe_sha256="1" * 64,
            form="reference",
            inputs=fixed(INPUTS),
            outputs=fixed(OUTPUTS),
            fusions=self.fusions,
        )

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        if self.load_error is not None:
            raise self.load_error
        self.sessions.append(FakeSession(artifact, self))
        return self.sessions[-1]

    def inspect(self, path: Path) -> dict[str, Any]:
        return {"inputs": [], "outputs": [], "operators": {}, "fusions": self.fusions}


def unavailable() -> FakeTarget:
    error = UnavailableError("load fake: no GPU is present; expected one.", fix="add a GPU")
    return FakeTarget(load_error=error)
