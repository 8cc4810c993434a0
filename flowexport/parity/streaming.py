"""Steps of a causal artifact against the float64 reference: saved streams, drift, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import BundleError, VerificationError
from flowexport.core.findings import StreamResult
from flowexport.core.streaming import Stream, StreamState
from flowexport.core.types import FORWARD, STEP, Artifact, Dataset, TensorSpec

STATE_FILE = "state.safetensors"
STREAM_FILE = "stream.safetensors"
FORWARD_STEPS, DRIFT_STEPS = 1024, 4096
MARKS = (64, 256, 1024, 4096)
"""Steps after which the error is told."""

STATE_INSIDE, STATE_FLOOR = 4.0, 2.0**-20
"""Of a state inside the file: how much further it may drift on the saved stream than on the
random one that its drift was measured on, and four units in the last place of float32."""


@dataclass(frozen=True)
class SavedStream:
    """One long stream with what it must give.

    Attributes:
        reset: the state before the first step.
        name, output: of the sequence input and of the result.
        inputs: (1, N, ...), float32 or integer.
        forward: (1, M, ...), float64: one forward over the first M <= N steps.
        steps: (1, N, ...), float64: the reference's own steps.
        max_steps: the model's longest stream, or None.
    """

    reset: StreamState
    name: str
    output: str
    inputs: np.ndarray
    forward: np.ndarray
    steps: np.ndarray
    max_steps: int | None = None


def write_stream(
    folder: Path,
    module: Any,
    sequence: TensorSpec,
    output: str,
    dataset: Dataset | None,
    *,
    subject: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SavedStream:
    """Compute and write the reset state and one long stream.

    The stream has 4,096 steps, or as many as the model takes: the data set's
    real steps one sample after the other, or random ones.

    Args:
        folder: the bundle's ``golden``.
        module: a causal model (:class:`flowexport.lowering.StreamingModule`).
        sequence: the input's spec, (batch, length, ...).
        subject: identity of the model, the recipe's sha256.
    """
    import copy

    import torch
    from safetensors.numpy import save_file

    double = copy.deepcopy(module).double().eval()
    limit = min(DRIFT_STEPS, module.max_steps or DRIFT_STEPS)
    inputs = _long_stream(sequence, dataset, limit, seed)
    tensor = torch.from_numpy(inputs)
    tensor = tensor.double() if tensor.is_floating_point() else tensor
    steps = []
    with torch.no_grad():
        forward = double(tensor[:, :FORWARD_STEPS]).numpy()
        state = double.initial_state(1, torch.float64)
        for t in range(limit):
            result, state = double.step(tensor[:, t], state)
            steps.append(result.numpy())
            if progress is not None and t % 64 == 0:
                progress(t, limit)
    values = {n: v.numpy() for n, v in module.initial_state().items()}
    reset = StreamState(subject, values)
    stacked = np.stack(steps, axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder / STATE_FILE, reset)
    longest = "" if module.max_steps is None else str(module.max_steps)
    facts = {
        "subject": subject,
        "input": sequence.name,
        "output": output,
        "max_steps": longest,
    }
    tensors = {"inputs": inputs, "forward": forward, "steps": stacked}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / STREAM_FILE, facts)
    return SavedStream(reset, sequence.name, output, inputs, forward, stacked, module.max_steps)


def read_stream(folder: Path, *, subject: str) -> SavedStream:
    """Read what :func:`write_stream` wrote; the bundle vouches for the files' hashes.

    Raises:
        BundleError: a file is missing, unreadable or written for another model.
    """
    reset = read_state(folder / STATE_FILE)
    facts, tensors = _open(folder / STREAM_FILE)
    found = {reset.model, facts.get("subject", "")}
    if found != {subject}:
        raise BundleError(
            f"read stream {folder}: it was written for {', '.join(f[:12] for f in found)};"
            f" expected {subject[:12]}….",
            fix="convert again; a bundle is not edited by hand",
        )
    return SavedStream(
        reset,
        facts["input"],
        facts["output"],
        tensors["inputs"],
        tensors["forward"],
        tensors["steps"],
        int(facts["max_steps"]) if facts["max_steps"] else None,
    )


def write_state(path: Path, state: StreamState) -> None:
    """Write a state; its model and the count of steps go into the file's metadata."""
    from safetensors.numpy import save_file

    metadata = {"model": state.model, "steps": str(state.steps)}
    save_file({n: np.ascontiguousarray(v) for n, v in state.values.items()}, path, metadata)


def read_state(path: Path) -> StreamState:
    """Read a state.

    Raises:
        BundleError: the file is missing, no safetensors file, or says no model.
    """
    facts, tensors = _open(path)
    if not facts.get("model") or not facts.get("steps", "").isdigit():
        raise BundleError(f"read state {path}: it says neither its model nor its steps.")
    return StreamState(facts["model"], tensors, int(facts["steps"]))


def run_steps(
    stream: Stream,
    reset: StreamState,
    name: str,
    output: str,
    inputs: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Run (B, L, ...) step by step, and return (B, L, ...).

    An artifact of batch 1 gets one sample after the other.
    """
    specs = {s.name: s for s in stream.session.artifact.inputs}
    dynamic = isinstance(specs[name].shape[0], str)
    groups = [inputs] if dynamic else [inputs[i : i + 1] for i in range(len(inputs))]
    results = []
    total = len(groups) * inputs.shape[1]
    for done, group in enumerate(groups):
        state = reset.for_batch(len(group))
        rows = []
        for t in range(group.shape[1]):
            outputs, state = stream.step({name: np.ascontiguousarray(group[:, t])}, state)
            rows.append(outputs[output])
            if progress is not None and t % 64 == 0:
                progress(done * group.shape[1] + t, total)
        results.append(np.stack(rows, axis=1))
    return np.concatenate(results)


def expected_streams(
    artifact: Artifact, saved: SavedStream, cases: Mapping[str, Any], dataset: Dataset | None
) -> tuple[tuple[str, str], ...]:
    """Return the (case, output) pairs that :func:`check_streams` compares."""
    names = [f"step/{case}" for case in cases]
    names += [f"step/{saved.forward.shape[1]}-steps-forward", f"step/{len(saved.inputs[0])}-steps"]
    names += [f"{f}/stream" for f in _forwards(artifact, saved)]
    if dataset is not None:
        names.append(f"step/{dataset.name}")
    return tuple((name, saved.output) for name in names)


def check_streams(
    target: Any,
    artifact: Artifact,
    saved: SavedStream,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    expected: Mapping[str, Mapping[str, np.ndarray]],
    dataset: Dataset | None,
    reference_steps: np.ndarray | None,
    *,
    threads: int,
    tell: Callable[[str, int, int], None],
    found: Callable[[str, str, np.ndarray, np.ndarray], None],
) -> StreamResult:
    """Run the steps and the other lengths' forwards; hand every pair of arrays to ``found``.

    The golden cases step by step are held to one float64 forward; so is the
    long stream, and to the reference's own steps beyond what a forward takes.
    """
    output = saved.output
    for name in _forwards(artifact, saved):
        length = int(artifact.functions[name].inputs[0].shape[1])
        tell(name, 0, 1)
        with target.load(artifact.function(name), threads=threads) as session:
            values = session.run({saved.name: np.ascontiguousarray(saved.inputs[:, :length])})
        found(f"{name}/stream", output, values[output], saved.forward[:, :length])
    with target.load(artifact.function(STEP), threads=threads) as session:
        stream = Stream(session, saved.max_steps)

        def run(case: str, inputs: np.ndarray) -> np.ndarray:
            return run_steps(
                stream, saved.reset, saved.name, output, inputs, lambda d, t: tell(case, d, t)
            )

        for case, feeds in cases.items():
            label = f"step/{case}"
            found(label, output, run(label, feeds[saved.name]), expected[case][output])
        count = saved.inputs.shape[1]
        values = run(f"step/{count}-steps", saved.inputs)
        first = saved.forward.shape[1]
        found(f"step/{first}-steps-forward", output, values[:, :first], saved.forward)
        found(f"step/{count}-steps", output, values, saved.steps)
        after: dict[str, Any] = {}
        if dataset is not None and reference_steps is not None and dataset.lengths is not None:
            label = f"step/{dataset.name}"
            scores = run(label, dataset.inputs[saved.name])
            found(label, output, scores, reference_steps)
            after = {
                "dataset": dataset.name,
                "samples": len(dataset),
                "correct_after_step": correct_after_step(scores, dataset),
                "reference_after_step": correct_after_step(reference_steps, dataset),
            }
    _check_state_inside(target, artifact, saved, threads, tell)
    return StreamResult(
        steps=count,
        state_bytes=saved.reset.size_bytes,
        drift=drift(values, saved.steps),
        **after,
    )


def _check_state_inside(
    target: Any,
    artifact: Artifact,
    saved: SavedStream,
    threads: int,
    tell: Callable[[str, int, int], None],
) -> None:
    """Run the function that keeps its state itself, and hold it to the drift that its maker saw.

    No tolerance of explicit states fits it: its states have fewer bits.

    Raises:
        VerificationError: its error is larger.
    """
    told = artifact.details.get("stateful")
    if told is None:
        return
    function, (steps, seen) = told["function"], told["drift"][0]
    steps = min(steps, saved.inputs.shape[1])
    rows = []
    with target.load(artifact.function(function), threads=threads) as session:
        session.reset_states()
        for t in range(steps):
            tell(function, t, steps)
            feeds = {saved.name: np.ascontiguousarray(saved.inputs[:, t])}
            rows.append(session.run(feeds)[saved.output])
    ((_, error),) = drift(np.stack(rows, axis=1), saved.steps[:, :steps])
    most = STATE_INSIDE * max(seen, STATE_FLOOR)
    if not error <= most:
        raise VerificationError(
            f"{function} is {error:.2g} of the largest output off after {steps} steps; expected"
            f" at most {most:.2g}, {STATE_INSIDE:g} times what it was when the file was made."
        )


def drift(values: np.ndarray, reference: np.ndarray) -> tuple[tuple[int, float], ...]:
    """Return (steps so far, largest error of the last 64 of them relative to the largest value)."""
    error = np.abs(values.astype(np.float64) - reference)
    peak = float(np.abs(reference).max()) or 1.0
    marks = [m for m in MARKS if m <= error.shape[1]] or [error.shape[1]]
    return tuple((m, float(error[:, max(0, m - 64) : m].max()) / peak) for m in marks)


def correct_after_step(scores: np.ndarray, dataset: Dataset) -> tuple[int, ...]:
    """Count right answers after each step over all samples; an ended one keeps its last answer.

    Args:
        scores: (samples, steps, classes).
        dataset: with ``lengths``.
    """
    assert dataset.lengths is not None
    right = scores.argmax(axis=2) == dataset.targets[:, None]
    step = np.minimum(np.arange(scores.shape[1])[None], dataset.lengths[:, None] - 1)
    return tuple(int(n) for n in np.take_along_axis(right, step, axis=1).sum(axis=0))


def last_answers(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the scores after each sample's last real step: (N, L, C) -> (N, C)."""
    return np.asarray(scores[np.arange(len(lengths)), lengths - 1])


def _forwards(artifact: Artifact, saved: SavedStream) -> list[str]:
    """Return the other lengths' forwards that the saved stream is long enough for."""
    return [
        name
        for name, function in artifact.functions.items()
        if name.startswith(f"{FORWARD}_")
        and int(function.inputs[0].shape[1]) <= saved.forward.shape[1]
    ]


def _long_stream(
    sequence: TensorSpec, dataset: Dataset | None, steps: int, seed: int
) -> np.ndarray:
    if dataset is not None and dataset.lengths is not None:
        samples = dataset.inputs[sequence.name]
        real = np.concatenate([s[:n] for s, n in zip(samples, dataset.lengths, strict=True)])
        return np.ascontiguousarray(np.resize(real, (1, steps, *real.shape[1:])))
    rng = np.random.default_rng(seed)
    shape = (1, steps, *map(int, sequence.shape[2:]))
    dtype = np.dtype(sequence.dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _open(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BundleError(f"read stream {path}: is missing; expected a file.")
    try:
        with safe_open(path, "numpy") as file:
            return dict(file.metadata() or {}), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"read stream {path}: cannot be read ({error}).") from error
