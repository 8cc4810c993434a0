"""From a lowered program to the bytes of a .tflite model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flowexport.core.errors import ConversionError
from flowexport.core.types import Precision
from flowexport.lowering import LoweredProgram
from flowexport.targets.tflite.ends import ImageEnd


class _Named(nn.Module):
    """A module of keyword inputs and a dict of results: litert-torch takes the names from them."""

    def __init__(self, module: nn.Module, outputs: list[str], image: ImageEnd | None) -> None:
        super().__init__()
        self.module = module
        self.image = image
        self.outputs = outputs
        self.training = False  # eval() would recurse into the exported module, which refuses it

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.image is not None:
            inputs = {n: self.image.inside(x) for n, x in inputs.items()}
        results = self.module(*inputs.values())
        if isinstance(results, torch.Tensor):
            results = (results,)
        return dict(zip(self.outputs, results, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's progress off stdout, which belongs to the caller."""
    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    with contextlib.redirect_stdout(sys.stderr):
        yield


def to_flatbuffer(programs: Mapping[str, LoweredProgram], image: ImageEnd | None = None) -> bytes:
    """Convert static programs without attention nodes.

    Args:
        programs: by signature name, the main one first; several share equal weights.
        image: what the file takes in place of the programs' one input, or None.

    Raises:
        ConversionError: litert-torch refused the program.
    """
    program = next(iter(programs.values()))
    ends = [s for p in programs.values() for s in (*p.inputs, *p.outputs)]
    wide = any(s.dtype in ("int64", "float64") for s in ends)
    with _quiet():
        import litert_torch

        try:
            converter: Any = litert_torch
            for name, function in programs.items():
                module = function.exported.module(check_guards=False)
                names = (s.name for s in function.inputs)
                converter = converter.signature(
                    name,
                    _Named(module, [s.name for s in function.outputs], image),
                    sample_kwargs=dict(zip(names, _example(function, image), strict=True)),
                )
            # Without x64, 64-bit inputs become 32-bit ones.
            return bytes(converter.convert(enable_x64=wide).model_content())
        except Exception as error:  # MLIR errors have no common class
            raise ConversionError(
                f"convert tflite {program.model}: litert-torch refused the program:"
                f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            ) from error


def _example(program: LoweredProgram, image: ImageEnd | None) -> tuple[torch.Tensor, ...]:
    if image is None:
        return program.example()
    dtype = getattr(torch, image.spec.dtype)
    return (torch.zeros([int(d) for d in image.spec.shape], dtype=dtype),)


def store_weights_in_half(content: bytes, model: str) -> Any:
    """Return the model with fp16 constants behind DEQUANTIZE, inputs and outputs as they were.

    Raises:
        ConversionError: the quantizer refused the model.
    """
    with _quiet():
        from ai_edge_quantizer import quantizer
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.qtyping import TFLOperationName

        try:
            half = quantizer.Quantizer(content)
            half.add_weight_only_config(
                ".*",
                TFLOperationName.ALL_SUPPORTED,
                num_bits=16,
                algorithm_key=AlgorithmName.FLOAT_CASTING,
            )
            return half.quantize().quantized_model
        except Exception as error:  # the quantizer raises anything from KeyError up
            raise ConversionError(
                f"convert tflite {model}: ai-edge-quantizer cannot store the weights as"
                f" {Precision.FP16}: {(str(error).strip().splitlines() or [''])[0]}",
                fix="--precision fp32",
            ) from error
