"""The check of one finished artifact: run it on the saved inputs, judge what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowexport.core.errors import FlowExportError, UnavailableError
from flowexport.core.hashing import sha256_tree
from flowexport.core.reports import (
    EVALUATION_PREFIX,
    AccuracyResult,
    BucketResult,
    CaseResult,
    ParityReport,
    StreamResult,
    Tolerance,
)
from flowexport.core.types import Artifact, Session, Target
from flowexport.parity.batching import run_batched
from flowexport.parity.buckets import Bucket, bucket_result
from flowexport.parity.identity import Identity, file_labels
from flowexport.parity.metrics import compare
from flowexport.parity.noise import limit
from flowexport.parity.storage import Evaluation, Golden
from flowexport.parity.streaming import SavedStream, check_streams, expected_streams

REFERENCE = "the torch module in float64"

Progress = Callable[[str, int, int], None]
"""Called with (what is running, done, total)."""


def verify_artifact(
    target: Target,
    artifact: Artifact,
    golden: Golden,
    evaluation: Evaluation | None,
    tolerance: Tolerance,
    *,
    check_hash: bool = True,
    require_fusions: Mapping[str, int] | None = None,
    identity: Identity | None = None,
    stream: SavedStream | None = None,
    buckets: Sequence[Bucket] = (),
    threads: int = 1,
    progress: Progress | None = None,
) -> ParityReport:
    """Run an artifact on every golden case and the evaluation set, and judge it.

    The evaluation set counts as one more expected case (``evaluation/<name>``):
    its scores are held to the tolerance as well as its accuracy. A runtime
    that is not here gives NOT_RUN; a file that is missing, changed, cannot be
    loaded or makes the runtime raise gives FAIL with what it said. Fusions are
    read out of the finished file, not taken from the manifest.

    Args:
        check_hash: False only where damage is to be found by numbers alone.
        require_fusions: fused operator -> count that the finished file must hold.
        identity: what the finished file must say of itself.
        stream: of a causal model: its steps are run and held to the reference too.
        buckets: of a model of several lengths: its other functions are run too.
        threads: of the runtime.

    Returns:
        The evidence; never raises for a bad artifact.
    """
    report = ParityReport(
        target=artifact.target,
        artifact_sha256=None,
        manifest_sha256=artifact.sha256,
        tolerance=tolerance,
        reference=REFERENCE,
        expected=_expected(golden, evaluation, artifact, stream, buckets),
        required_fusions=dict(require_fusions or {}),
        hash_checked=check_hash,
    )
    if not artifact.path.exists():
        return replace(report, failure=f"{artifact.path.name} is missing from the bundle")
    report = replace(report, artifact_sha256=sha256_tree(artifact.path))
    if check_hash and report.artifact_sha256 != artifact.sha256:
        return report  # its own reason; bytes that nobody vouches for are not run
    for name, function in artifact.functions.items() if check_hash else ():
        if not function.path.exists() or sha256_tree(function.path) != function.sha256:
            what = "is missing" if not function.path.exists() else "is not what the manifest has"
            return replace(report, failure=f"{function.path.name} ({name}) {what}")
    labels: tuple[str, ...] | None = None
    if require_fusions or identity is not None:
        try:
            found = target.inspect(artifact.path)
            others = [] if identity is None else _beside(target, artifact, identity)
        except UnavailableError as error:
            return replace(report, not_run=error.message.rstrip("."), fix=error.fix)
        except Exception as error:
            return replace(report, failure=f"the file cannot be read: {_said(error)}")
        report = replace(
            report,
            fusions=dict(found.get("fusions", {})),
            mismatches=() if identity is None else (*identity.mismatches(found), *others),
        )
        labels = file_labels(found)
    try:
        session = target.load(artifact, threads=threads)
    except UnavailableError as error:
        if report.mismatches:  # found without a runtime: no NOT_RUN hides it
            return report
        return replace(report, not_run=error.message.rstrip("."), fix=error.fix)
    except Exception as error:
        return replace(report, failure=f"the runtime cannot load it: {_said(error)}")
    with session:
        names = None if identity is None else (labels, tuple(identity.labels))
        run = _Run(session, artifact, golden, evaluation, progress, names)
        try:
            report = replace(report, runtime=session.info.to_json())
            run.all()
            if stream is not None:
                run.steps(target, stream, threads)
            run.lengths(target, buckets, threads)
            failure = None
        except UnavailableError as error:
            return replace(report, not_run=error.message.rstrip("."), fix=error.fix)
        except FlowExportError as error:
            failure = f"{run.current}: {_said(error)}"
        except Exception as error:
            failure = f"{run.current}: the runtime raised {_said(error)}"
        # After the runs: what was delegated where is known only then.
        return replace(
            report,
            runtime=session.info.to_json(),
            cases=tuple(run.results),
            accuracy=run.accuracy,
            stream=run.stream,
            buckets=tuple(run.buckets),
            failure=failure or _tells_nothing(golden),
        )


@dataclass
class _Run:
    """State of one verification while it runs."""

    session: Session
    artifact: Artifact
    golden: Golden
    evaluation: Evaluation | None
    progress: Progress | None
    names: tuple[tuple[str, ...] | None, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        self.results: list[CaseResult] = []
        self.accuracy: AccuracyResult | None = None
        self.stream: StreamResult | None = None
        self.buckets: list[BucketResult] = []
        self.current = "start"

    def all(self) -> None:
        total = len(self.golden.cases)
        for done, (case, feeds) in enumerate(self.golden.cases.items()):
            self.current = case
            if self.progress is not None:
                self.progress(case, done, total)
            self._compare(case, run_batched(self.session, feeds), self.golden.expected[case])
        if self.evaluation is not None:
            self._evaluate(self.evaluation)

    def steps(self, target: Target, stream: SavedStream, threads: int) -> None:
        """Run a causal artifact's other functions."""

        def tell(what: str, done: int, total: int) -> None:
            self.current = what
            if self.progress is not None:
                self.progress(what, done, total)

        evaluation = self.evaluation
        self.stream = check_streams(
            target,
            self.artifact,
            stream,
            self.golden.cases,
            self.golden.expected,
            None if evaluation is None else evaluation.dataset,
            None if evaluation is None else evaluation.reference_steps,
            threads=threads,
            tell=tell,
            found=lambda case, name, values, truth: self._compare(
                case, {name: values}, {name: truth}
            ),
        )

    def lengths(self, target: Target, buckets: Sequence[Bucket], threads: int) -> None:
        """Run the other lengths of a bucketed artifact, each on what it must give."""
        for done, bucket in enumerate(buckets):
            self.current = name = bucket.function
            if self.progress is not None:
                self.progress(name, done, len(buckets))
            with target.load(self.artifact.function(name), threads=threads) as session:
                for case, feeds in bucket.golden.cases.items():
                    outputs = run_batched(session, feeds)
                    self._compare(f"{name}/{case}", outputs, bucket.golden.expected[case])
                evaluation = bucket.evaluation
                if evaluation is None:
                    continue
                scores = run_batched(session, evaluation.dataset.inputs).get(evaluation.output)
            reference = evaluation.reference_logits
            if scores is None:
                continue  # an absent one is told by the expected set
            output = evaluation.output
            self._compare(bucket.evaluation_case, {output: scores}, {output: reference})
            fits = scores.shape == reference.shape and np.isfinite(scores).all()
            if fits and self.evaluation is not None:
                self.buckets.append(bucket_result(bucket, scores, self.evaluation))

    def _evaluate(self, evaluation: Evaluation) -> None:
        case = self.current = EVALUATION_PREFIX + evaluation.dataset.name
        tell = self.progress
        outputs = run_batched(
            self.session,
            evaluation.dataset.inputs,
            progress=None if tell is None else lambda done, total: tell(case, done, total),
        )
        reference = evaluation.reference_logits
        scores = outputs.get(evaluation.output)
        if scores is not None:
            scores = evaluation.answers(scores)
            self._compare(case, {evaluation.output: scores}, {evaluation.output: reference})
        if scores is not None and scores.shape == reference.shape and np.isfinite(scores).all():
            self.accuracy = count_predictions(evaluation, scores, *(self.names or ()))

    def _compare(
        self, case: str, outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
    ) -> None:
        dtypes = {s.name: s.dtype for s in self.artifact.outputs}
        evaluation = self.evaluation
        for name, reference in expected.items():
            if name in outputs:  # an absent one is told by the expected set
                noise = self.golden.noise.get(case, {}).get(name)
                if evaluation is not None and case == EVALUATION_PREFIX + evaluation.dataset.name:
                    noise = evaluation.noise
                result = compare(case, name, outputs[name], reference, dtype=dtypes[name])
                most = limit(noise, self.artifact.precision)
                told = self.artifact.details.get("clipping", {}).get(case, {})
                self.results.append(replace(result, limit=most, **told))


def count_predictions(
    evaluation: Evaluation,
    scores: np.ndarray,
    named: tuple[str, ...] | None = None,
    labels: tuple[str, ...] = (),
) -> AccuracyResult:
    """Count an artifact's predictions against the labels and the reference's.

    Args:
        scores: (samples, classes), finite.
        named: the class names in the finished file: an app shows these, so a
            prediction counts by its name. None: the file has none.
        labels: the class names that the bundle gives the same outputs.
    """
    ours = scores.argmax(axis=1)
    if named and len(labels) == scores.shape[1]:
        # A name that the bundle does not know, or a class without a name, is nobody's.
        index = {name: i for i, name in enumerate(labels)}
        meant = [index.get(name, -1) for name in named]
        ours = np.array([meant[i] if i < len(meant) else -1 for i in ours])
    theirs = evaluation.reference_logits.argmax(axis=1)
    right, reference_right = (
        ours == evaluation.dataset.targets,
        theirs == evaluation.dataset.targets,
    )
    return AccuracyResult(
        dataset=evaluation.dataset.name,
        expected_samples=len(evaluation.dataset),
        samples=len(scores),
        correct=int(right.sum()),
        reference_correct=int(reference_right.sum()),
        agreement=int((ours == theirs).sum()),
        lost=int((reference_right & ~right).sum()),
        gained=int((right & ~reference_right).sum()),
    )


def _expected(
    golden: Golden,
    evaluation: Evaluation | None,
    artifact: Artifact,
    stream: SavedStream | None,
    buckets: Sequence[Bucket],
) -> tuple[tuple[str, str], ...]:
    pairs = [(case, output) for case, outputs in golden.expected.items() for output in outputs]
    if evaluation is not None:
        pairs.append((EVALUATION_PREFIX + evaluation.dataset.name, evaluation.output))
    if stream is not None:
        dataset = evaluation.dataset if evaluation is not None else None
        pairs += expected_streams(artifact, stream, golden.cases, dataset)
    for bucket in buckets:
        pairs += bucket.expected
    return tuple(pairs)


def _beside(target: Target, artifact: Artifact, identity: Identity) -> list[str]:
    """Say how functions that are files of their own differ from what the bundle says of them."""
    return [
        f"{name}: {problem}"
        for name, function in artifact.functions.items()
        if function.path != artifact.path
        for problem in identity.beside(name).mismatches(target.inspect(function.path))
    ]


def _tells_nothing(golden: Golden) -> str | None:
    """Say so where a file that ignores its inputs would match the golden cases."""
    singles: dict[str, list[np.ndarray]] = {}
    for outputs in golden.expected.values():
        for name, value in outputs.items():
            singles.setdefault(name, []).append(value[:1])
    for name, values in singles.items():
        if len(values) > 1 and all(np.array_equal(values[0], v) for v in values[1:]):
            return (
                f"the reference's {name} is the same for all {len(values)} golden cases; "
                "expected cases that a constant could not match"
            )
    return None


def _said(error: Exception) -> str:
    """Return an exception in one line of bounded length."""
    if isinstance(error, FlowExportError):
        return error.message.rstrip(".")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or "no message"
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"
