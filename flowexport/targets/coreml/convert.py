"""From a lowered program to an ML Program package."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, InputError
from flowexport.core.types import Precision
from flowexport.lowering import LoweredProgram

_INPUT_DTYPES = ("float32", "float16", "int32")


@cache
def _register_operators() -> None:
    """Give coremltools the operators that it lacks or rounds.

    ``alias`` is missing (a tied weight or a view of a whole tensor makes one).
    ``reciprocal`` becomes ``inverse`` with ε = 1e-4, that is 1/(x + 1e-4).
    """
    from coremltools.converters.mil import Builder, register_torch_op

    def alias(context: Any, node: Any) -> None:
        context.add(context[node.inputs[0]], torch_name=node.name)

    def reciprocal(context: Any, node: Any) -> None:
        x = context[node.inputs[0]]
        context.add(Builder.real_div(x=np.float32(1), y=x, name=node.name))

    for translate in (alias, reciprocal):
        register_torch_op(override=True)(translate)


def require_dtypes(program: LoweredProgram) -> None:
    """Raise InputError for an input of a dtype that Core ML does not take."""
    for spec in program.inputs:
        if spec.dtype not in _INPUT_DTYPES:
            raise InputError(
                f"convert coreml {program.model}: {spec.name} has dtype {spec.dtype};"
                f" expected one of: {', '.join(_INPUT_DTYPES)}."
            )


def join_packages(packages: Mapping[str, Path], main: str, model: str, path: Path) -> None:
    """Save one package that holds each of these as a function; equal weights are stored once.

    Args:
        packages: by function name.
        main: the default function.
        model: the model's name, for messages.
        path: of the .mlpackage to write.

    Raises:
        ConversionError: coremltools refused to join them.
    """
    with contextlib.redirect_stdout(sys.stderr):
        import coremltools as ct

        joined = ct.utils.MultiFunctionDescriptor()
        for name, source in packages.items():
            joined.add_function(str(source), "main", name)
        joined.default_function_name = main
        try:
            ct.utils.save_multifunction(joined, str(path))
        except Exception as error:  # coremltools raises anything from AssertionError up
            raise ConversionError(
                f"convert coreml {model}: coremltools refused to join the functions"
                f" {', '.join(packages)}: {type(error).__name__}:"
                f" {(str(error).strip().splitlines() or [''])[0]}"
            ) from error


def to_package(program: LoweredProgram, precision: Precision, system: str, path: Path) -> None:
    """Convert a static program without attention nodes and save it.

    Args:
        program: float32 inside; inputs and outputs give the names and types.
        precision: what Core ML stores and computes in; the ends stay float32.
        system: minimum deployment target, ``iOS16`` and later.
        path: of the .mlpackage.

    Raises:
        ConversionError: coremltools refused the program.
    """
    with contextlib.redirect_stdout(sys.stderr):
        import coremltools as ct

        logging.getLogger("coremltools").setLevel(logging.ERROR)
        _register_operators()
        compute = {Precision.FP32: ct.precision.FLOAT32, Precision.FP16: ct.precision.FLOAT16}
        try:
            model = ct.convert(
                program.exported.run_decompositions({}),
                inputs=[
                    ct.TensorType(name=s.name, shape=s.shape, dtype=np.dtype(s.dtype).type)
                    for s in program.inputs
                ],
                outputs=[
                    ct.TensorType(name=s.name, dtype=np.dtype(s.dtype).type)
                    for s in program.outputs
                ],
                convert_to="mlprogram",
                compute_precision=compute[precision],
                minimum_deployment_target=ct.target[system],
                skip_model_load=True,
            )
            model.save(str(path))
        except Exception as error:  # coremltools raises anything from AssertionError up
            raise ConversionError(
                f"convert coreml {program.model}: coremltools refused the program:"
                f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            ) from error
