"""A package's ends as an app meets them: an image in, a label and probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flowexport.core.errors import InputError, VerificationError
from flowexport.core.pixels import Pixels
from flowexport.core.types import Artifact, Precision, TensorSpec
from flowexport.lowering import LoweredProgram, add_probabilities, divide_input
from flowexport.targets.coreml.options import CoreMLOptions

LABEL, PROBABILITIES = "classLabel", "classLabel_probs"
"""The classifier's outputs, by the names that Xcode shows."""
SOFTMAX = "probabilities"

PROBABILITY_ERROR = {Precision.FP32: 1e-5}
HALF_ERROR = 5e-3
"""float32: some 1e-7 a term. float16: exp and the quotient are rounded to 11 bits, 4.9e-4 each,
and the exponent, up to 16, to 2^-7 at worst of a term that is then as small as exp(-16)."""


@dataclass(frozen=True)
class ImageEnd:
    """An input that the app gives as an 8-bit image; recorded in the artifact's details.

    Attributes:
        name: of the input.
        height, width: in pixels.
        pixels: how they become the values that the torch module takes.
        folded: module path of the layer that divides by std, ``""`` where one number
            does for all channels, None where a multiplication does it.
    """

    name: str
    height: int
    width: int
    pixels: Pixels
    folded: str | None

    @property
    def scale(self) -> float:
        std = self.pixels.std
        return self.pixels.step / (std[0] if self.one_std else 1.0)

    @property
    def bias(self) -> list[float]:
        """What is added to ``scale * pixel``, a channel."""
        std = self.pixels.std[0] if self.one_std else 1.0
        return [(self.pixels.low - m) / std for m in self.pixels.mean]

    @property
    def one_std(self) -> bool:
        """Whether one number divides all channels, which the scale can do."""
        return len(set(self.pixels.std)) == 1

    def ct_type(self) -> Any:
        """Return the ``ct.ImageType``."""
        import coremltools as ct

        grey = self.pixels.color == "grayscale"
        return ct.ImageType(
            name=self.name,
            shape=(1, len(self.pixels.mean), self.height, self.width),
            scale=self.scale,
            bias=self.bias[0] if grey else self.bias,
            color_layout=ct.colorlayout.GRAYSCALE if grey else ct.colorlayout.RGB,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "input": self.name,
            "height": self.height,
            "width": self.width,
            "color": self.pixels.color,
            "scale": self.scale,
            "bias": self.bias,
            "std_folded_into": self.folded,
            **self.pixels.to_json(),
        }


def app_ends(
    program: LoweredProgram, settings: CoreMLOptions
) -> tuple[LoweredProgram, ImageEnd | None, tuple[str, ...]]:
    """Add to a decomposed static program what the options ask of its ends.

    Returns:
        The program, its image input or None, and the classes or nothing.

    Raises:
        InputError: the program has no labels, another number of scores, or no image.
    """
    where = f"convert coreml {program.model}"
    image: ImageEnd | None = None
    classes: tuple[str, ...] = ()
    if settings.image:
        program, image = _image(program, where)
    if settings.classifier:
        check_classifier(program.labels, where)
        scores = program.outputs[0]
        if scores.shape != (1, len(program.labels)):
            raise InputError(
                f"{where}: classifier is asked for, but {scores.name} has shape"
                f" {'x'.join(map(str, scores.shape))}; expected 1x{len(program.labels)},"
                " one score a label."
            )
        program, classes = add_probabilities(program, scores.name, SOFTMAX), program.labels
    return program, image, classes


def check_classifier(labels: Sequence[str], where: str) -> None:
    """Raise InputError unless there are labels, all different."""
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if not labels or twice:
        found = f"the label {twice[0]!r} twice" if twice else "no labels"
        raise InputError(
            f"{where}: classifier is asked for, but the model has {found};"
            " expected one name a class.",
            fix="labels: [...] in the recipe, or `classifier: false`",
        )


def image_input(
    inputs: Sequence[TensorSpec], preprocessing: Mapping[str, Any], where: str
) -> dict[str, Pixels]:
    """Return the one input, which must be an image, with how its pixels become values.

    Raises:
        InputError: there are several inputs, or this one is no image.
    """
    if len(inputs) != 1:
        names = ", ".join(s.name for s in inputs)
        raise InputError(f"{where}: image is asked for, but the inputs are {names}; expected one.")
    return {inputs[0].name: Pixels.of(preprocessing, inputs[0], where)}


def _image(program: LoweredProgram, where: str) -> tuple[LoweredProgram, ImageEnd]:
    ((name, pixels),) = image_input(program.inputs, program.preprocessing, where).items()
    height, width = (int(d) for d in program.inputs[0].shape[2:])
    end = ImageEnd(name, height, width, pixels, "")
    if end.one_std:
        return program, end
    program, place = divide_input(program, name, pixels.std)
    return program, replace(end, folded=place)


class AppEnds:
    """Between a bundle's tensors and a package's ends, for the sessions.

    Args:
        artifact: its ``details`` say what the package has.
        native: whether Core ML itself takes the image, which must then be whole pixels.
    """

    def __init__(self, artifact: Artifact, *, native: bool) -> None:
        self._where = f"run coreml {artifact.model}"
        self._native = native
        self._image = artifact.details.get("image")
        self._classes: list[str] = list(artifact.details.get("classes") or ())
        self._outputs = artifact.outputs
        self._scores = artifact.outputs[0].name
        self._limit = PROBABILITY_ERROR.get(artifact.precision, HALF_ERROR)

    def feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return what the package takes: a PIL image natively, unrounded pixels interpreted."""
        found: dict[str, Any] = {n: self._narrow(n, v) for n, v in feeds.items()}
        if self._image is None:
            return found
        name = self._image["input"]
        low, high = self._image["range"]
        pixels = Pixels(low, high, tuple(self._image["mean"]), tuple(self._image["std"]))
        if not self._native:
            found[name] = pixels.unrounded(feeds[name]).astype(np.float32)
            return found
        from PIL import Image

        planes = pixels.whole(feeds[name], self._where)[0]
        found[name] = Image.fromarray(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0))
        return found

    def _narrow(self, name: str, value: np.ndarray) -> np.ndarray:
        """Return an int64 feed as the int32 that a package takes; others as they are."""
        if value.dtype != np.int64:
            return value
        limits = np.iinfo(np.int32)
        if value.size and not limits.min <= value.min() <= value.max() <= limits.max:
            raise InputError(
                f"{self._where}: {name} has values from {value.min()} to {value.max()};"
                " expected int32 ones: Core ML knows no int64."
            )
        return value.astype(np.int32)

    def results(self, results: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the tensors, after holding label and probabilities against the scores.

        Raises:
            VerificationError: the classes are others, a probability is not the softmax
                of its score, or the label is not that of the largest.
        """
        if not self._classes:
            wide = {s.name for s in self._outputs if s.dtype == "int64"}
            arrays = {n: np.asarray(v) for n, v in results.items()}
            return {n: v.astype(np.int64) if n in wide else v for n, v in arrays.items()}
        told, label = results[PROBABILITIES], results[LABEL]
        if set(told) != set(self._classes):
            raise VerificationError(
                f"{self._where}: the package's classes are {sorted(told)};"
                f" expected {sorted(self._classes)}."
            )
        found = np.asarray([told[c] for c in self._classes], np.float64)
        scores = np.asarray(results[self._scores], np.float64).reshape(-1)
        powers = np.exp(scores - scores.max())
        error = float(np.abs(found - powers / powers.sum()).max())
        if not error <= self._limit:
            raise VerificationError(
                f"{self._where}: a probability is {error:.3g} from the softmax of"
                f" {self._scores}; expected at most {self._limit:g}."
            )
        if label not in told or told[label] != max(told.values()):
            raise VerificationError(
                f"{self._where}: {LABEL} is {label!r}; expected that of the largest probability,"
                f" {self._classes[int(found.argmax())]!r}."
            )
        ends = (LABEL, PROBABILITIES)
        return {n: np.asarray(v) for n, v in results.items() if n not in ends}
