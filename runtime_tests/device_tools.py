"""A bundle of the numpy classifier, and device reports as a client would write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from evidence_fakes import CHANNELS, INPUTS, OUTPUTS, STEPS, TOLERANCE, FakeTarget
from evidence_fakes import evaluation as fake_evaluation
from evidence_fakes import golden as fake_golden
from flowexport_models.data.sources import series_sources

from flowexport.bench import bench_feeds, measure
from flowexport.bundle import file_table, write_json
from flowexport.core.types import Options
from flowexport.devices import MergeResult, merge_reports
from flowexport.devices.reading import decode, encode
from flowexport.package import Package
from flowexport.parity import verify_artifact, write_evaluation, write_golden
from flowexport.report import validate, write_report

SUBJECT = "1" * 64
Report = dict[str, Any]


def write_bundle(folder: Path, name: str = "fakes", *, damaged: str | None = None) -> Path:
    """Write a bundle with targets ``onnx``, ``tflite`` and ``tensorrt``.

    Args:
        damaged: a target whose verification fails.
    """
    root = folder / name
    golden, evaluation = fake_golden(), fake_evaluation()
    write_golden(root / "golden", golden.cases, golden.expected, subject=SUBJECT)
    write_evaluation(
        root / "evaluation",
        evaluation.dataset,
        "logits",
        evaluation.reference_logits,
        subject=SUBJECT,
    )
    entries, parity, sessions = {}, {}, {}
    for target_name in ("onnx", "tflite", "tensorrt"):
        target = FakeTarget(target_name)
        if target_name == damaged:
            target.damage = lambda r: {**r, "logits": r["logits"] + 1}
        target.parameters[target_name] = np.zeros(1)  # so that no two files are the same
        artifact = target.convert(None, Options(), root / target_name)
        parity[target_name] = verify_artifact(
            target, artifact, golden, evaluation, TOLERANCE, require_fusions={}
        )
        sessions[target_name] = target.load(artifact)
        entries[target_name] = {
            **artifact.to_json(root),
            "tolerance": TOLERANCE.to_json(),
            "required_fusions": {},
        }
    feeds = bench_feeds(INPUTS, golden.cases["zeros"])
    latency = measure(sessions, feeds, warmup=1, min_runs=20, min_seconds=0)
    manifest: dict[str, Any] = {
        "schema": "flowexport.manifest/1",
        "name": name,
        "flowexport": "0.1.0",
        "description": "A classifier in numpy.",
        "recipe": {"name": name},
        "recipe_sha256": SUBJECT,
        "model": {
            "name": "fake-classifier", "description": "", "paper": "", "parameters": 16,
            "attentions": 2,
        },
        "machine": {"platform": "test", "architecture": "test", "python": "3"},
        "inputs": [s.to_json() for s in INPUTS],
        "outputs": [s.to_json() for s in OUTPUTS],
        "labels": list("abcd"),
        "preprocessing": {
            "x": "in words",
            "sources": series_sources(STEPS, [0.5] * CHANNELS, [2.0] * CHANNELS),
        },
        "versions": {},
        "targets": entries,
        "not_run": {},
    }  # fmt: skip
    write_report(root, manifest, parity, latency)
    manifest["files"] = file_table(root)
    validate(manifest, "manifest")
    write_json(root / "manifest.json", manifest)
    return root


def device_report(
    package: Package, *, label: str = "a phone", kind: str = "web", ms: float = 2.0, seed: int = 0
) -> dict[str, Any]:
    """Return a sound report on every model file of a package."""
    rng = np.random.default_rng(seed)
    runs = []
    for model in package.manifest["models"]:
        _, expected = package.golden(model)
        tensors = package.evaluation(model)
        for name, file in model["files"].items():
            times = (ms * rng.lognormal(0, 0.1, 40)).round(4).tolist()
            runs.append(
                {
                    "model": model["id"],
                    "format": name,
                    "model_sha256": file["sha256"],
                    "model_size_bytes": file["size_bytes"],
                    "runtime": {"name": f"{name}-web", "version": "1.0"},
                    "backend": {"requested": "wasm", "effective": "wasm", "fallback_reason": None},
                    "threads": {"requested": 1, "effective": 1},
                    "precision": "fp32",
                    "load": {"cold_ms": 12.5, "fetch_ms": None, "from": None},
                    "preprocessing": [
                        {
                            "source": source,
                            "case": case,
                            "error": None,
                            "inputs": [
                                encode(n.removeprefix("input/"), v)
                                for n, v in arrays.items()
                                if n != "raw"
                            ],
                        }
                        for (source, case), arrays in package.preprocessing(model).items()
                    ],
                    "golden": [
                        {
                            "name": case,
                            "error": None,
                            "outputs": [
                                encode(n, v.astype(np.float32)) for n, v in outputs.items()
                            ],
                        }
                        for case, outputs in expected.items()
                    ],
                    "latency": {
                        "warmup": 5,
                        "batch": 1,
                        "pre_ms": [0.1] * 40,
                        "inference_ms": times,
                        "post_ms": None,
                        "duration_ms": sum(times) + 10,
                    },
                    "sustained": None,
                    "evaluation": {
                        "name": model["evaluation"]["name"],
                        "predictions": tensors["reference_top1"].tolist(),
                    },
                    "memory": {"before_bytes": None, "peak_bytes": None, "source": None},
                    "power": {"start": dict(POWER), "end": dict(POWER)},
                    "errors": [],
                }
            )
    return {
        "schema": "flowexport.report/1",
        "created": "2026-11-20T20:00:00Z",
        "client": {"name": "web_demo", "version": "0.1.0", "kind": kind},
        "package_sha256": package.sha256,
        "device": {
            "label": label, "kind": "phone", "manufacturer": None, "model": None, "cpu": None,
            "gpu": None, "architecture": None, "cores": 8, "memory_bytes": None,
        },
        "os": {"name": "Linux", "version": None},
        "browser": {"name": "Chromium", "version": "140", "user_agent": "test"},
        "environment": {"cross_origin_isolated": True},
        "runs": runs,
        "errors": [],
    }  # fmt: skip


POWER = {"thermal": None, "battery_level": None, "charging": None}


def save(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def merger(package: Package, folder: Path) -> Callable[..., MergeResult]:
    """Return a function that merges reports of one package, again into the same place."""

    def merge(*reports: Report, **options: Any) -> MergeResult:
        files = [save(folder / f"report-{i}.json", r) for i, r in enumerate(reports)]
        settings = {"packages": [package.path], "force": True, **options}
        return merge_reports(files, folder / "out", **settings)

    return merge


def first(report: Report) -> Report:
    run: Report = report["runs"][0]
    return run


def set_times(run: Report, times: list[Any], **more: Any) -> None:
    run["latency"].update(inference_ms=times, pre_ms=None, duration_ms=None, **more)


def one_wrong(run: Report) -> None:
    run["evaluation"]["predictions"][3] ^= 1


def shifted(run: Report, by: float, case: int = 0) -> None:
    """Add to the first output of a golden case."""
    tensor = run["golden"][case]["outputs"][0]
    value = decode(tensor)
    assert isinstance(value, np.ndarray)
    run["golden"][case]["outputs"][0] = encode(tensor["name"], (value + by).astype(np.float32))
