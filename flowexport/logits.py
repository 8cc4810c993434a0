"""What reaches each attention of a model on real samples, for the range check.

The float32 model runs once on each sample, and the logits of every attention are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.types import FORWARD, Dataset, TensorSpec
from flowexport.ops.installed import installed_ops
from flowexport.resolve import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from flowexport.lowering import LoweredProgram
    from flowexport.ops.descriptor import AttentionSite
    from flowexport.ops.flow_attention.ranges import LogitRange, SiteVerdict

SAMPLES = 2


@dataclass(frozen=True)
class Calls:
    """What reached one attention: its site, the calibrated ranges, and the logits by sample.

    ``function`` is that of the artifact which the attention is in, ``forward`` unless the
    model is exported at several lengths. ``verdicts`` keeps what was found, by form and
    arithmetic: targets share most of it.
    """

    site: AttentionSite
    ranges: Mapping[str, LogitRange]
    samples: tuple[tuple[Tensor, Tensor, Tensor], ...]
    function: str = FORWARD
    verdicts: dict[tuple[str, str], SiteVerdict] = field(default_factory=dict, compare=False)


def calibration_samples(
    inputs: Sequence[TensorSpec],
    dataset: Dataset | None,
    given: Mapping[str, np.ndarray] | None = None,
    count: int = SAMPLES,
) -> tuple[list[dict[str, np.ndarray]], str]:
    """Return feeds of one sample each, and what they are in words.

    Args:
        given: the user's samples, one array an input, samples first.
        dataset: the model's data set, or None.

    Returns:
        Given samples, else the data set's (of different classes), else
        standard normal ones, which say less: the text tells.

    Raises:
        InputError: the samples do not fit the model's inputs.
    """
    from flowexport.parity import make_cases

    if given is not None:
        size = len(next(iter(given.values()), ()))
        dataset = Dataset("given", given, np.zeros(size, np.int64), (), "the user")
    cases = make_cases(inputs, dataset)
    kind = "random-" if dataset is None else "sample-"
    feeds = [f for name, f in cases.items() if name.startswith(kind)][:count]
    if dataset is None:
        return feeds, f"{len(feeds)} random samples (there is no data set)"
    return feeds, f"{len(feeds)} samples of {dataset.name}"


def calibrate(
    program: LoweredProgram, feeds: Sequence[Mapping[str, np.ndarray]]
) -> tuple[Calls, ...]:
    """Run a float32 program and keep what reaches each attention, in execution order.

    Args:
        program: with attention nodes, in float32.
        feeds: one mapping a sample.
    """
    import torch

    from flowexport.ops.flow_attention.ranges import LogitRange

    overloads = {op.overload for op in installed_ops()}
    runs: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in overloads:
                runs[-1].append(tuple(x.detach().clone() for x in args[:3]))
            return super().call_function(target, args, kwargs)

    graph = program.exported.module(check_guards=False)
    assert isinstance(graph, torch.fx.GraphModule)
    with torch.no_grad():
        for sample in feeds:
            runs.append([])
            tensors = [torch.from_numpy(np.array(sample[s.name])) for s in program.inputs]
            Recorder(graph).run(*tensors)
    calls = []
    for i, site in enumerate(program.attentions):
        samples = tuple(run[i] for run in runs)
        ranges = {
            name: LogitRange.of(torch.cat([s[j].flatten() for s in samples]))
            for j, name in enumerate("qkv")
        }
        calls.append(Calls(site, ranges, samples))
    return tuple(calls)


def calibrate_subject(
    subject: Subject, given: Mapping[str, np.ndarray] | None = None
) -> tuple[tuple[Calls, ...], str]:
    """Lower a model in float32 and calibrate its attentions.

    Args:
        given: the user's samples; see :func:`calibration_samples`.

    Returns:
        What reached each attention, and the samples in words.
    """
    from flowexport.lowering import forward_name, lower

    spec = subject.spec
    feeds, told = calibration_samples(spec.inputs, subject.dataset, given)
    at = {FORWARD: spec.inputs}
    for length in subject.lengths or ():
        (sequence,) = spec.inputs
        if length != sequence.shape[1]:
            shape = (sequence.shape[0], length, *sequence.shape[2:])
            at[forward_name(length)] = (replace(sequence, shape=shape),)
    calls: list[Calls] = []
    for function, inputs in at.items():
        program = lower(
            copy.deepcopy(subject.module),
            inputs,
            spec.output_names,
            name=spec.name,
            ops=installed_ops(),
        )
        found = calibrate(program, _stretched(feeds, inputs))
        calls += [replace(call, function=function) for call in found]
    return tuple(calls), told


def _stretched(
    feeds: Sequence[Mapping[str, np.ndarray]], inputs: Sequence[TensorSpec]
) -> list[dict[str, np.ndarray]]:
    """Return feeds of the inputs' length: the samples one after the other, again and again."""
    stretched: list[dict[str, np.ndarray]] = []
    for i in range(len(feeds)):
        stretched.append({})
        for spec in inputs:
            samples = [feeds[(i + j) % len(feeds)][spec.name] for j in range(len(feeds))]
            value = samples[0]
            length = spec.shape[1] if len(spec.shape) > 1 else None
            if isinstance(length, int) and length != value.shape[1]:
                value = np.resize(np.concatenate(samples, 1)[0], (1, length, *value.shape[2:]))
            stretched[i][spec.name] = value
    return stretched
