"""Verification: saved inputs, the float64 reference, metrics and the verdict of an artifact."""

from flowexport.core.reports import (
    AccuracyResult,
    CaseResult,
    ParityReport,
    Tolerance,
    verdict_of,
)
from flowexport.parity.batching import run_batched
from flowexport.parity.buckets import Bucket, fit_lengths, read_buckets, real_steps, write_buckets
from flowexport.parity.cases import make_cases
from flowexport.parity.metrics import compare
from flowexport.parity.noise import measure_noise
from flowexport.parity.reference import reference_outputs
from flowexport.parity.shorten import shorten
from flowexport.parity.storage import (
    Evaluation,
    Golden,
    read_evaluation,
    read_golden,
    write_evaluation,
    write_golden,
)
from flowexport.parity.streaming import (
    SavedStream,
    read_state,
    read_stream,
    write_state,
    write_stream,
)
from flowexport.parity.verify import verify_artifact

__all__ = [
    "AccuracyResult",
    "Bucket",
    "CaseResult",
    "Evaluation",
    "Golden",
    "ParityReport",
    "SavedStream",
    "Tolerance",
    "compare",
    "fit_lengths",
    "make_cases",
    "measure_noise",
    "read_buckets",
    "read_evaluation",
    "read_golden",
    "read_state",
    "read_stream",
    "real_steps",
    "reference_outputs",
    "run_batched",
    "shorten",
    "verdict_of",
    "verify_artifact",
    "write_buckets",
    "write_evaluation",
    "write_golden",
    "write_state",
    "write_stream",
]
