"""The Core ML target's own settings (``Options.extra``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.core.types import Options, Precision

PRECISIONS = (Precision.FP32, Precision.FP16)
DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18")
COMPUTE_UNITS = {
    "all": "ALL",
    "cpu_only": "CPU_ONLY",
    "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_and_ne": "CPU_AND_NE",
}


@dataclass(frozen=True)
class CoreMLOptions:
    """Settings of one conversion and of the session that runs its result.

    Attributes:
        form: the attention form to use at every site; None lets lowering choose.
        deployment_target: the oldest system that the package must run on.
        compute_units: what Core ML may run it on.
    """

    form: str | None = None
    deployment_target: str = "iOS16"
    compute_units: str = "all"

    @classmethod
    def parse(cls, options: Options) -> CoreMLOptions:
        """Return the settings in ``options``.

        Raises:
            InputError: the precision or a value is not supported.
            UnknownNameError: a key, deployment target or compute unit is not known.
        """
        where = "convert coreml"
        if options.precision not in PRECISIONS:
            raise InputError(
                f"{where}: precision is {str(options.precision)!r};"
                f" expected one of: {', '.join(PRECISIONS)}."
            )
        known = [f.name for f in fields(cls)]
        extra: dict[str, Any] = dict(options.extra)
        for key, value in extra.items():
            if key not in known:
                raise UnknownNameError("option", key, known, where=where)
            if not isinstance(value, str) and not (key == "form" and value is None):
                raise InputError(f"{where}: {key} is {value!r}; expected a name.")
        settings = cls(**extra)
        if settings.deployment_target not in DEPLOYMENT_TARGETS:
            raise UnknownNameError(
                "deployment target", settings.deployment_target, DEPLOYMENT_TARGETS, where=where
            )
        if settings.compute_units not in COMPUTE_UNITS:
            raise UnknownNameError(
                "compute unit", settings.compute_units, COMPUTE_UNITS, where=where
            )
        return settings
