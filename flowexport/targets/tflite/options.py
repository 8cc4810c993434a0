"""The TFLite target's own settings (``Options.extra``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, Precision
from flowexport.targets.tflite.compat import RUNTIMES

PRECISIONS = (
    Precision.FP32,
    Precision.FP16,
    Precision.INT8_DYNAMIC,
    Precision.INT8_STATIC,
    Precision.INT8_WEIGHTS,
)
LAYOUTS = ("nchw", "nhwc")
INPUT_DTYPES = ("float32", "uint8")


@dataclass(frozen=True)
class TFLiteOptions:
    """Settings of one conversion.

    Attributes:
        form: the attention form to use at every site; None lets lowering choose.
        layout: order of an image input's dimensions in the file; the model's own is nchw.
        input_dtype: of an image input in the file; uint8 takes pixels, with the
            preprocessing inside the graph.
        compat: an older runtime that the file has to run on, or None.
    """

    form: str | None = None
    layout: str = "nchw"
    input_dtype: str = "float32"
    compat: str | None = None

    @property
    def image(self) -> bool:
        """Whether the file's image input is not the model's own."""
        return (self.layout, self.input_dtype) != (LAYOUTS[0], INPUT_DTYPES[0])

    @property
    def per_channel(self) -> bool:
        """Whether int8 weights may have one scale a channel."""
        return self.compat is None

    @classmethod
    def parse(cls, options: Options) -> TFLiteOptions:
        """Return the settings in ``options``.

        Raises:
            InputError: the precision or a value is not supported.
            UnknownNameError: a key is not one of these settings.
        """
        if options.precision not in PRECISIONS:
            raise InputError(
                f"convert tflite: precision is {str(options.precision)!r};"
                f" expected one of: {', '.join(PRECISIONS)}."
            )
        known = [f.name for f in fields(cls)]
        extra: dict[str, Any] = dict(options.extra)
        for key in extra:
            if key not in known:
                raise UnknownNameError("option", key, known, where="convert tflite")
        form = extra.get("form")
        if form is not None and not isinstance(form, str):
            raise InputError(f"convert tflite: form is {form!r}; expected the name of a form.")
        choices = {"layout": LAYOUTS, "input_dtype": INPUT_DTYPES, "compat": RUNTIMES}
        for key, valid in choices.items():
            value = extra.get(key)
            if value is not None and value not in valid:
                raise UnknownNameError(key, str(value), valid, where="convert tflite")
        return cls(**{k: v for k, v in extra.items() if v is not None})
