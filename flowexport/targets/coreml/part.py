"""One function of a package, from its program to a package of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowexport.core.types import Options, Precision
from flowexport.lowering import LoweredProgram, decompose, image_like
from flowexport.lowering.quantisation import Quantisation
from flowexport.ops.descriptor import Choice
from flowexport.ops.installed import installed_ops
from flowexport.targets.coreml.compress import compress
from flowexport.targets.coreml.convert import Written, to_package
from flowexport.targets.coreml.ends import ImageEnd, app_ends
from flowexport.targets.coreml.options import CoreMLOptions

FLOAT_PARTS = Precision.FP16
"""What a package computes in beside its quantised weights: Core ML widens these to half."""


@dataclass(frozen=True)
class Part:
    """One function of a package, saved on its own."""

    path: Path
    program: LoweredProgram
    choices: tuple[Choice, ...]
    image: ImageEnd | None
    classes: tuple[str, ...]
    written: Written
    quantised: Quantisation | None

    @classmethod
    def make(
        cls,
        program: LoweredProgram,
        options: Options,
        settings: CoreMLOptions,
        system: str,
        path: Path,
        function: str = "",
    ) -> Part:
        """Decompose, convert and save a static program.

        Args:
            function: its name beside the main one; that one's is empty.
        """
        ops = installed_ops()
        plain, choices = decompose(program, "coreml", ops, pinned=settings.form)
        if settings.layout == "ane":
            plain = replace(plain, exported=image_like(plain.exported))
        return cls.save(plain, choices, options, settings, system, path, function)

    @classmethod
    def save(
        cls,
        plain: LoweredProgram,
        choices: tuple[Choice, ...],
        options: Options,
        settings: CoreMLOptions,
        system: str,
        path: Path,
        function: str = "",
    ) -> Part:
        """Convert and save a program without attention nodes."""
        plain, image, classes = app_ends(plain, settings)
        kept: list[Quantisation] = []

        def compressed(model: Any) -> Any:
            result, quantised = compress(
                model, plain, options, settings.palette_group, image, function
            )
            kept.append(quantised)
            return result

        written = to_package(
            plain,
            computed(options),
            system,
            path,
            image=image,
            classes=classes,
            keep_fp32=settings.keep_fp32,
            sizes=settings.flexible,
            compress=compressed if options.precision.quantised else None,
        )
        return cls(path, plain, choices, image, classes, written, next(iter(kept), None))


def computed(options: Options) -> Precision:
    """Return what a package computes in, whatever its weights are stored in."""
    return FLOAT_PARTS if options.precision.quantised else options.precision
