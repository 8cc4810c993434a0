"""One small MIL program an operator, with what torch computes for it.

``Case.make`` builds the operator from pymil variables (placeholders when it is
saved and run, constants when coremltools' own value inference is asked).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types


@dataclass(frozen=True, eq=False)
class Case:
    """``op`` applied by ``make`` to ``feeds`` equals ``want`` of the same tensors.

    ``distrust`` says why coremltools' value inference is no reference here.
    """

    op: str
    feeds: tuple[np.ndarray, ...]
    make: Callable[..., Any]
    want: Callable[..., Any]
    note: str = ""
    distrust: str = ""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.note}" if self.note else self.op


_RNG = np.random.default_rng(7)


def _f(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return _RNG.uniform(low, high, shape).astype(np.float32)


def _i(*shape: int, low: int = 0, high: int = 4) -> np.ndarray:
    return _RNG.integers(low, high, shape).astype(np.int32)


A, B, POSITIVE, UNIT = _f(2, 3, 4), _f(2, 3, 4), _f(2, 3, 4, low=0.1), _f(2, 3, 4, high=1, low=-1)
ROW, IMAGE, WIDE = _f(3, 1), _f(2, 4, 7, 6), _f(2, 70)
INTS, J, BITS = _i(2, 3, low=-5, high=9), _i(2, 3, low=1, high=4), _i(2, 3, high=2)
ABOVE_ONE = POSITIVE + 1


def _unary(op: str, want: Callable[..., Any], x: np.ndarray = A) -> Case:
    return Case(op, (x,), lambda a: getattr(mb, op)(x=a), want)


def _binary(
    op: str, want: Callable[..., Any], x: np.ndarray = A, y: np.ndarray = B, note: str = ""
) -> Case:
    return Case(op, (x, y), lambda a, b: getattr(mb, op)(x=a, y=b), want, note)


def _alpha(op: str, alpha: float, want: Callable[..., Any], beta: float | None = None) -> Case:
    more = {} if beta is None else {"beta": beta}
    return Case(op, (A,), lambda a: getattr(mb, op)(x=a, alpha=alpha, **more), want)


def _bool(op: str, want: Callable[..., Any]) -> Case:
    def make(a: Any, b: Any) -> Any:
        return getattr(mb, op)(x=mb.cast(x=a, dtype="bool"), y=mb.cast(x=b, dtype="bool"))

    return Case(op, (BITS, BITS[::-1].copy()), make, lambda a, b: want(a != 0, b != 0))


def _reduce(op: str, want: Callable[..., Any], x: np.ndarray = A) -> list[Case]:
    return [
        Case(
            op,
            (x,),
            lambda a: getattr(mb, op)(x=a, axes=[-1, 1], keep_dims=True),
            lambda a: want(a, (1, 2), True),
            "kept",
        ),
        Case(
            op,
            (x,),
            lambda a: getattr(mb, op)(x=a, axes=[0], keep_dims=False),
            lambda a: want(a, (0,), False),
            "dropped",
        ),
    ]


def _prod(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


ELEMENTWISE = [
    _unary("abs", torch.abs),
    _unary("acos", torch.acos, UNIT),
    _unary("asin", torch.asin, UNIT),
    _unary("atan", torch.atan),
    _unary("atanh", torch.atanh, UNIT * 0.9),
    _unary("ceil", torch.ceil),
    _unary("cos", torch.cos),
    _unary("cosh", torch.cosh),
    _unary("erf", torch.erf),
    _unary("exp", torch.exp),
    _unary("exp2", torch.exp2),
    _unary("floor", torch.floor),
    _unary("identity", lambda a: a),
    _unary("round", torch.round, np.array([[0.5, 1.5, -2.5, 2.4]], np.float32)),
    _unary("sign", torch.sign),
    _unary("sin", torch.sin),
    _unary("sinh", torch.sinh),
    _unary("sqrt", torch.sqrt, POSITIVE),
    _unary("square", torch.square),
    _unary("tan", torch.tan, UNIT),
    _binary("add", torch.add),
    _binary("add", torch.add, INTS, J, "integers"),
    _binary("add", torch.add, A, ROW, "broadcast"),
    _binary("equal", torch.eq, INTS, J),
    _binary("floor_div", torch.floor_divide),
    _binary("floor_div", torch.floor_divide, INTS, J, "integers"),
    _binary("greater", torch.gt),
    _binary("greater_equal", torch.ge, INTS, J),
    _binary("less", torch.lt),
    _binary("less_equal", torch.le, INTS, J),
    _binary("maximum", torch.maximum),
    _binary("minimum", torch.minimum),
    _binary("mod", torch.remainder, INTS, J, "integers"),
    _binary("mul", torch.mul),
    _binary("not_equal", torch.ne, INTS, J),
    _binary("pow", torch.pow, POSITIVE),
    _binary("real_div", torch.div, A, POSITIVE),
    _binary("sub", torch.sub),
    _bool("logical_and", torch.logical_and),
    _bool("logical_or", torch.logical_or),
    _bool("logical_xor", torch.logical_xor),
    Case("logical_not", (BITS,), lambda a: mb.logical_not(x=mb.cast(x=a, dtype="bool")),
         lambda a: a == 0),
    Case("inverse", (POSITIVE,), lambda a: mb.inverse(x=a, epsilon=0.0), torch.reciprocal),
    Case("rsqrt", (POSITIVE,), lambda a: mb.rsqrt(x=a, epsilon=0.25),
         lambda a: torch.rsqrt(a + 0.25)),
    Case("log", (POSITIVE,), lambda a: mb.log(x=a, epsilon=0.5), lambda a: torch.log(a + 0.5)),
    Case("clip", (A,), lambda a: mb.clip(x=a, alpha=-0.5, beta=0.75),
         lambda a: a.clamp(-0.5, 0.75)),
    Case("threshold", (A,), lambda a: mb.threshold(x=a, alpha=0.3),
         lambda a: a.clamp(min=0.3)),
    Case("cast", (A * 3,), lambda a: mb.cast(x=a, dtype="int32"), lambda a: a.int(), "to int"),
    Case("cast", (INTS,), lambda a: mb.cast(x=a, dtype="fp32"), lambda a: a.float(), "to float"),
    Case("cast", (INTS,), lambda a: mb.cast(x=a, dtype="bool"), lambda a: a != 0, "to bool"),
    Case("select", (BITS, INTS, J),
         lambda c, a, b: mb.select(cond=mb.cast(x=c, dtype="bool"), a=a, b=b),
         lambda c, a, b: torch.where(c != 0, a, b)),
]  # fmt: skip

REDUCTIONS = [
    *_reduce("reduce_l1_norm", lambda a, d, k: a.abs().sum(d, keepdim=k)),
    *_reduce("reduce_l2_norm", lambda a, d, k: a.norm(dim=d, keepdim=k)),
    *_reduce("reduce_log_sum", lambda a, d, k: a.sum(d, keepdim=k).log(), ABOVE_ONE),
    *_reduce("reduce_log_sum_exp", lambda a, d, k: a.logsumexp(d, keepdim=k)),
    *_reduce("reduce_max", lambda a, d, k: a.amax(d, keepdim=k)),
    *_reduce("reduce_mean", lambda a, d, k: a.mean(d, keepdim=k)),
    *_reduce("reduce_min", lambda a, d, k: a.amin(d, keepdim=k)),
    *_reduce("reduce_prod", _prod),
    *_reduce("reduce_sum", lambda a, d, k: a.sum(d, keepdim=k)),
    *_reduce("reduce_sum_square", lambda a, d, k: (a * a).sum(d, keepdim=k)),
    Case("reduce_sum", (INTS,), lambda a: mb.reduce_sum(x=a, axes=[1], keep_dims=False),
         lambda a: a.sum(1, dtype=torch.int32), "integers"),
    Case("reduce_argmax", (A,), lambda a: mb.reduce_argmax(x=a, axis=1, keep_dims=True),
         lambda a: a.argmax(1, keepdim=True).int()),
    Case("reduce_argmin", (A,), lambda a: mb.reduce_argmin(x=a, axis=-1, keep_dims=False),
         lambda a: a.argmin(-1).int()),
    Case("cumsum", (A,), lambda a: mb.cumsum(x=a, axis=1), lambda a: a.cumsum(1)),
    Case("cumsum", (A,), lambda a: mb.cumsum(x=a, axis=2, reverse=True),
         lambda a: a.flip(2).cumsum(2).flip(2), "reverse"),
    Case("cumsum", (A,), lambda a: mb.cumsum(x=a, axis=1, exclusive=True),
         lambda a: a.cumsum(1) - a, "exclusive"),
    Case("topk", (A,), lambda a: mb.topk(x=a, k=2, axis=2),
         lambda a: (a.topk(2, 2).values, a.topk(2, 2).indices.int())),
    Case("argsort", (A,), lambda a: mb.argsort(x=a, axis=1, ascending=True),
         lambda a: a.argsort(1).int()),
]  # fmt: skip

KERNEL, DEPTHWISE, WEIGHT = _f(8, 4, 3, 3), _f(4, 1, 3, 3), _f(5, 70)
GROUPED, LINE, LINE_KERNEL = _f(6, 2, 2, 2), _f(2, 4, 9), _f(3, 4, 2)
BIAS5, BIAS8 = _f(5), _f(8)


def _t(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


LINEAR = [
    Case("linear", (WIDE,), lambda a: mb.linear(x=a, weight=WEIGHT, bias=BIAS5),
         lambda a: F.linear(a, _t(WEIGHT), _t(BIAS5))),
    Case("matmul", (A, _f(2, 4, 5)), lambda a, b: mb.matmul(x=a, y=b), torch.matmul),
    Case("matmul", (A, B), lambda a, b: mb.matmul(x=a, y=b, transpose_x=True),
         lambda a, b: a.mT @ b, "transpose x"),
    Case("matmul", (A, B), lambda a, b: mb.matmul(x=a, y=b, transpose_y=True),
         lambda a, b: a @ b.mT, "transpose y"),
    Case("einsum", (_f(2, 3, 4, 5), _f(2, 5, 4, 6)),
         lambda a, b: mb.einsum(values=(a, b), equation="bchw,bwhu->bchu"),
         lambda a, b: torch.einsum("bchw,bwhu->bchu", a, b)),
    Case("conv", (IMAGE,), lambda a: mb.conv(x=a, weight=KERNEL, bias=BIAS8, pad_type="custom",
                                             pad=[1, 1, 1, 1], strides=[2, 2]),
         lambda a: F.conv2d(a, _t(KERNEL), _t(BIAS8), 2, 1), "2d strided"),
    Case("conv", (IMAGE,), lambda a: mb.conv(x=a, weight=DEPTHWISE, pad_type="same", groups=4),
         lambda a: F.conv2d(a, _t(DEPTHWISE), padding=1, groups=4), "depthwise"),
    Case("conv", (IMAGE,), lambda a: mb.conv(x=a, weight=GROUPED, pad_type="custom",
                                             pad=[1, 0, 2, 0], groups=2),
         lambda a: F.conv2d(F.pad(a, (2, 0, 1, 0)), _t(GROUPED), groups=2), "uneven padding"),
    Case("conv", (LINE,), lambda a: mb.conv(x=a, weight=LINE_KERNEL, pad_type="valid",
                                            dilations=[2]),
         lambda a: F.conv1d(a, _t(LINE_KERNEL), dilation=2), "1d dilated"),
    Case("max_pool", (IMAGE,), lambda a: mb.max_pool(x=a, kernel_sizes=[3, 3], strides=[2, 2],
                                                     pad_type="custom", pad=[1, 1, 1, 1]),
         lambda a: F.max_pool2d(a, 3, 2, 1)),
    Case("avg_pool", (IMAGE,), lambda a: mb.avg_pool(
            x=a, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1],
            exclude_padding_from_average=True),
         lambda a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False), "padding excluded"),
    Case("avg_pool", (IMAGE,), lambda a: mb.avg_pool(x=a, kernel_sizes=[2, 2], strides=[2, 2],
                                                     pad_type="valid"),
         lambda a: F.avg_pool2d(a, 2, 2)),
    Case("scaled_dot_product_attention", (_f(2, 3, 4, 8), _f(2, 3, 5, 8), _f(2, 3, 5, 8)),
         lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
         F.scaled_dot_product_attention),
]  # fmt: skip

G4, B4, M4, V4 = _f(4), _f(4), _f(4), _f(4, low=0.2)

ACTIVATIONS = [
    _unary("relu", torch.relu),
    _unary("relu6", F.relu6, A * 5),
    _unary("sigmoid", torch.sigmoid),
    _unary("silu", F.silu),
    _unary("softplus", F.softplus),
    _unary("softsign", F.softsign),
    _unary("tanh", torch.tanh),
    _alpha("elu", 0.7, lambda a: F.elu(a, 0.7)),
    _alpha("leaky_relu", 0.1, lambda a: F.leaky_relu(a, 0.1)),
    _alpha("thresholded_relu", 0.4, lambda a: torch.where(a >= 0.4, a, 0.0)),
    _alpha("clamped_relu", 0.2, lambda a: F.leaky_relu(a, 0.2).clamp(max=1.0), 1.0),
    _alpha("linear_activation", 0.2, lambda a: 0.2 * a + 1.5, 1.5),
    _alpha("scaled_tanh", 0.8, lambda a: 0.8 * torch.tanh(1.5 * a), 1.5),
    _alpha("sigmoid_hard", 0.2, lambda a: (0.2 * a + 0.5).clamp(0, 1), 0.5),
    Case("gelu", (A,), lambda a: mb.gelu(x=a, mode="EXACT"), F.gelu, "exact"),
    Case("gelu", (A,), lambda a: mb.gelu(x=a, mode="TANH_APPROXIMATION"),
         lambda a: F.gelu(a, approximate="tanh"), "tanh"),
    Case("gelu", (A,), lambda a: mb.gelu(x=a, mode="SIGMOID_APPROXIMATION"),
         lambda a: a * torch.sigmoid(1.702 * a), "sigmoid"),
    Case("softmax", (A,), lambda a: mb.softmax(x=a, axis=1), lambda a: a.softmax(1)),
    Case("prelu", (IMAGE,), lambda a: mb.prelu(x=a, alpha=G4), lambda a: F.prelu(a, _t(G4))),
    Case("softplus_parametric", (IMAGE,),
         lambda a: mb.softplus_parametric(x=a, alpha=G4, beta=V4),
         lambda a: _t(G4)[:, None, None] * F.softplus(a * _t(V4)[:, None, None])),
    Case("layer_norm", (A,), lambda a: mb.layer_norm(x=a, axes=[-1], gamma=G4, beta=B4,
                                                     epsilon=1e-5),
         lambda a: F.layer_norm(a, (4,), _t(G4), _t(B4), 1e-5)),
    Case("layer_norm", (IMAGE,), lambda a: mb.layer_norm(x=a, axes=[1], gamma=G4, beta=B4,
                                                         epsilon=1e-5),
         lambda a: F.layer_norm(a.movedim(1, -1), (4,), _t(G4), _t(B4), 1e-5).movedim(-1, 1),
         "channels"),
    Case("batch_norm", (IMAGE,), lambda a: mb.batch_norm(x=a, mean=M4, variance=V4, gamma=G4,
                                                         beta=B4, epsilon=1e-5),
         lambda a: F.batch_norm(a, _t(M4), _t(V4), _t(G4), _t(B4))),
    Case("instance_norm", (IMAGE,), lambda a: mb.instance_norm(x=a, gamma=G4, beta=B4,
                                                               epsilon=1e-5),
         lambda a: F.instance_norm(a, weight=_t(G4), bias=_t(B4))),
]  # fmt: skip

PLACES, ALONG = _i(2, 5, high=3), _i(2, 3, 2, high=4)
ONCE = np.array([[[0, 2], [3, 1], [1, 0]]] * 2, np.int32)
SPOTS = np.array([[0, 2], [1, 0]], np.int32)


def _slice_update(a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, 1:3, ::2] = u
    return a


SHAPES = [
    Case("band_part", (_f(4, 5),), lambda a: mb.band_part(x=a, lower=1, upper=2),
         lambda a: a.triu(-1).tril(2)),
    Case("concat", (A, B), lambda a, b: mb.concat(values=(a, b), axis=1),
         lambda a, b: torch.cat((a, b), 1)),
    Case("expand_dims", (A,), lambda a: mb.expand_dims(x=a, axes=[0, -1]),
         lambda a: a[None, ..., None]),
    Case("fill", (np.array([2, 3], np.int32),), lambda s: mb.fill(shape=s, value=1.5),
         lambda s: torch.full((2, 3), 1.5)),
    Case("fill_like", (A,), lambda a: mb.fill_like(ref_tensor=a, value=2.5),
         lambda a: torch.full_like(a, 2.5)),
    Case("flatten2d", (A,), lambda a: mb.flatten2d(x=a, axis=2), lambda a: a.reshape(6, 4)),
    Case("gather", (A, PLACES), lambda a, i: mb.gather(x=a, indices=i, axis=1),
         lambda a, i: a[:, i.long()]),
    Case("gather", (A, PLACES), lambda a, i: mb.gather(x=a, indices=i, axis=1, batch_dims=1),
         lambda a, i: torch.stack([x[p.long()] for x, p in zip(a, i, strict=True)]), "batched"),
    Case("gather_along_axis", (A, ALONG),
         lambda a, i: mb.gather_along_axis(x=a, indices=i, axis=2),
         lambda a, i: a.gather(2, i.long())),
    Case("gather_nd", (A, SPOTS), lambda a, i: mb.gather_nd(x=a, indices=i),
         lambda a, i: a[i[:, 0].long(), i[:, 1].long()]),
    Case("non_zero", (BITS,), lambda a: mb.non_zero(x=a), lambda a: a.nonzero().int()),
    Case("one_hot", (PLACES,), lambda i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=-1),
         lambda i: F.one_hot(i.long(), 4).int()),
    Case("pad", (A,), lambda a: mb.pad(x=a, pad=[1, 0, 2, 3], mode="constant", constant_val=1.0),
         lambda a: F.pad(a, (2, 3, 1, 0), value=1.0)),
    Case("pad", (IMAGE,), lambda a: mb.pad(x=a, pad=[1, 2, 3, 0], mode="reflect"),
         lambda a: F.pad(a, (3, 0, 1, 2), mode="reflect"), "reflect"),
    Case("pad", (IMAGE,), lambda a: mb.pad(x=a, pad=[1, 2, 3, 0], mode="replicate"),
         lambda a: F.pad(a, (3, 0, 1, 2), mode="replicate"), "replicate"),
    Case("pixel_shuffle", (IMAGE,), lambda a: mb.pixel_shuffle(x=a, upscale_factor=2),
         lambda a: F.pixel_shuffle(a, 2)),
    Case("pixel_unshuffle", (_f(2, 3, 4, 6),),
         lambda a: mb.pixel_unshuffle(x=a, downscale_factor=np.uint32(2)),
         lambda a: F.pixel_unshuffle(a, 2)),
    Case("range_1d", (np.array([7], np.int32),),
         lambda e: mb.range_1d(end=mb.squeeze(x=e, axes=[0]), start=1, step=2),
         lambda e: torch.arange(1, int(e), 2, dtype=torch.int32)),
    Case("reshape", (A,), lambda a: mb.reshape(x=a, shape=[0, -1, 2]),
         lambda a: a.reshape(2, -1, 2)),
    Case("reverse", (A,), lambda a: mb.reverse(x=a, axes=[0, 2]), lambda a: a.flip(0, 2)),
    Case("scatter_along_axis", (A, ONCE, _f(2, 3, 2)),
         lambda a, i, u: mb.scatter_along_axis(
             data=a, indices=i, updates=u, axis=2, mode="update"),
         lambda a, i, u: a.scatter(2, i.long(), u)),
    Case("scatter_along_axis", (A, ALONG, _f(2, 3, 2)),
         lambda a, i, u: mb.scatter_along_axis(data=a, indices=i, updates=u, axis=2, mode="add"),
         lambda a, i, u: a.scatter_add(2, i.long(), u), "add",
         distrust="coremltools 9.0 infers an update whatever the mode"),
    Case("scatter_nd", (A, SPOTS, _f(2, 4)),
         lambda a, i, u: mb.scatter_nd(data=a, indices=i, updates=u, mode="update"),
         lambda a, i, u: a.index_put((i[:, 0].long(), i[:, 1].long()), u)),
    Case("shape", (A,), lambda a: mb.shape(x=a),
         lambda a: torch.tensor([2, 3, 4], dtype=torch.int32)),
    Case("slice_by_index", (A,), lambda a: mb.slice_by_index(
            x=a, begin=[0, 1, -3], end=[0, 0, 4], stride=[1, 1, 2],
            end_mask=[True, True, False], begin_mask=[True, False, False]),
         lambda a: a[:, 1:, 1:4:2]),
    Case("slice_by_index", (A,), lambda a: mb.slice_by_index(
            x=a, begin=[1, 0, 3], end=[0, 0, 0], stride=[1, 1, -1],
            end_mask=[False, True, True], squeeze_mask=[True, False, False]),
         lambda a: a[1].flip(1), "backwards"),
    Case("slice_by_size", (A,), lambda a: mb.slice_by_size(x=a, begin=[0, 1, 0], size=[2, 2, -1]),
         lambda a: a[:, 1:3]),
    Case("slice_update", (A, _f(2, 2, 2)), lambda a, u: mb.slice_update(
            x=a, update=u, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]), _slice_update),
    Case("split", (A,), lambda a: mb.split(x=a, split_sizes=[1, 3], axis=2),
         lambda a: a.split([1, 3], 2), "sizes"),
    Case("split", (A,), lambda a: mb.split(x=a, num_splits=2, axis=2),
         lambda a: a.split(2, 2), "number"),
    Case("squeeze", (_f(1, 3, 1),), lambda a: mb.squeeze(x=a, axes=[0, -1]),
         lambda a: a[0, :, 0]),
    Case("stack", (A, B), lambda a, b: mb.stack(values=(a, b), axis=-1),
         lambda a, b: torch.stack((a, b), -1)),
    Case("tile", (A,), lambda a: mb.tile(x=a, reps=[1, 2, 3]), lambda a: a.repeat(1, 2, 3)),
    Case("transpose", (A,), lambda a: mb.transpose(x=a, perm=[2, 0, 1]),
         lambda a: a.permute(2, 0, 1)),
]  # fmt: skip

SCALES = np.array([0.02, 0.05, 0.01], np.float32)
ZEROS = np.array([3, -2, 0], np.int8)


def _quantized(a: torch.Tensor) -> torch.Tensor:
    steps = (a / _t(SCALES)[:, None]).round() + _t(ZEROS).float()[:, None]
    return steps.clamp(-128, 127)


def _quantize(a: Any) -> Any:
    return mb.quantize(input=a, scale=SCALES, zero_point=ZEROS, axis=1, output_dtype="int8")


MODEL = [
    Case("quantize", (A,), _quantize, lambda a: _quantized(a).int()),
    Case("dequantize", (A,), lambda a: mb.dequantize(input=_quantize(a), scale=SCALES,
                                                     zero_point=ZEROS, axis=1),
         lambda a: (_quantized(a) - _t(ZEROS).float()[:, None]) * _t(SCALES)[:, None]),
]  # fmt: skip

CASES = [*ELEMENTWISE, *REDUCTIONS, *LINEAR, *ACTIVATIONS, *SHAPES, *MODEL]
MIL_TYPES = {"float32": types.fp32, "int32": types.int32}
