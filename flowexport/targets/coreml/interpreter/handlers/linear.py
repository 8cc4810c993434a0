"""Linear algebra: matrix products, convolutions, pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowexport.ops.accumulate import MATMUL_CHUNK
from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import Handler, ints, require


def linear(math: Arithmetic, *, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not math.narrow:
        return F.linear(x, weight, bias)
    result = math.matmul(x, weight.T)
    return result if bias is None else math.stored(result) + bias


def matmul(
    math: Arithmetic, *, x: Tensor, y: Tensor, transpose_x: Tensor, transpose_y: Tensor
) -> Tensor:
    left = x.transpose(-1, -2) if bool(transpose_x) else x
    right = y.transpose(-1, -2) if bool(transpose_y) else y
    return math.matmul(left, right)


def einsum(math: Arithmetic, *, values: tuple[Tensor, ...], equation: str) -> Tensor:
    if not math.narrow:
        return torch.einsum(equation.replace(" ", ""), *values)
    inputs, output = equation.replace(" ", "").split("->")
    first, second = inputs.split(",")
    summed = [c for c in first if c in second and c not in output]
    require(
        len(summed) == 1 and set(first) | set(second) == {*output, *summed},
        f"einsum {equation} in acc16; expected one contracted index",
    )
    order = output + summed[0]
    x, y = _aligned(values[0], first, order), _aligned(values[1], second, order)
    return math.sum(x * y, [-1])


def _aligned(x: Tensor, have: str, want: str) -> Tensor:
    order = [have.index(c) for c in want if c in have]
    x = x.permute(order)
    for position, letter in enumerate(want):
        if letter not in have:
            x = x.unsqueeze(position)
    return x


def _same(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Total padding that gives ``ceil(size / stride)`` results."""
    reach = (kernel - 1) * dilation + 1
    return max((-(-size // stride) - 1) * stride + reach - size, 0)


def _padding(
    x: Tensor, kernel: list[int], stride: list[int], dilation: list[int], kind: str, pad: Any
) -> list[int]:
    """Return (before, after) of every spatial dimension, first dimension first."""
    if kind == "valid":
        return [0] * (2 * len(kernel))
    if kind == "custom":
        return ints(pad)
    require(kind in ("same", "same_lower"), f"pad_type is {kind}; expected a known one")
    amounts = []
    for size, *rest in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        total = _same(size, *rest)
        small, large = total // 2, total - total // 2
        amounts += [small, large] if kind == "same" else [large, small]
    return amounts


def _pad(x: Tensor, amounts: list[int], value: float = 0.0) -> Tensor:
    if not any(amounts):
        return x
    # torch counts from the last dimension.
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)][::-1]
    return F.pad(x, [n for pair in pairs for n in pair], value=value)


def conv(
    math: Arithmetic,
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor,
    pad_type: str,
    pad: Tensor | None = None,
    dilations: Tensor,
    groups: Tensor,
) -> Tensor:
    rank = weight.dim() - 2
    stride, dilation = ints(strides), ints(dilations)
    amounts = _padding(x, list(weight.shape[2:]), stride, dilation, pad_type, pad)
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    if amounts[::2] == amounts[1::2]:
        inside: list[int] = amounts[::2]
    else:
        x, inside = _pad(x, amounts), [0] * rank
    if not math.narrow or weight[0].numel() <= MATMUL_CHUNK:
        return convolve(x, weight, bias, stride, inside, dilation, int(groups))
    # Input channels are split so that one part sums at most MATMUL_CHUNK products (one
    # channel's window at least), and the parts are added in float16.
    depth, window = weight.shape[1], weight[0, 0].numel()
    step = max(1, MATMUL_CHUNK // window)
    grouped = x.reshape(x.shape[0], int(groups), depth, *x.shape[2:])
    total: Tensor | None = None
    for start in range(0, depth, step):
        part = grouped[:, :, start : start + step].flatten(1, 2)
        piece = convolve(
            part, weight[:, start : start + step], None, stride, inside, dilation, int(groups)
        ).half()
        total = piece if total is None else total + piece
    assert total is not None
    result = total.float()
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def conv_transpose(
    math: Arithmetic,
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str,
    strides: Tensor,
    dilations: Tensor,
    groups: Tensor,
) -> Tensor:
    require(not math.narrow, "conv_transpose in acc16; expected another mode")
    require(pad_type in ("valid", "custom"), f"pad_type is {pad_type}; expected valid or custom")
    rank = weight.dim() - 2
    convolve: Callable[..., Tensor] = (
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    )[rank - 1]
    whole = convolve(x, weight, bias, ints(strides), groups=int(groups), dilation=ints(dilations))
    amounts = [0] * (2 * rank) if pad is None or pad_type == "valid" else ints(pad)
    sizes = None if output_shape is None else ints(output_shape)[2:]
    for axis in range(rank):
        before, after = amounts[2 * axis : 2 * axis + 2]
        size = whole.shape[2 + axis] - before - after
        if sizes is not None:
            size = sizes[axis]
            missing = before + size - whole.shape[2 + axis]
            if missing > 0:  # what no tap reaches is the bias
                shape = list(whole.shape)
                shape[2 + axis] = missing
                edge = torch.zeros(shape, dtype=whole.dtype)
                if bias is not None:
                    edge = edge + bias.reshape(-1, *[1] * rank)
                whole = torch.cat([whole, edge], 2 + axis)
        whole = whole.narrow(2 + axis, before, size)
    return whole


def max_pool(
    math: Arithmetic,
    *,
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor | None = None,
    ceil_mode: Tensor,
) -> Tensor:
    require(not bool(ceil_mode), "ceil_mode; expected floor")
    kernel, stride = ints(kernel_sizes), ints(strides)
    amounts = _padding(x, kernel, stride, [1] * len(kernel), pad_type, pad)
    pool: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(_pad(x, amounts, -float("inf")), kernel, stride)


def avg_pool(
    math: Arithmetic,
    *,
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor,
    ceil_mode: Tensor,
) -> Tensor:
    require(not bool(ceil_mode), "ceil_mode; expected floor")
    kernel, stride = ints(kernel_sizes), ints(strides)
    amounts = _padding(x, kernel, stride, [1] * len(kernel), pad_type, pad)
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    result = pool(_pad(x, amounts), kernel, stride)
    if bool(exclude_padding_from_average) and any(amounts):
        result = result / pool(_pad(torch.ones_like(x), amounts), kernel, stride)
    return result


def scaled_dot_product_attention(
    math: Arithmetic, *, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    require(not math.narrow, "scaled_dot_product_attention in acc16; expected another mode")
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "avg_pool": avg_pool,
        "conv": conv,
        "conv_transpose": conv_transpose,
        "einsum": einsum,
        "linear": linear,
        "matmul": matmul,
        "max_pool": max_pool,
        "scaled_dot_product_attention": scaled_dot_product_attention,
    }
)
