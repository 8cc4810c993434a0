"""Read weights without running anything that a file brings along."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowexport.core.errors import CheckpointError

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
SHOWN = 5


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors onto the CPU.

    Takes ``.safetensors``, and ``.pth``/``.pt`` as ``torch.save`` writes them,
    the state dict bare or under ``model``, ``state_dict``, ... as training
    scripts wrap it, with or without ``module.`` before each name. Nothing in
    the file is executed: pickled objects other than tensors, numbers, strings,
    containers and argparse's settings are refused.

    Args:
        path: the file.

    Returns:
        Tensors by state-dict name, in the file's own dtypes.

    Raises:
        CheckpointError: there is no such file, it is truncated or of another
            format, it holds pickled code, or it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        actual = "a folder" if path.is_dir() else "missing"
        raise CheckpointError(f"load weights: {path} is {actual}; expected a checkpoint file.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _strip_prefixes(_unwrap(content, path))


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Copy a checkpoint into a module, every parameter and buffer of it.

    Args:
        module: takes the values in its own dtypes.
        path: as :func:`load_checkpoint`.

    Raises:
        CheckpointError: as :func:`load_checkpoint`; or a name is missing or
            unexpected, a shape differs, or a value is not finite.
    """
    weights = load_checkpoint(path)
    wanted = module.state_dict()
    problems = [
        _listed("missing", [k for k in wanted if k not in weights]),
        _listed("unexpected", [k for k in weights if k not in wanted]),
        _listed(
            "of another shape",
            [
                f"{k} has {_size(weights[k])}; expected {_size(wanted[k])}"
                for k in wanted
                if k in weights and weights[k].shape != wanted[k].shape
            ],
        ),
    ]
    found = [p for p in problems if p]
    if found:
        raise CheckpointError(
            f"load weights {type(module).__name__}: {path} belongs to another model: "
            + "; ".join(found)
            + ".",
            fix="give the checkpoint of this model, or the configuration of this checkpoint",
        )
    broken = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"load weights {type(module).__name__}: {path} has values that are not finite in "
            f"{', '.join(broken[:SHOWN])}; expected finite weights."
        )
    module.load_state_dict(weights)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"load weights: {path} is truncated or no safetensors file ({_reason(error)});"
            " expected a complete file."
        ) from error


def _read_torch(path: Path) -> Any:
    # Training scripts (DeiT's and those after it) save their argparse settings beside the
    # weights; a Namespace is a bag of values and runs nothing.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an odd pickle protocol; refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any byte of the file may be wrong; torch raises many kinds
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"load weights: {path} pickles Python objects besides tensors, which loading would"
                f" execute; expected tensors only ({_reason(error)}).",
                fix="save it again with torch.save(model.state_dict(), path) where you trust it",
            ) from error
        raise CheckpointError(
            f"load weights: {path} is truncated or no PyTorch checkpoint ({_reason(error)});"
            " expected a complete .pth, .pt or .safetensors file."
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        if content and all(isinstance(v, Tensor) for v in content.values()):
            return {str(k): v for k, v in content.items()}
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    what = (
        f"the keys {', '.join(map(str, list(content)[:SHOWN]))}"
        if isinstance(content, Mapping) and content
        else f"{'an empty ' if isinstance(content, Mapping) else 'a '}{type(content).__name__}"
    )
    raise CheckpointError(
        f"load weights: {path} has {what}; expected a state dict of tensors,"
        f" bare or under one of: {', '.join(WRAPPERS)}."
    )


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in weights)), None):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _listed(kind: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {kind} ({', '.join(items[:SHOWN])}{more})"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    chosen = (telling or lines or ["no data"])[0]
    return f"{type(error).__name__}: {chosen[:200]}"
