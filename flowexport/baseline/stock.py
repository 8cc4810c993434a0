"""The exporters that come with each runtime, as their documentation calls them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flowexport.core.errors import ConversionError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Precision, TensorSpec


def export_onnx(
    exported: Any, inputs: Sequence[TensorSpec], outputs: Sequence[str], path: Path
) -> None:
    """``torch.onnx.export(dynamo=True)`` with the default opset and optimisation."""
    import torch

    program = torch.onnx.export(
        exported,
        dynamo=True,
        input_names=[s.name for s in inputs],
        output_names=list(outputs),
        verbose=False,
    )
    assert program is not None
    program.save(path)


def export_tflite(
    exported: Any, inputs: Sequence[TensorSpec], outputs: Sequence[str], path: Path
) -> None:
    """``litert_torch.convert`` without settings; the signature takes our names."""
    import torch
    from torch import nn

    class Named(nn.Module):
        """Keyword inputs and a dict of results: where litert-torch takes the names from."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.training = False  # eval() would recurse into the exported module, which refuses it

        def forward(self, **tensors: Any) -> dict[str, Any]:
            results = self.module(*tensors.values())
            if isinstance(results, torch.Tensor):
                results = (results,)
            return dict(zip(outputs, results, strict=True))

    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    with contextlib.redirect_stdout(sys.stderr):
        import litert_torch

        example = {
            s.name: torch.zeros([int(d) for d in s.shape], dtype=getattr(torch, s.dtype))
            for s in inputs
        }
        wide = any(s.dtype in ("int64", "float64") for s in inputs)
        model = litert_torch.convert(
            Named(exported.module(check_guards=False)), sample_kwargs=example, enable_x64=wide
        )
        path.write_bytes(bytes(model.model_content()))


STOCK: Mapping[str, Callable[[Any, Sequence[TensorSpec], Sequence[str], Path], None]] = (
    MappingProxyType({"onnx": export_onnx, "tflite": export_tflite})
)
"""Targets that have a stock exporter and a runtime here to measure its file on."""


def export_stock(
    target: str,
    program: Path,
    model: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
) -> Artifact:
    """Export a saved ``.pt2`` program without attention nodes by a target's stock exporter.

    Args:
        inputs, outputs: static specs of the program.
        path: file to write.

    Raises:
        ConversionError: the exporter refused the program.
    """
    import torch

    try:
        STOCK[target](torch.export.load(program), inputs, [s.name for s in outputs], path)
    except Exception as error:  # exporters have no common class
        line = (str(error).strip().splitlines() or [""])[0]
        raise ConversionError(
            f"bench {target} {model}: the stock exporter refused the published form:"
            f" {type(error).__name__}: {line}"
        ) from error
    return Artifact(
        target=target,
        path=path,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        precision=Precision.FP32,
        model=model,
        recipe_sha256="",
        form="published",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )
