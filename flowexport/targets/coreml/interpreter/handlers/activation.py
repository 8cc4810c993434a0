"""Activations and normalizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import Handler, axes_of, require


def _plain(compute: Callable[[Tensor], Tensor]) -> Handler:
    def handler(math: Arithmetic, *, x: Tensor) -> Tensor:
        return compute(x)

    return handler


def _with_alpha(compute: Callable[[Tensor, Tensor], Tensor]) -> Handler:
    def handler(math: Arithmetic, *, x: Tensor, alpha: Tensor) -> Tensor:
        return compute(x, alpha)

    return handler


def _with_alpha_beta(compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Handler:
    def handler(math: Arithmetic, *, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return compute(x, alpha, beta)

    return handler


def _per_channel(x: Tensor, vector: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def gelu(math: Arithmetic, *, x: Tensor, mode: str) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    require(mode in ("EXACT", "TANH_APPROXIMATION"), f"gelu mode is {mode}; expected a known one")
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def softmax(math: Arithmetic, *, x: Tensor, axis: Tensor) -> Tensor:
    if not math.narrow:
        return torch.softmax(x, int(axis))
    powers = math.stored(torch.exp(x - x.amax(int(axis), keepdim=True)))
    return powers / math.sum(powers, [int(axis)], True)


def _normalized(math: Arithmetic, x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    centered = math.stored(x - math.mean(x, axes, True))
    variance = math.mean(math.stored(centered * centered), axes, True)
    return centered / torch.sqrt(variance + epsilon)


def layer_norm(
    math: Arithmetic,
    *,
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor,
) -> Tensor:
    dims = axes_of(axes, x)
    eps = float(epsilon)
    if not math.narrow and dims == list(range(dims[0], x.dim())):
        return F.layer_norm(x, x.shape[dims[0] :], gamma, beta, eps)
    shape = [x.shape[d] if d in dims else 1 for d in range(x.dim())]
    arithmetic = math if math.narrow else Arithmetic(math.mode, half=False)
    result = _normalized(arithmetic, x, dims, eps)
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def batch_norm(
    math: Arithmetic,
    *,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, float(epsilon))


def instance_norm(
    math: Arithmetic,
    *,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor,
) -> Tensor:
    arithmetic = math if math.narrow else Arithmetic(math.mode, half=False)
    result = _normalized(arithmetic, x, list(range(2, x.dim())), float(epsilon))
    if gamma is not None:
        result = result * _per_channel(x, gamma)
    return result if beta is None else result + _per_channel(x, beta)


def prelu(math: Arithmetic, *, x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * _per_channel(x, alpha))


def softplus_parametric(math: Arithmetic, *, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _per_channel(x, alpha) * F.softplus(x * _per_channel(x, beta))


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "batch_norm": batch_norm,
        "clamped_relu": _with_alpha_beta(
            lambda x, a, b: torch.minimum(b, torch.where(x >= 0, x, a * x))
        ),
        "elu": _with_alpha(lambda x, a: torch.where(x >= 0, x, a * torch.expm1(x))),
        "gelu": gelu,
        "instance_norm": instance_norm,
        "layer_norm": layer_norm,
        "leaky_relu": _with_alpha(lambda x, a: torch.where(x >= 0, x, a * x)),
        "linear_activation": _with_alpha_beta(lambda x, a, b: a * x + b),
        "prelu": prelu,
        "relu": _plain(torch.relu),
        "relu6": _plain(F.relu6),
        "scaled_tanh": _with_alpha_beta(lambda x, a, b: a * torch.tanh(b * x)),
        "sigmoid": _plain(torch.sigmoid),
        "sigmoid_hard": _with_alpha_beta(lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0)),
        "silu": _plain(F.silu),
        "softmax": softmax,
        "softplus": _plain(F.softplus),
        "softplus_parametric": softplus_parametric,
        "softsign": _plain(F.softsign),
        "tanh": _plain(torch.tanh),
        "thresholded_relu": _with_alpha(lambda x, a: torch.where(x >= a, x, 0.0 * x)),
    }
)
