"""Elementwise operators: unary, binary, comparisons, select, cast, clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import Handler, require, torch_type


def _unary(compute: Callable[[Tensor], Tensor]) -> Handler:
    def handler(math: Arithmetic, *, x: Tensor) -> Tensor:
        return compute(x)

    return handler


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Handler:
    def handler(math: Arithmetic, *, x: Tensor, y: Tensor) -> Tensor:
        require(x.dtype == y.dtype, f"x is {x.dtype} and y is {y.dtype}; expected one type")
        return compute(x, y)

    return handler


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    require(x.is_floating_point(), "real_div of integers; expected floats")
    return x / y


def inverse(math: Arithmetic, *, x: Tensor, epsilon: Tensor) -> Tensor:
    # The interpreter refuses epsilon > 0 before it runs; this holds for any other caller.
    require(float(epsilon) == 0.0, f"epsilon is {float(epsilon):g}; expected 0")
    return 1.0 / x


def rsqrt(math: Arithmetic, *, x: Tensor, epsilon: Tensor) -> Tensor:
    return 1.0 / torch.sqrt(x + epsilon)


def log(math: Arithmetic, *, x: Tensor, epsilon: Tensor) -> Tensor:
    return torch.log(x + epsilon)


def clip(math: Arithmetic, *, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.clamp(x, alpha, beta)


def threshold(math: Arithmetic, *, x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha)


def cast(math: Arithmetic, *, x: Tensor, dtype: str) -> Tensor:
    if dtype == "bool":
        return x != 0
    wanted = torch_type(dtype)
    if x.is_floating_point() and not wanted.is_floating_point:
        require(bool(torch.isfinite(x).all()), f"a cast to {dtype} of a value that is not finite")
        limits = torch.iinfo(wanted)
        x = x.trunc()
        require(
            bool((x >= limits.min).all() and (x <= limits.max).all()),
            f"a cast to {dtype} of a value out of range",
        )
    return x.to(wanted)


def select(math: Arithmetic, *, cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "abs": _unary(torch.abs),
        "acos": _unary(torch.acos),
        "add": _binary(torch.add),
        "asin": _unary(torch.asin),
        "atan": _unary(torch.atan),
        "atanh": _unary(torch.atanh),
        "cast": cast,
        "ceil": _unary(torch.ceil),
        "clip": clip,
        "cos": _unary(torch.cos),
        "cosh": _unary(torch.cosh),
        "equal": _binary(torch.eq),
        "erf": _unary(torch.erf),
        "exp": _unary(torch.exp),
        "exp2": _unary(torch.exp2),
        "floor": _unary(torch.floor),
        "floor_div": _binary(torch.floor_divide),
        "greater": _binary(torch.gt),
        "greater_equal": _binary(torch.ge),
        "identity": _unary(lambda x: x),
        "inverse": inverse,
        "less": _binary(torch.lt),
        "less_equal": _binary(torch.le),
        "log": log,
        "logical_and": _binary(torch.logical_and),
        "logical_not": _unary(torch.logical_not),
        "logical_or": _binary(torch.logical_or),
        "logical_xor": _binary(torch.logical_xor),
        "maximum": _binary(torch.maximum),
        "minimum": _binary(torch.minimum),
        "mod": _binary(torch.remainder),
        "mul": _binary(torch.mul),
        "not_equal": _binary(torch.ne),
        "pow": _binary(torch.pow),
        "real_div": _binary(_real_div),
        "round": _unary(torch.round),
        "rsqrt": rsqrt,
        "select": select,
        "sign": _unary(torch.sign),
        "sin": _unary(torch.sin),
        "sinh": _unary(torch.sinh),
        "sqrt": _unary(torch.sqrt),
        "square": _unary(torch.square),
        "sub": _binary(torch.sub),
        "tan": _unary(torch.tan),
        "threshold": threshold,
    }
)
