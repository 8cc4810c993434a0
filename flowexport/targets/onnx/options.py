"""What a recipe may say under ``targets.onnx``."""

from __future__ import annotations

from dataclasses import dataclass

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, Precision

FLOATS = (Precision.FP32, Precision.FP16)
PRECISIONS = (
    *FLOATS,
    Precision.INT8_DYNAMIC,
    Precision.INT8_STATIC,
    Precision.INT8_WEIGHTS,
)
OPSETS = (20, 21, 22, 23)
KEYS = ("form", "opset", "symmetric")


@dataclass(frozen=True)
class OnnxOptions:
    """Settings of one conversion.

    Attributes:
        opset: version of the standard operators.
        form: attention form for every node, or None for the measured choice.
        symmetric: int8-static: signed activations with the zero point 0 and weights in
            their whole range, as TensorRT wants them; x86 without VNNI saturates on these.
    """

    opset: int = OPSETS[0]
    form: str | None = None
    symmetric: bool = False

    @classmethod
    def parse(cls, options: Options, target: str = "onnx") -> OnnxOptions:
        """Read a recipe's options.

        Raises:
            InputError, UnknownNameError: naming the supported choices.
        """
        if options.precision not in PRECISIONS:
            raise UnknownNameError(
                "precision", str(options.precision), [p.value for p in PRECISIONS], where=target
            )
        for key in options.extra:
            if key not in KEYS:
                raise UnknownNameError("option", key, KEYS, where=target)
        opset = options.extra.get("opset", OPSETS[0])
        if isinstance(opset, bool) or opset not in OPSETS:
            raise InputError(f"{target}: opset is {opset!r}; expected one of {OPSETS}.")
        form = options.extra.get("form")
        if form is not None:
            from flowexport.ops.installed import installed_ops

            forms = {name for op in installed_ops() for name in op.forms}
            if not isinstance(form, str) or form not in forms:
                raise UnknownNameError("form", str(form), forms, where=target)
        symmetric = options.extra.get("symmetric", False)
        if not isinstance(symmetric, bool):
            raise InputError(f"{target}: symmetric is {symmetric!r}; expected true or false.")
        return cls(int(opset), form, symmetric)
