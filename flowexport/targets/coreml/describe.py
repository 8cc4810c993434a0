"""What a package says of itself: to people in Xcode, and to flowexport."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flowexport.core.errors import UnknownNameError
from flowexport.lowering import LoweredProgram
from flowexport.targets.coreml import package
from flowexport.targets.coreml.ends import LABEL, PROBABILITIES, ImageEnd
from flowexport.targets.coreml.options import Metadata


def describe(
    spec: Any,
    program: LoweredProgram,
    metadata: Metadata,
    image: ImageEnd | None,
    entries: Mapping[str, Any],
) -> None:
    """Write the author's texts, those of inputs and outputs, and flowexport's entries.

    Args:
        spec: of the package; changed.
        program: whose preprocessing and labels describe the ends nobody described.
        entries: flowexport's own, kept as JSON under ``flowexport.<key>``.

    Raises:
        UnknownNameError: a text is of an input or output that the package has not.
    """
    told = spec.description.metadata
    told.shortDescription = metadata.description or f"{program.model}, made by flowexport"
    told.author, told.license = metadata.author, metadata.license
    told.versionString = metadata.version or program.recipe_sha256[:12]
    for key, value in metadata.user.items():
        told.userDefined[key] = value
    for key, value in entries.items():
        told.userDefined[package.PREFIX + key] = json.dumps(value, sort_keys=True)
    where = f"convert coreml {program.model}: metadata"
    for kind, texts in (("input", metadata.inputs), ("output", metadata.outputs)):
        features = _features(spec, kind)
        names = {f.name for f in features}
        for name in texts:
            if name not in names:
                raise UnknownNameError(kind, name, names, where=where)
        for feature in features:
            feature.shortDescription = texts.get(feature.name) or _text(
                feature.name, program, image
            )


def _features(spec: Any, kind: str) -> list[Any]:
    found = list(getattr(spec.description, kind))
    for function in spec.description.functions:
        found += getattr(function, kind)
    return found


def _text(name: str, program: LoweredProgram, image: ImageEnd | None) -> str:
    """Say what an input or output holds, as far as the model does."""
    labels = ", ".join(program.labels[:10]) + (", …" if len(program.labels) > 10 else "")
    if name == LABEL:
        return "the class of the largest probability"
    if name == PROBABILITIES:
        return "probability by class"
    if image is not None and name == image.name:
        return f"8-bit {image.pixels.color} image; the preprocessing is inside"
    own = program.preprocessing.get(name)
    if isinstance(own, str):
        return own
    scores = program.outputs[0].name
    if name == scores and labels:
        return f"one score a class, before any softmax: {labels}"
    if [s.name for s in program.inputs] == [name] and "mean" in program.preprocessing:
        known = ("layout", "range", "mean", "std", "size", "resize")
        facts = {k: program.preprocessing[k] for k in known if k in program.preprocessing}
        return "; ".join(f"{k}: {v}" for k, v in facts.items())
    return ""
