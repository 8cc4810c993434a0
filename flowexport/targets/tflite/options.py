"""The TFLite target's own settings (``Options.extra``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, Precision

PRECISIONS = (Precision.FP32, Precision.FP16)


@dataclass(frozen=True)
class TFLiteOptions:
    """Settings of one conversion.

    Attributes:
        form: the attention form to use at every site; None lets lowering choose.
    """

    form: str | None = None

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
        return cls(form=form)
