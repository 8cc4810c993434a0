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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUFFER_NAME = "TFLITE_METADATA"
LABELS_FILE = "labels.txt"
HEADER_FILE = "flowexport.json"

_TENSOR_AXIS_LABELS = 2  # AssociatedFileType
_DESCRIPTIONS = 1


def metadata_buffer(
    model: str,
    description: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    labelled: str | None,
) -> bytes:
    """Return the ``TFLITE_METADATA`` flatbuffer.

    Args:
        model: the model's name.
        description: one line on the model.
        inputs, outputs: tensor names in the order of the subgraph's tensors.
        labelled: the output that ``labels.txt`` describes, or None.
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

    def tensor(name: str) -> int:
        fields = {0: text(name)}
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
    files = {HEADER_FILE: json.dumps(header, indent=1, sort_keys=True)}
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
