"""Runs a bundle's Core ML package on this Mac and writes a device report.

Lies in the bundle beside the .mlpackage and needs nothing but Python 3.9,
macOS and coremltools (``pip install coremltools``):

    python3 verify_on_mac.py

On each choice of compute units it runs every golden case and the evaluation
set, measures the latency, and asks Core ML for its compute plan. It judges
nothing: ``flowexport report merge device_report.json --bundle BUNDLE --out DIR``
compares the outputs with the float64 reference.

Exit codes: 0 done, 2 unusable bundle or arguments, 4 a file was changed,
5 no macOS or no coremltools.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import resource
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

SCHEMA = "flowexport.report/1"
UNITS = {
    "cpu_only": "CPU_ONLY",
    "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_and_ne": "CPU_AND_NE",
    "all": "ALL",
}
DEVICES = {"MLCPUComputeDevice": "CPU", "MLGPUComputeDevice": "GPU",
           "MLNeuralEngineComputeDevice": "Neural Engine"}  # fmt: skip
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1",
          "BOOL": "|b1", "I8": "|i1"}  # fmt: skip
USAGE, CHANGED, UNAVAILABLE = 2, 4, 5


def stop(code: int, message: str, fix: str = "") -> NoReturn:
    """End with one message and the command that mends it."""
    print(f"error: {message}{f' Fix: {fix}' if fix else ''}", file=sys.stderr)
    raise SystemExit(code)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The bundle.


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(path: Path) -> str:
    """Hash a folder's sorted relative names and contents, as flowexport does."""
    digest = hashlib.sha256()
    for child in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(child.relative_to(path).as_posix().encode() + b"\0")
        digest.update(sha256_file(child).encode() + b"\n")
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        stop(USAGE, f"{path} cannot be read ({error.strerror}); expected a bundle's file.",
             "--bundle DIR, the folder that holds manifest.json")  # fmt: skip
    except ValueError as error:
        stop(USAGE, f"{path} is no JSON ({error}).", "convert again, or copy the bundle again")


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a .safetensors file with numpy alone."""
    import numpy as np

    data = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            values = data[8 + length + first : 8 + length + last]
            tensors[name] = np.frombuffer(values, DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensors
    except (KeyError, TypeError, ValueError, struct.error) as error:
        stop(USAGE, f"{path} is no .safetensors file ({error}).", "copy the bundle again")


class Bundle:
    """The parts of a bundle that this script needs, every file held against its hash."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = read_json(root / "manifest.json")
        schema = self.manifest.get("schema") if isinstance(self.manifest, dict) else None
        if schema != "flowexport.manifest/1":
            stop(USAGE, f"{root} has a manifest of schema {schema!r};"
                 " expected 'flowexport.manifest/1'.")  # fmt: skip
        self.entry = self.manifest["targets"].get("coreml")
        if self.entry is None:
            stop(USAGE, f"{root} has no Core ML package; it has"
                 f" {', '.join(self.manifest['targets']) or 'none'}.",
                 "flowexport convert RECIPE --target coreml")  # fmt: skip
        self.package = root / self.entry["path"]
        if not self.package.is_dir():
            stop(USAGE, f"{self.package} is missing.", "copy the whole bundle, folders too")
        self.sha256 = sha256_tree(self.package)
        self.require("the package", self.package, self.sha256, self.entry["sha256"])
        self.cases = self._cases()
        self.evaluation = self._evaluation()
        self.state = self._state()

    @staticmethod
    def require(what: str, path: Path, found: str, expected: str) -> None:
        if found != expected:
            stop(CHANGED, f"{what} {path} has sha256 {found[:12]}…; expected {expected[:12]}…"
                 " as the manifest has.", "copy the bundle again")  # fmt: skip

    def checked(self, name: str) -> Path:
        path = self.root / name
        listed = self.manifest["files"].get(name)
        if listed is None or not path.is_file():
            stop(USAGE, f"{path} is missing.", "copy the whole bundle")
        self.require("the file", path, sha256_file(path), listed["sha256"])
        return path

    def _cases(self) -> dict[str, dict[str, Any]]:
        index = read_json(self.checked("golden/index.json"))
        tensors = read_tensors(self.checked("golden/cases.safetensors"))
        return {
            case: {name: tensors[f"{case}/input/{name}"] for name in entry["inputs"]}
            for case, entry in index["cases"].items()
        }

    def _evaluation(self) -> dict[str, Any] | None:
        if not (self.root / "evaluation").is_dir():
            return None
        index = read_json(self.checked("evaluation/index.json"))
        tensors = read_tensors(self.checked("evaluation/dataset.safetensors"))
        inputs = {name: tensors[f"input/{name}"] for name in index["inputs"]}
        return {**index, "inputs": inputs, "lengths": tensors.get("lengths")}

    def _state(self) -> dict[str, Any] | None:
        """Return the reset state of a causal model."""
        if not self.manifest.get("streaming"):
            return None
        return read_tensors(self.checked(self.manifest["streaming"]["reset"]))

    def entries(self) -> list[str]:
        """Return the functions to run: the package's own one, and a causal model's step."""
        functions = self.entry["functions"]
        return [self.entry["entry"], *(["step"] if "step" in functions else [])]


# Running.


class Runner:
    """One function of the package on one choice of compute units."""

    def __init__(self, ct: Any, bundle: Bundle, function: str, units: str) -> None:
        entry = bundle.entry
        start = time.perf_counter()
        self.model = ct.models.MLModel(
            str(bundle.package),
            compute_units=ct.ComputeUnit[UNITS[units]],
            function_name=function if entry["functions"] else None,
        )
        own = entry if function == entry["entry"] else entry["functions"][function]
        self.outputs = [s["name"] for s in own["outputs"]]
        self.inputs = {s["name"]: s for s in own["inputs"]}
        self.following = dict(own.get("state") or {})
        self.image = entry["details"].get("image")
        self.reset = bundle.state
        self.load_ms = 1000 * (time.perf_counter() - start)

    def feeds(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return what ``predict`` takes: an image input as whole 8-bit pixels."""
        import numpy as np

        # Core ML knows no int64: such inputs are int32 in the package.
        feeds: dict[str, Any] = {
            n: np.ascontiguousarray(v.astype(np.int32) if v.dtype == np.int64 else v)
            for n, v in arrays.items()
        }
        if self.image is None:
            return feeds
        from PIL import Image

        told = self.image
        column = (len(told["mean"]), 1, 1)
        low, high = told["range"]
        wide = feeds[told["input"]].astype(np.float64)[0]
        wide = wide * np.reshape(told["std"], column) + np.reshape(told["mean"], column)
        pixels = (wide - low) * 255 / (high - low)
        whole = np.clip(np.round(pixels), 0, 255)
        worst = float(np.abs(pixels - whole).max())
        if worst > 1e-3:
            raise ValueError(f"a golden value is {worst:.3g} pixels from a whole one")
        planes = whole.astype(np.uint8)
        picture = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
        feeds[told["input"]] = Image.fromarray(np.ascontiguousarray(picture))
        return feeds

    def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        results = self.model.predict(feeds)
        missing = [name for name in self.outputs if name not in results]
        if missing:
            raise KeyError(f"predict gave {sorted(results)}; expected {missing[0]}")
        return {name: np.asarray(results[name]) for name in self.outputs}

    def samples(self, arrays: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield one sample's arrays after the other: the package has batch 1."""
        count = len(next(iter(arrays.values())))
        for index in range(count):
            yield {name: value[index : index + 1] for name, value in arrays.items()}

    def run(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Run samples, first dimension of every input; steps where the function has a state."""
        import numpy as np

        rows: dict[str, list[Any]] = {}
        for sample in self.samples(arrays):
            found = self.steps(sample) if self.following else self.predict(self.feeds(sample))
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
        return {name: np.concatenate(values) for name, values in rows.items()}

    def steps(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Run one sequence (1, steps, ...) step by step from the reset state."""
        import numpy as np

        ((name, sequence),) = sample.items()
        state = dict(self.reset or {})
        rows: dict[str, list[Any]] = {}
        for index in range(sequence.shape[1]):
            found = self.predict({name: np.ascontiguousarray(sequence[:, index]), **state})
            state = {key: found.pop(output) for key, output in self.following.items()}
            for output, value in found.items():
                rows.setdefault(output, []).append(value)
        return {output: np.stack(values, axis=1) for output, values in rows.items()}

    def one(self, case: dict[str, Any]) -> dict[str, Any]:
        """Return the feeds of one timed run: a sample, or one step."""
        sample = next(self.samples(case))
        if not self.following:
            return self.feeds(sample)
        ((name, sequence),) = sample.items()
        return {name: sequence[:, 0].copy(), **(self.reset or {})}


def compute_plan(ct: Any, runner: Runner, units: str, function: str) -> dict[str, Any]:
    """Ask Core ML (macOS 14.4 and later) which device each operator would run on.

    Returns:
        ``devices``: operators by device; ``cost``: share of the estimated cost by
        device; ``elsewhere``: operator types that are not on the busiest device.
    """
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(
        path=runner.model.get_compiled_model_path(), compute_units=ct.ComputeUnit[UNITS[units]]
    )
    functions = plan.model_structure.program.functions
    operations = functions[function if function in functions else "main"].block.operations
    devices: Counter[str] = Counter()
    cost: Counter[str] = Counter()
    types: dict[str, Counter[str]] = {}
    for operation in operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is None:  # constants have none
            continue
        kind = type(usage.preferred_compute_device).__name__
        device = DEVICES.get(kind, kind)
        estimate = plan.get_estimated_cost_for_mlprogram_operation(operation)
        devices[device] += 1
        cost[device] += 0.0 if estimate is None else estimate.weight  # type: ignore[assignment]
        types.setdefault(device, Counter())[operation.operator_name] += 1
    busiest = devices.most_common(1)[0][0] if devices else None
    elsewhere = {
        f"{name} on {device}": count
        for device, names in types.items()
        if device != busiest
        for name, count in names.items()
    }
    return {"devices": dict(devices), "cost": dict(cost), "elsewhere": elsewhere}


def encode(name: str, value: Any) -> dict[str, Any]:
    import numpy as np

    data = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
    return {"name": name, "dtype": value.dtype.name, "shape": list(value.shape),
            "data": base64.b64encode(data).decode("ascii")}  # fmt: skip


def said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def measure(runner: Runner, feeds: dict[str, Any], warmup: int, runs: int) -> dict[str, Any]:
    for _ in range(warmup):
        runner.model.predict(feeds)
    samples = []
    begin = time.perf_counter()
    for _ in range(runs):
        start = time.perf_counter()
        runner.model.predict(feeds)
        samples.append(1000 * (time.perf_counter() - start))
    duration = 1000 * (time.perf_counter() - begin)
    return {"warmup": warmup, "batch": 1, "pre_ms": None, "inference_ms": samples,
            "post_ms": None, "duration_ms": duration}  # fmt: skip


def predictions(runner: Runner, evaluation: dict[str, Any]) -> list[int | None]:
    """Return the class of each sample; of a causal model, after its last real step."""
    import numpy as np

    found: list[int | None] = []
    lengths = evaluation["lengths"]
    for index, sample in enumerate(runner.samples(evaluation["inputs"])):
        scores = runner.run(sample)[evaluation["output"]][0]
        if lengths is not None:
            scores = scores[int(lengths[index]) - 1]
        found.append(int(np.argmax(scores)) if np.isfinite(scores).all() else None)
        if index % 100 == 0:
            tell(f"  evaluation {index}")
    return found


def one_run(ct: Any, bundle: Bundle, function: str, units: str, settings: Any) -> dict[str, Any]:
    """Run one function on one choice of units; what failed is told, the rest goes on."""
    tell(f"{function} on {units}")
    errors: list[dict[str, str]] = []
    held = bundle.entry
    run: dict[str, Any] = {
        "model": re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.manifest["name"]).lstrip("-.") or "model",
        "format": "coreml",
        "model_sha256": bundle.sha256,
        "model_size_bytes": held["size_bytes"],
        "runtime": {"name": "Core ML", "version": f"macOS {platform.mac_ver()[0]}"},
        "backend": {"requested": units, "effective": None, "fallback_reason": None},
        "threads": {"requested": None, "effective": None},
        "precision": held["precision"],
        "load": {"cold_ms": None, "fetch_ms": None, "from": None},
        "preprocessing": None,
        "golden": None,
        "latency": None,
        "sustained": None,
        "evaluation": None,
        "memory": {"before_bytes": peak_memory(), "peak_bytes": None, "source": "getrusage"},
        "power": {"start": power(), "end": power()},
        "errors": errors,
    }
    if function == "step":
        run["entry"] = "step"

    def attempt(stage: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever Core ML raises is a finding of this device
            errors.append({"stage": stage, "message": said(error)})
            tell(f"  {stage} failed: {said(error)}")
            return None

    runner = attempt("load", lambda: Runner(ct, bundle, function, units))
    if runner is None:
        return run
    run["load"] = {"cold_ms": runner.load_ms, "fetch_ms": None, "from": "disk"}
    try:
        run["plan"] = compute_plan(ct, runner, units, function)
    except Exception as error:  # macOS before 14.4 has none: no failure of the model
        run["plan"] = said(error)
    golden = []
    for case, arrays in bundle.cases.items():
        try:
            found = runner.run(arrays)
            outputs = [encode(name, value) for name, value in found.items()]
            golden.append({"name": case, "outputs": outputs, "error": None})
        except Exception as error:
            golden.append({"name": case, "outputs": [], "error": said(error)})
            tell(f"  {case} failed: {said(error)}")
    run["golden"] = golden
    if bundle.evaluation is not None and not settings.no_evaluation:
        found = attempt("evaluation", lambda: predictions(runner, bundle.evaluation or {}))
        if found is not None:
            run["evaluation"] = {"name": bundle.evaluation["name"], "predictions": found}
    case = next((c for c in bundle.cases if c.startswith("sample-")), next(iter(bundle.cases)))
    run["latency"] = attempt(
        "latency",
        lambda: measure(runner, runner.one(bundle.cases[case]), settings.warmup, settings.runs),
    )
    run["memory"]["peak_bytes"] = peak_memory()
    run["power"]["end"] = power()
    run["backend"]["effective"] = effective(units, run["plan"])
    return run


def effective(units: str, plan: Any) -> str | None:
    """Name the units with what the plan says of them; None where Core ML tells nothing."""
    if not isinstance(plan, dict) or not plan["devices"]:
        return units if units == "cpu_only" else None
    parts = [f"{device} {count}" for device, count in sorted(plan["devices"].items())]
    return f"{units} (plan: {', '.join(parts)})"


# The machine.


def sysctl(key: str) -> str | None:
    try:
        found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def peak_memory() -> int | None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return int(peak) or None


def power() -> dict[str, Any]:
    """Return the battery's state from pmset; nulls on a Mac without one."""
    nothing = {"thermal": None, "battery_level": None, "charging": None}
    try:
        found = subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return nothing
    level = found.stdout.partition("%")[0].rpartition("\t")[2]
    if not level.isdigit():
        return nothing
    return {"thermal": None, "battery_level": min(int(level) / 100, 1.0),
            "charging": "AC Power" in found.stdout}  # fmt: skip


def report(bundle: Bundle, runs: list[dict[str, Any]], ct: Any, label: str | None) -> Any:
    chip, memory = sysctl("machdep.cpu.brand_string"), sysctl("hw.memsize")
    model = sysctl("hw.model")
    environment: dict[str, Any] = {
        "coremltools": str(getattr(ct, "__version__", "unknown")),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
    for run in runs:
        plan = run.pop("plan", None)
        entry = "step" if run.get("entry") else "forward"
        if plan is not None:
            environment[f"compute_plan.{entry}.{run['backend']['requested']}"] = (
                plan if isinstance(plan, str) else json.dumps(plan, sort_keys=True)
            )
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
        "client": {
            "name": "verify_on_mac.py",
            "version": bundle.manifest["flowexport"],
            "kind": "desktop",
        },
        "package_sha256": None,
        "device": {
            "label": label or " ".join(p for p in ("Mac", model, chip) if p),
            "kind": "desktop",
            "manufacturer": "Apple",
            "model": model,
            "cpu": chip,
            "gpu": None,
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": int(memory) if memory and memory.isdigit() else None,
        },
        "os": {"name": "macOS", "version": platform.mac_ver()[0] or None},
        "browser": None,
        "environment": environment,
        "runs": runs,
        "errors": [],
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--bundle", type=Path, default=here, help="folder with manifest.json")
    parser.add_argument("--out", type=Path, default=Path("device_report.json"))
    parser.add_argument("--units", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--runs", type=int, default=None, help="timed runs; the bundle's number")
    parser.add_argument("--warmup", type=int, default=None, help="runs before them")
    parser.add_argument("--label", help="what the comparison calls this Mac")
    parser.add_argument("--no-evaluation", action="store_true", help="golden cases and times alone")
    settings = parser.parse_args(given)
    for name in ("runs", "warmup"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            stop(USAGE, f"--{name} is {getattr(settings, name)}; expected 1 or more.")
    return settings


def main(given: list[str] | None = None) -> int:
    settings = arguments(given)
    if platform.system() != "Darwin":
        stop(UNAVAILABLE, f"this is {platform.system()}; Core ML runs on macOS only.",
             "copy the bundle to a Mac and run this script there")  # fmt: skip
    try:
        import coremltools as ct
    except ImportError as error:
        stop(UNAVAILABLE, f"coremltools cannot be imported ({error}).", "pip install coremltools")
    if settings.out.exists():
        stop(USAGE, f"{settings.out} exists; expected a new file.", "--out ANOTHER.json")
    bundle = Bundle(settings.bundle)
    bench = bundle.manifest["bench"]
    settings.runs = settings.runs or bench["min_runs"]
    settings.warmup = settings.warmup or bench["warmup"]
    runs = [
        one_run(ct, bundle, function, units, settings)
        for function in bundle.entries()
        for units in settings.units
    ]
    document = report(bundle, runs, ct, settings.label)
    partial = settings.out.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(settings.out)
    except OSError as error:
        stop(USAGE, f"{settings.out} cannot be written ({error.strerror}).", "--out PATH")
    failed = sum(bool(r["errors"]) for r in runs)
    tell(f"{len(runs)} runs, {failed} of them with errors: {settings.out}")
    tell(f"next: flowexport report merge {settings.out} --bundle BUNDLE --out DIR")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
