"""A saved .mlpackage read back from disk: features, declared types, and the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.targets.coreml.package import WEIGHTS_FOLDER, read_spec


@dataclass(frozen=True)
class Declared:
    """A tensor type as the saved program declares it; None is a size known at run time."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = "x".join("?" if d is None else str(d) for d in self.shape) or "scalar"
        return f"{self.dtype} {sizes}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is one that this type allows."""
        if shape == self.shape:
            return True
        return len(shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True)
class Feature:
    """One input, output or state as the package's description names it.

    Attributes:
        kind: ``tensor``, ``image``, ``label`` or ``dictionary``.
        shape: the default shape; an image's is (1, channels, height, width).
        ranges: inclusive bounds a dimension, the upper one None without limit, or None.
        enumerated: the only shapes allowed, or None.
        color: ``RGB``, ``BGR``, ``GRAYSCALE`` ... of an image, else None.
    """

    name: str
    kind: str
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int | None], ...] | None = None
    enumerated: tuple[tuple[int, ...], ...] | None = None
    color: str | None = None

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether the description allows this shape."""
        if self.enumerated is not None:
            return shape in self.enumerated
        if self.ranges is not None:
            return len(shape) == len(self.ranges) and all(
                low <= size and (high is None or size <= high)
                for size, (low, high) in zip(shape, self.ranges, strict=True)
            )
        return shape == self.shape

    def expected(self) -> str:
        """Return the constraint in words, for messages."""
        if self.enumerated is not None:
            return "one of " + ", ".join("x".join(map(str, s)) for s in self.enumerated)
        if self.ranges is not None:
            return "x".join(str(lo) if lo == hi else f"{lo}..{hi or ''}" for lo, hi in self.ranges)
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class Package:
    """One function of a saved package.

    Attributes:
        function: the pymil function that ``milproto.load`` rebuilt.
        declared: the type of every tensor, by its name in the file.
        states: type of every state input.
    """

    path: Path
    function_name: str
    function: Any
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    declared: Mapping[str, Declared]
    states: Mapping[str, Declared]
    specification_version: int


def load_package(path: Path, function: str | None = None) -> Package:
    """Read one function of an .mlpackage, program and weights, from disk.

    Args:
        path: the .mlpackage folder.
        function: which function of a multifunction package; None takes the default one.

    Raises:
        InputError: no such package, a damaged one, or no ML Program.
        UnknownNameError: no function of that name.
    """
    from coremltools.converters.mil.frontend.milproto.load import load

    where = f"load coreml {path.name}"
    spec = read_spec(path)
    functions = spec.mlProgram.functions
    description = spec.description
    name = function or description.defaultFunctionName or "main"
    if name not in functions:
        raise UnknownNameError("function", name, functions, where=where)
    for other in [n for n in functions if n != name]:
        del functions[other]
    features: Any = description
    for candidate in description.functions:
        if candidate.name == name:
            features = candidate
    proto_function = functions[name]
    try:
        program = load(
            spec,
            specification_version=spec.specificationVersion,
            file_weights_dir=str(path / WEIGHTS_FOLDER),
        )
    except Exception as error:
        raise InputError(
            f"{where}: the program or its weights cannot be read back: {_line(error)}."
        ) from error
    arguments = {i.name: i.type for i in proto_function.inputs}
    return Package(
        path=path,
        function_name=name,
        function=program.functions[name],
        inputs=tuple(_feature(f) for f in features.input),
        outputs=tuple(_feature(f) for f in features.output),
        declared=_declared_types(proto_function),
        states={
            n: _declared(t.stateType.wrappedType)
            for n, t in arguments.items()
            if t.WhichOneof("type") == "stateType"
        },
        specification_version=int(spec.specificationVersion),
    )


def _declared_types(function: Any) -> dict[str, Declared]:
    types = {}
    block = function.block_specializations[function.opset]
    named = list(function.inputs) + [o for op in block.operations for o in op.outputs]
    for value in named:
        if value.type.WhichOneof("type") == "tensorType":
            types[value.name] = _declared(value.type)
    return types


def _declared(value_type: Any) -> Declared:
    from coremltools import proto

    tensor = value_type.tensorType
    dtype = proto.MIL_pb2.DataType.Name(tensor.dataType).lower()
    shape = tuple(
        int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None
        for d in tensor.dimensions
    )
    return Declared(dtype, shape)


def _feature(feature: Any) -> Feature:
    from coremltools import proto

    kind = feature.type.WhichOneof("Type")
    if kind == "multiArrayType":
        array = feature.type.multiArrayType
        dtype = type(array).DESCRIPTOR.enum_types_by_name["ArrayDataType"]
        flexibility = array.WhichOneof("ShapeFlexibility")
        return Feature(
            feature.name,
            "tensor",
            dtype.values_by_number[array.dataType].name.lower().replace("double", "float64"),
            tuple(int(d) for d in array.shape),
            tuple(
                (int(r.lowerBound), None if r.upperBound < 0 else int(r.upperBound))
                for r in array.shapeRange.sizeRanges
            )
            if flexibility == "shapeRange"
            else None,
            tuple(tuple(int(d) for d in s.shape) for s in array.enumeratedShapes.shapes)
            if flexibility == "enumeratedShapes"
            else None,
        )
    if kind == "imageType":
        image = feature.type.imageType
        color = proto.FeatureTypes_pb2.ImageFeatureType.ColorSpace.Name(image.colorSpace)
        channels = 1 if color.startswith("GRAYSCALE") else 3
        shape = (1, channels, int(image.height), int(image.width))
        flexible = image.WhichOneof("SizeFlexibility")
        if flexible == "enumeratedSizes":
            sizes = image.enumeratedSizes.sizes
            shapes = tuple((1, channels, int(s.height), int(s.width)) for s in sizes)
            return Feature(feature.name, "image", "float32", shape, None, shapes, color)
        if flexible == "imageSizeRange":
            bounds = image.imageSizeRange
            ranges = [(1, 1), (channels, channels)] + [
                (int(r.lowerBound), None if r.upperBound < 0 else int(r.upperBound))
                for r in (bounds.heightRange, bounds.widthRange)
            ]
            return Feature(feature.name, "image", "float32", shape, tuple(ranges), None, color)
        return Feature(feature.name, "image", "float32", shape, None, None, color)
    if kind == "dictionaryType":
        return Feature(feature.name, "dictionary", "float64")
    if kind in ("stringType", "int64Type"):
        return Feature(feature.name, "label", kind.removesuffix("Type"))
    raise InputError(f"load coreml: feature {feature.name} has type {kind}; expected an array,"
                     " an image, a label or a dictionary.")  # fmt: skip


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
