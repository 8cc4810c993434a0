"""Which layers a quantised precision hurts: each quantised alone, everything else float.

Measured on ONNX Runtime, whose files the other targets' follow in layers and rules.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.calibration import require_calibration, spread, write_samples
from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Artifact, Dataset, Options, Precision
from flowexport.ops.installed import installed_ops
from flowexport.plan import override
from flowexport.progress import SILENT, Progress
from flowexport.recipes import Recipe
from flowexport.registry import TARGETS
from flowexport.resolve import Subject, find_recipe, resolve

if TYPE_CHECKING:
    from flowexport.lowering.layers import Layer

TARGET = "onnx"
SAMPLES = 64
"""Evaluation samples that the outputs are compared on."""
GAIN_DB = 3.0
"""What keeping layers in float has to gain to be proposed: half of the noise."""
SHARE = 0.25
"""Largest share of the quantised weights that a proposal may keep."""


@dataclass(frozen=True)
class LayerNoise:
    """One layer quantised alone.

    Attributes:
        sqnr_db: of the model's output against its float32 file; infinite where equal.
        share: of all noise, were the layers' noises to add up (0..1).
        parameters: of the layer's weight.
    """

    path: str
    treatment: str
    rule: str
    sqnr_db: float
    share: float
    parameters: int


@dataclass(frozen=True)
class Sensitivity:
    """All layers, the worst first, and what to keep in floating point.

    Attributes:
        whole_db: SQNR with every layer quantised.
        keep_float: the proposal, empty where no few layers stand out.
        kept_db: SQNR measured with the proposal kept, None where there is none.
    """

    model: str
    precision: str
    samples: str
    whole_db: float
    layers: tuple[LayerNoise, ...]
    keep_float: tuple[str, ...]
    kept_db: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "precision": self.precision,
            "target": TARGET,
            "samples": self.samples,
            "whole_db": _finite(self.whole_db),
            "layers": [
                {**layer.__dict__, "sqnr_db": _finite(layer.sqnr_db)} for layer in self.layers
            ],
            "keep_float": list(self.keep_float),
            "kept_db": None if self.kept_db is None else _finite(self.kept_db),
        }


def sensitivity(
    source: str | Path | Recipe,
    *,
    precision: str | Precision = Precision.INT8_STATIC,
    weights: str | Path | None = None,
    calibration: str | Path | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Quantise each layer alone and rank them by what the output loses.

    Args:
        precision: a quantised one that ONNX has.
        calibration: samples for int8-static, instead of the recipe's.

    Returns:
        The ranking, and the fewest layers whose float32 gains 3 dB or more.

    Raises:
        InputError: the precision is not quantised, or the model has no evaluation set.
    """
    if precision not in list(Precision):
        raise UnknownNameError("precision", str(precision), [p.value for p in Precision])
    wanted = Precision(precision)
    able = [p.value for p in TARGETS.get(TARGET).precisions if p.quantised]
    if wanted.value not in able:
        raise InputError(
            f"sensitivity: precision is {wanted.value}; expected one of: {', '.join(able)}.",
            fix=f"--precision {able[0]}",
        )
    progress.stage("resolve")
    recipe = override(find_recipe(source), wanted, weights, calibration=calibration)
    subject = resolve(recipe, calibrated=require_calibration(recipe, [TARGET]))
    if subject.dataset is None:
        raise InputError(
            f"sensitivity {recipe.name}: the recipe has no evaluation set; expected one, on whose"
            " samples the outputs are compared.",
            fix="`evaluation: {dataset: NAME}` in the recipe",
        )
    with tempfile.TemporaryDirectory() as folder:
        return _Pass(subject, wanted, Path(folder), progress).run()


class _Pass:
    """The float32 file, made once, and what is measured on variants of it."""

    def __init__(
        self, subject: Subject, precision: Precision, folder: Path, progress: Progress
    ) -> None:
        from flowexport.lowering import lower
        from flowexport.lowering.layers import weighted_layers
        from flowexport.lowering.quantisation import decide

        spec = subject.spec
        assert subject.dataset is not None
        self.subject, self.folder, self.progress = subject, folder, progress
        samples = None
        if subject.calibration is not None:
            samples = folder / "calibration.safetensors"
            write_samples(subject.calibration, samples)
        extra = subject.recipe.options(TARGET).extra
        self.options = Options(precision, extra, (), samples)
        self.dataset = _some(subject.dataset, SAMPLES)
        progress.stage("lower")
        self.program = lower(
            copy.deepcopy(subject.module),
            spec.inputs,
            spec.output_names,
            name=spec.name,
            ops=installed_ops(),
        )
        self.layers: tuple[Layer, ...] = weighted_layers(self.program)
        where = f"sensitivity {spec.name}"
        self.decisions = decide(self.layers, precision, (), where=where, integer_convolutions=False)
        progress.stage("convert onnx fp32")
        self.model, self.artifact = self._float32()
        self.truth = self._outputs(self.artifact)

    def run(self) -> Sensitivity:
        paths = [layer.path for layer in self.layers]
        self.progress.stage("sensitivity")
        whole = self._loss(())
        found = []
        for done, decision in enumerate(self.decisions):
            self.progress.step(done, len(paths), decision.path)
            others = tuple(p for p in paths if p != decision.path)
            found.append((decision, self._loss(others)))
        total = sum(_noise(db) for _, db in found) or 1.0
        sizes = {layer.path: layer.parameters for layer in self.layers}
        ranked = tuple(
            sorted(
                (
                    LayerNoise(
                        d.path, d.treatment.value, d.rule, db, _noise(db) / total, sizes[d.path]
                    )
                    for d, db in found
                ),
                key=lambda layer: (layer.sqnr_db, layer.path),
            )
        )
        keep, kept = self._propose(ranked, whole)
        recipe, dataset = self.subject.recipe, self.dataset
        return Sensitivity(
            model=self.subject.spec.name,
            precision=self.options.precision.value,
            samples=f"{len(dataset)} samples of {recipe.dataset or dataset.name}",
            whole_db=whole,
            layers=ranked,
            keep_float=keep,
            kept_db=kept,
        )

    def _propose(
        self, ranked: Sequence[LayerNoise], whole: float
    ) -> tuple[tuple[str, ...], float | None]:
        """Return the fewest of the worst layers that gain enough, measured, or nothing."""
        budget = SHARE * sum(layer.parameters for layer in ranked)
        chosen: list[str] = []
        removed = 0.0
        for layer in ranked:
            budget -= layer.parameters
            if budget < 0 or len(chosen) + 1 >= len(ranked):
                return (), None
            chosen.append(layer.path)
            removed += layer.share
            if removed >= 1 - 10 ** (-GAIN_DB / 10):
                kept = self._loss(tuple(chosen))
                return (tuple(chosen), kept) if kept - whole >= GAIN_DB / 2 else ((), None)
        return (), None

    def _float32(self) -> tuple[Any, Artifact]:
        import onnx

        from flowexport.targets.onnx.export import export
        from flowexport.targets.onnx.finish import finish
        from flowexport.targets.onnx.options import OnnxOptions

        settings = OnnxOptions.parse(self.options)
        model, _ = export(
            self.program,
            installed_ops(),
            opset=settings.opset,
            pinned=settings.form,
            precision=self.options.precision,
        )
        model = finish(model, self.program, "sensitivity")
        path = self.folder / "fp32.onnx"
        onnx.save(model, path)
        artifact = Artifact(
            TARGET, path, "", 0, Precision.FP32, self.program.model, "", "",
            self.program.inputs, self.program.outputs,
        )  # fmt: skip
        return model, artifact

    def _loss(self, keep: tuple[str, ...]) -> float:
        """Return the SQNR in dB with these layers kept in float."""
        import onnx

        from flowexport.targets.onnx.quantise import quantise

        copied = onnx.ModelProto()
        copied.CopyFrom(self.model)
        options = replace(self.options, keep_float=keep)
        model, _ = quantise(copied, self.program, options)
        path = self.folder / "variant.onnx"
        onnx.save(model, path)
        outputs = self._outputs(replace(self.artifact, path=path))
        signal = sum(float(np.square(v).sum()) for v in self.truth.values())
        noise = sum(float(np.square(outputs[n] - v).sum()) for n, v in self.truth.items())
        return math.inf if noise == 0 else 10 * math.log10(signal / noise)

    def _outputs(self, artifact: Artifact) -> Mapping[str, np.ndarray]:
        from flowexport.parity.batching import run_batched

        with TARGETS.get(TARGET).load(artifact) as session:
            found = run_batched(session, self.dataset.inputs)
        return {name: value.astype(np.float64) for name, value in found.items()}


def _some(dataset: Dataset, count: int) -> Dataset:
    chosen = spread(dataset.targets, count)
    inputs = {name: values[chosen] for name, values in dataset.inputs.items()}
    return replace(dataset, inputs=inputs, targets=dataset.targets[chosen], lengths=None)


def _noise(db: float) -> float:
    return 0.0 if math.isinf(db) else 10 ** (-db / 10)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else round(value, 2)
