"""What a .tflite file says of itself: TFLite Metadata and the files packed behind it.

The standard layout of TFLite model metadata (tflite-support,
``metadata_schema.fbs`` 1.1.0): a buffer ``TFLITE_METADATA`` describes the
tensors and names the associated files, which follow the flatbuffer as a zip.
So ``unzip model.tflite labels.txt`` works, and so does Android's
``MetadataExtractor``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowexport.core.errors import InputError
from flowexport.core.pixels import Pixels
from flowexport.core.types import TensorSpec
from flowexport.targets.tflite.ends import ImageEnd

BUFFER_NAME = "TFLITE_METADATA"
LABELS_FILE = "labels.txt"
HEADER_FILE = "flowexport.json"

_TENSOR_AXIS_LABELS = 2  # AssociatedFileType
_DESCRIPTIONS = 1
_IMAGE_PROPERTIES = 2  # ContentProperties
_NORMALIZATION = 1  # ProcessUnitOptions
_COLOR_SPACES = {"RGB": 1, "grayscale": 2}


@dataclass(frozen=True)
class ImageFacts:
    """What the standard tools read of an image input; values are a channel each.

    Attributes:
        mean, std: make the tensor's values of 8-bit pixels, (pixel - mean) / std.
        low, high: the tensor's values for the pixels 0 and 255.
    """

    name: str
    width: int
    height: int
    color: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def image_facts(
    inputs: Sequence[TensorSpec], preprocessing: Mapping[str, Any], end: ImageEnd | None
) -> ImageFacts | None:
    """Return the facts of the one image input, or None where there is no such input.

    Args:
        end: what the file takes in place of it; its pixels need no preprocessing.
    """
    try:
        (spec,) = inputs
        pixels = Pixels.of(preprocessing, spec, "describe")
    except (ValueError, InputError):
        return None
    count = len(pixels.mean)
    height, width = (int(d) for d in spec.shape[2:])
    if end is not None and end.pixels is not None:
        mean, std, low, high = (0.0,) * count, (1.0,) * count, (0.0,) * count, (255.0,) * count
    else:
        mean = tuple((m - pixels.low) / pixels.step for m in pixels.mean)
        std = tuple(s / pixels.step for s in pixels.std)
        low = tuple(-m / s for m, s in zip(mean, std, strict=True))
        high = tuple((255 - m) / s for m, s in zip(mean, std, strict=True))
    return ImageFacts(spec.name, width, height, pixels.color, mean, std, low, high)


def metadata_buffer(
    model: str,
    description: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    labelled: str | None,
    image: ImageFacts | None = None,
) -> bytes:
    """Return the ``TFLITE_METADATA`` flatbuffer.

    Args:
        model: the model's name.
        description: one line on the model.
        inputs, outputs: tensor names in the order of the subgraph's tensors.
        labelled: the output that ``labels.txt`` describes, or None.
        image: what an image input holds, or None.
    """
    import flatbuffers

    builder = flatbuffers.Builder(1024)

    def table(fields: dict[int, int], size: int, types: dict[int, int] | None = None) -> int:
        builder.StartObject(size)
        for slot, offset in fields.items():
            builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        for slot, value in (types or {}).items():
            builder.PrependInt8Slot(slot, value, 0)
        return int(builder.EndObject())

    def vector(offsets: Sequence[int]) -> int:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    def text(value: str) -> int:
        return int(builder.CreateString(value))

    def file(name: str, about: str, kind: int) -> int:
        return table({0: text(name), 1: text(about)}, 4, {2: kind})

    def floats(values: Sequence[float]) -> int:
        builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            builder.PrependFloat32(value)
        return int(builder.EndVector())

    def content(facts: ImageFacts) -> int:
        builder.StartObject(2)  # ImageSize
        builder.PrependUint32Slot(0, facts.width, 0)
        builder.PrependUint32Slot(1, facts.height, 0)
        size = int(builder.EndObject())
        colours = table({1: size}, 2, {0: _COLOR_SPACES[facts.color]})
        return table({1: colours}, 3, {0: _IMAGE_PROPERTIES})

    def tensor(name: str) -> int:
        fields = {0: text(name)}
        if image is not None and name == image.name:
            fields[3] = content(image)
            # What a reader does to 8-bit pixels: (pixel - mean) / std.
            options = table({0: floats(image.mean), 1: floats(image.std)}, 2)
            fields[4] = vector([table({1: options}, 2, {0: _NORMALIZATION})])
            fields[5] = table({0: floats(image.high), 1: floats(image.low)}, 2)  # Stats
        if name == labelled:
            fields[6] = vector([file(LABELS_FILE, "class names", _TENSOR_AXIS_LABELS)])
        return table(fields, 7)

    ins = vector([tensor(n) for n in inputs])
    outs = vector([tensor(n) for n in outputs])
    graph = table({2: ins, 3: outs}, 7)
    header = file(HEADER_FILE, "preprocessing, versions, recipe", _DESCRIPTIONS)
    root = table(
        {
            0: text(model),
            1: text(description),
            3: vector([graph]),
            6: vector([header]),
            7: text("1.0.0"),
        },
        8,
    )
    builder.Finish(root, file_identifier=b"M001")
    return bytes(builder.Output())


def append_files(path: Path, header: dict[str, Any], labels: Sequence[str]) -> None:
    """Append ``flowexport.json`` and ``labels.txt`` as a zip without timestamps."""
    files = {HEADER_FILE: json.dumps(header, sort_keys=True, separators=(",", ":"))}
    if labels:
        files[LABELS_FILE] = "".join(f"{label}\n" for label in labels)
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def read_files(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the header and the labels of a file; empty where it has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            header = json.loads(archive.read(HEADER_FILE)) if HEADER_FILE in names else {}
            labels = archive.read(LABELS_FILE).decode().splitlines() if LABELS_FILE in names else []
    except (zipfile.BadZipFile, OSError, ValueError):
        return {}, []
    return header, labels
