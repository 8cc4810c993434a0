"""What each function of a bundle's artifact must give, with the module that computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.bundle import Bundle
from flowexport.core.types import STEP, Artifact
from flowexport.evidence import references, saved_buckets, saved_stream
from flowexport.resolve import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

WARM = 8
"""Steps before the one that is compared: a state of zeros hides what reads it."""


@dataclass(frozen=True)
class Trial:
    """One function with its cases.

    Attributes:
        artifact: the artifact as this function.
        module: what computes it in torch; its arguments are the feeds in their order.
        cases: case name -> input name -> array.
        expected: case name -> output name -> float64 array; the same cases.
        noise: as in :class:`flowexport.parity.Golden`.
    """

    artifact: Artifact
    module: nn.Module
    cases: Mapping[str, Mapping[str, np.ndarray]]
    expected: Mapping[str, Mapping[str, np.ndarray]]
    noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def trial_of(bundle: Bundle, artifact: Artifact, subject: Subject) -> Trial:
    """Return a function's trial: ``forward``, another length of it, or ``step``.

    A step is compared once in each golden case, from the state that the reference
    has after up to eight steps, its next state too.

    Args:
        artifact: as the function.
    """
    golden, _ = references(bundle.path, bundle.manifest)
    if artifact.entry == STEP:
        return _step(artifact, subject, golden.cases)
    if artifact.entry not in artifact.functions:
        return Trial(artifact, subject.module, golden.cases, golden.expected, golden.noise)
    for bucket in saved_buckets(bundle.path, bundle.manifest, None):
        if bucket.function == artifact.entry:
            return Trial(artifact, subject.module, bucket.golden.cases, bucket.golden.expected)
    stream = saved_stream(bundle.path, bundle.manifest)
    assert stream is not None
    length = int(artifact.inputs[0].shape[1])
    cases = {"stream": {stream.name: np.ascontiguousarray(stream.inputs[:, :length])}}
    expected = _run(subject.module, cases["stream"], [stream.output])
    return Trial(artifact, subject.module, cases, {"stream": expected})


def doubles(feeds: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
    """Return feeds as tensors, floating ones in float64."""
    import torch

    tensors = [torch.from_numpy(np.array(v)) for v in feeds.values()]
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def _step(
    artifact: Artifact, subject: Subject, golden: Mapping[str, Mapping[str, np.ndarray]]
) -> Trial:
    import copy

    import torch

    from flowexport.lowering.streaming import StepModule

    model: Any = subject.module
    module = StepModule(model).eval()
    double = copy.deepcopy(module).double()
    outputs = [s.name for s in artifact.outputs]
    cases, expected = {}, {}
    for case, feeds in golden.items():
        ((name, sequence),) = ((n, v[:1]) for n, v in feeds.items())
        state = [v.double() for v in model.initial_state(1).values()]
        last = min(WARM, sequence.shape[1] - 1)
        with torch.no_grad():
            for t in range(last):
                _, *state = double(*doubles({name: sequence[:, t]}), *state)
        dtypes = {s.name: s.dtype for s in artifact.inputs}
        held = {n: v.numpy().astype(dtypes[n]) for n, v in zip(module.names, state, strict=True)}
        cases[case] = {name: np.ascontiguousarray(sequence[:, last]), **held}
        expected[case] = _run(module, cases[case], outputs)
    return Trial(artifact, module, cases, expected)


def _run(
    module: nn.Module, feeds: Mapping[str, np.ndarray], outputs: list[str]
) -> dict[str, np.ndarray]:
    from flowexport.parity import reference_outputs

    return reference_outputs(module, {"one": feeds}, outputs)["one"]
