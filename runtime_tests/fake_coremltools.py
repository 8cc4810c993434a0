"""A coremltools that a Linux machine can run, for the script that verifies on a Mac.

It follows the documented API (coremltools 9: ``MLModel.predict``, ``ComputeUnit``,
``MLComputePlan``) and answers out of a bundle's own golden files: inputs that the
bundle does not hold are an error. A step answers out of ``FAKE_STEPS``, a table that
:func:`write_steps` made: a state that no step gave is an error too. ``FAKE_MODE`` damages
it in one way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

INIT = """
import enum, hashlib, os
from types import SimpleNamespace

__version__ = "9.0-fake"
MODE = os.environ.get("FAKE_MODE", "")

class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4

from . import models
"""

MODELS = """
import hashlib, json, os, time
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
import coremltools as ct

def key(feeds):
    digest = hashlib.sha256()
    for name in sorted(feeds):
        value = feeds[name]
        if not isinstance(value, np.ndarray):
            assert type(value).__module__ == "PIL.Image" and value.mode in ("L", "RGB"), value
            value = np.asarray(value)
        digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()

class MLModel:
    def __init__(self, model, compute_units=None, function_name=None):
        if ct.MODE == "load" and compute_units is ct.ComputeUnit.CPU_AND_NE:
            raise RuntimeError("Error compiling model: no such unit\\nmore of it")
        self.path, self.units = Path(model), compute_units
        root = self.path.parent.parent
        manifest = json.loads((root / "manifest.json").read_text())
        entry = manifest["targets"]["coreml"]
        self.image = entry["details"].get("image")
        self.classes = entry["details"].get("classes")
        assert (function_name is None) == (not entry["functions"]), function_name
        self.known = {}
        if function_name == "step":
            table = np.load(os.environ["FAKE_STEPS"])
            for i in range(int(table["count"])):
                given, found = ({n.split("/")[2]: table[n] for n in table.files
                                 if n.startswith(f"{i}/{end}/")} for end in ("in", "out"))
                self.known[key(given)] = found
            return
        golden = load_file(root / "golden/cases.safetensors")
        index = json.loads((root / "golden/index.json").read_text())
        for case, names in index["cases"].items():
            self._learn({n: golden[f"{case}/input/{n}"] for n in names["inputs"]},
                        {n: golden[f"{case}/output/{n}"] for n in names["outputs"]})
        if not (root / "evaluation").is_dir():
            return
        held = load_file(root / "evaluation/dataset.safetensors")
        self._learn({n[6:]: v for n, v in held.items() if n.startswith("input/")},
                    {"logits": held["reference_logits"]})

    def _learn(self, inputs, outputs):
        for i in range(len(next(iter(inputs.values())))):
            feeds = {n: v[i:i + 1] for n, v in inputs.items()}
            if self.image:
                told, name = self.image, self.image["input"]
                wide = feeds[name][0].astype(np.float64) * told["std"][0] + told["mean"][0]
                low, high = told["range"]
                pixels = np.round((wide - low) / (high - low) * 255).astype(np.uint8)
                feeds[name] = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
            found = {n: v[i:i + 1].astype(np.float32) for n, v in outputs.items()}
            self.known[key(feeds)] = found

    def predict(self, data):
        time.sleep(0.0002)
        if ct.MODE == "predict":
            raise RuntimeError("Unable to compute the prediction")
        found = {n: v.copy() for n, v in self.known[key(data)].items()}
        if ct.MODE == "wrong":
            found = {n: v if n.startswith("next_") else v * 1.05 for n, v in found.items()}
        if self.classes:
            powers = np.exp(found["logits"][0])
            found["classLabel_probs"] = dict(zip(self.classes, (powers / powers.sum()).tolist()))
            found["classLabel"] = self.classes[int(powers.argmax())]
        return found

    def get_compiled_model_path(self):
        return str(self.path.with_suffix(".mlmodelc"))
"""

PLAN = """
import os
from types import SimpleNamespace as Space
import coremltools as ct

class MLCPUComputeDevice: pass
class MLNeuralEngineComputeDevice: pass

class MLComputePlan:
    @staticmethod
    def load_from_path(path, compute_units=None):
        if ct.MODE == "noplan":
            raise RuntimeError("MLComputePlan needs macOS 14.4")
        assert path.endswith(".mlmodelc")
        plan = MLComputePlan()
        names = ["const", "ios16.conv", "ios16.linear", "ios16.linear", "ios16.classify"]
        block = Space(operations=[Space(operator_name=n) for n in names])
        names = ["forward", "step"] if os.environ.get("FAKE_STEPS") else ["main"]
        functions = {n: Space(block=block) for n in names}
        plan.model_structure = Space(program=Space(functions=functions))
        return plan

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        if operation.operator_name == "const":
            return None
        slow = operation.operator_name == "ios16.classify"
        return Space(preferred_compute_device=(
            MLCPUComputeDevice() if slow else MLNeuralEngineComputeDevice()))

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        return Space(weight=0.25)
"""

SITE = """
import os, platform
if os.environ.get("FAKE_MAC"):
    platform.system = lambda: "Darwin"
    platform.mac_ver = lambda: ("15.1", ("", "", ""), "arm64")
"""


def write_steps(bundle: Path, file: Path) -> None:
    """Write what the package's step gives on every golden sequence, as interpreted."""
    from flowexport import parity
    from flowexport.bundle import Bundle
    from flowexport.core.types import STEP
    from flowexport.registry import TARGETS

    artifact = Bundle.open(bundle).artifacts()["coreml"].function(STEP)
    names = artifact.functions[STEP].state
    reset = parity.read_state(bundle / "golden/state.safetensors")
    table: dict[str, np.ndarray] = {}
    count = 0
    with TARGETS.get("coreml").load(artifact) as session:
        for feeds in parity.read_golden(bundle / "golden").cases.values():
            ((name, sequences),) = feeds.items()
            for sequence in sequences:
                state = dict(reset.values)
                for frame in sequence:
                    given = {name: np.ascontiguousarray(frame[None]), **state}
                    found = session.run(given)
                    state = {n: found[output] for n, output in names.items()}
                    table |= {f"{count}/in/{n}": v for n, v in given.items()}
                    table |= {f"{count}/out/{n}": v for n, v in found.items()}
                    count += 1
    np.savez(file, count=count, **table)


def write_fake(folder: Path) -> Path:
    """Write the package and a ``sitecustomize`` that says Darwin; return the folder."""
    files = {
        "coremltools/__init__.py": INIT,
        "coremltools/models/__init__.py": MODELS,
        "coremltools/models/compute_plan.py": PLAN,
        "sitecustomize.py": SITE,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
