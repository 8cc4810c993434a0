"""Operators that move values: reshapes, slices, gathers, concatenations, generators."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic
from flowexport.targets.coreml.interpreter.handlers._values import (
    Handler,
    axes_of,
    ints,
    require,
    torch_type,
)


def reshape(math: Arithmetic, *, x: Tensor, shape: Tensor) -> Tensor:
    sizes = ints(shape)
    if len(sizes) == x.dim():
        sizes = [have if want == 0 else want for want, have in zip(sizes, x.shape, strict=True)]
    return x.reshape(sizes)


def flatten2d(math: Arithmetic, *, x: Tensor, axis: Tensor) -> Tensor:
    split = int(axis) % (x.dim() + 1) if int(axis) < 0 else int(axis)
    return x.reshape(int(torch.tensor(x.shape[:split]).prod()), -1)


def transpose(math: Arithmetic, *, x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def expand_dims(math: Arithmetic, *, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(math: Arithmetic, *, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x))


def concat(
    math: Arithmetic, *, values: tuple[Tensor, ...], axis: Tensor, interleave: Tensor
) -> Tensor:
    require(not bool(interleave), "concat with interleave; expected none")
    # MIL takes scalars as vectors of one.
    return torch.cat([v.reshape(1) if v.dim() == 0 else v for v in values], int(axis))


def stack(math: Arithmetic, *, values: tuple[Tensor, ...], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


def split(
    math: Arithmetic,
    *,
    x: Tensor,
    axis: Tensor,
    num_splits: Tensor | None = None,
    split_sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.split(x, ints(split_sizes), int(axis))
    require(num_splits is not None, "split without sizes or number")
    size, count = x.shape[int(axis)], int(num_splits)  # type: ignore[arg-type]
    require(size % count == 0, f"split of {size} into {count}; expected equal parts")
    return torch.split(x, size // count, int(axis))


def _slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[list[range], list[int]]:
    """Return the indices taken of every dimension, and the dimensions that vanish."""
    rank = x.dim()
    steps = [1] * rank if stride is None else ints(stride)
    masks = [[False] * rank if m is None else [bool(v) for v in m.tolist()]
             for m in (begin_mask, end_mask, squeeze_mask)]  # fmt: skip
    taken, gone = [], []
    for d, (first, last) in enumerate(zip(ints(begin), ints(end), strict=True)):
        size = x.shape[d]
        if masks[2][d]:
            require(-size <= first < size, f"index {first} of a dimension of {size}")
            taken.append(range(first % size, first % size + 1))
            gone.append(d)
            continue
        start = None if masks[0][d] else first
        stop = None if masks[1][d] else last
        taken.append(range(*slice(start, stop, steps[d]).indices(size)))
    return taken, gone


def _take(x: Tensor, taken: list[range]) -> Tensor:
    for d, indices in enumerate(taken):
        if indices == range(x.shape[d]):
            continue
        if indices.step > 0:
            x = x[(slice(None),) * d + (slice(indices.start, indices.stop, indices.step),)]
        else:
            x = x.index_select(d, torch.tensor(list(indices), dtype=torch.int64))
    return x


def slice_by_index(
    math: Arithmetic,
    *,
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    taken, gone = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return _take(x, taken).squeeze(gone) if gone else _take(x, taken)


def slice_by_size(math: Arithmetic, *, x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    taken = []
    for d, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = first % x.shape[d] if first < 0 else first
        stop = x.shape[d] if count == -1 else start + count
        require(stop <= x.shape[d], f"slice {start}:{stop} of a dimension of {x.shape[d]}")
        taken.append(range(start, stop))
    return _take(x, taken)


def slice_update(
    math: Arithmetic,
    *,
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    taken, gone = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for d in gone:
        update = update.unsqueeze(d)
    result = x.clone()
    result[torch.meshgrid(*[torch.tensor(list(t)) for t in taken], indexing="ij")] = update
    return result


def tile(math: Arithmetic, *, x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


def pad(math: Arithmetic, *, x: Tensor, pad: Tensor, mode: str, constant_val: Tensor) -> Tensor:
    amounts = ints(pad)
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)][::-1]
    flat = [n for pair in pairs for n in pair]
    if mode == "constant":
        return F.pad(x, flat, value=constant_val.item())
    require(mode in ("reflect", "replicate"), f"pad mode is {mode}; expected a known one")
    for back, (before, after) in enumerate(pairs):
        size, dim = x.shape[x.dim() - 1 - back], x.dim() - 1 - back
        if mode == "replicate":
            indices = [min(max(i, 0), size - 1) for i in range(-before, size + after)]
        else:
            indices = [(i if i < size else 2 * size - 2 - i) if i >= 0 else -i
                       for i in range(-before, size + after)]  # fmt: skip
        x = x.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return x


def _indices(values: Tensor, size: int) -> Tensor:
    wide = values.long()
    require(
        bool(((wide >= -size) & (wide < size)).all()), f"an index out of range of a size {size}"
    )
    return torch.where(wide < 0, wide + size, wide)


def gather(
    math: Arithmetic,
    *,
    x: Tensor,
    indices: Tensor,
    axis: Tensor,
    batch_dims: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    dim = int(axis) % x.dim()
    chosen = _indices(indices, x.shape[dim])
    batch = 0 if batch_dims is None else int(batch_dims)
    if batch == 0:
        flat = x.index_select(dim, chosen.reshape(-1))
        return flat.reshape([*x.shape[:dim], *chosen.shape, *x.shape[dim + 1 :]])
    rows, picks = x.flatten(0, batch - 1), chosen.flatten(0, batch - 1)
    inner = torch.tensor(dim - batch)
    parts = [gather(math, x=r, indices=p, axis=inner) for r, p in zip(rows, picks, strict=True)]
    return torch.stack(parts).reshape(*x.shape[:batch], *parts[0].shape)


def gather_along_axis(
    math: Arithmetic,
    *,
    x: Tensor,
    indices: Tensor,
    axis: Tensor,
    validate_indices: Tensor | None = None,
) -> Tensor:
    return torch.gather(x, int(axis), _indices(indices, x.shape[int(axis)]))


def gather_nd(
    math: Arithmetic,
    *,
    x: Tensor,
    indices: Tensor,
    batch_dims: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    require(batch_dims is None or int(batch_dims) == 0, "gather_nd with batch_dims; expected 0")
    places = [_indices(i, x.shape[d]) for d, i in enumerate(indices.unbind(-1))]
    return x[tuple(places)]


def scatter_along_axis(
    math: Arithmetic,
    *,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor,
    mode: str,
    validate_indices: Tensor | None = None,
) -> Tensor:
    dim = int(axis)
    places = _indices(indices, data.shape[dim])
    if mode == "update":
        return data.scatter(dim, places, updates)
    require(mode == "add", f"scatter mode is {mode}; expected update or add")
    return data.scatter_add(dim, places, updates)


def scatter_nd(
    math: Arithmetic,
    *,
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str,
    validate_indices: Tensor | None = None,
) -> Tensor:
    require(mode in ("update", "add"), f"scatter mode is {mode}; expected update or add")
    places = tuple(_indices(i, data.shape[d]) for d, i in enumerate(indices.unbind(-1)))
    return data.index_put(places, updates, accumulate=mode == "add")


def shape(math: Arithmetic, *, x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def fill(math: Arithmetic, *, shape: Tensor, value: Tensor) -> Tensor:
    return torch.full(ints(shape), value.item(), dtype=value.dtype)


def fill_like(math: Arithmetic, *, ref_tensor: Tensor, value: Tensor) -> Tensor:
    return torch.full(ref_tensor.shape, value.item(), dtype=value.dtype)


def range_1d(math: Arithmetic, *, end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def reverse(math: Arithmetic, *, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(axes_of(axes, x))


def one_hot(
    math: Arithmetic,
    *,
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor,
    on_value: Tensor,
    off_value: Tensor,
) -> Tensor:
    size = int(one_hot_vector_size)
    hot = indices.unsqueeze(-1) == torch.arange(size, dtype=torch.int32)
    result = torch.where(hot, on_value, off_value)
    return result.movedim(-1, int(axis) % result.dim())


def band_part(math: Arithmetic, *, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    below, above = int(lower), int(upper)
    if below >= 0:
        x = x.triu(-below)
    return x.tril(above) if above >= 0 else x


def pixel_shuffle(math: Arithmetic, *, x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


def pixel_unshuffle(math: Arithmetic, *, x: Tensor, downscale_factor: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, int(downscale_factor))


def non_zero(math: Arithmetic, *, x: Tensor) -> Tensor:
    return torch.nonzero(x).to(torch_type("int32"))


HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {
        "band_part": band_part,
        "concat": concat,
        "expand_dims": expand_dims,
        "fill": fill,
        "fill_like": fill_like,
        "flatten2d": flatten2d,
        "gather": gather,
        "gather_along_axis": gather_along_axis,
        "gather_nd": gather_nd,
        "non_zero": non_zero,
        "one_hot": one_hot,
        "pad": pad,
        "pixel_shuffle": pixel_shuffle,
        "pixel_unshuffle": pixel_unshuffle,
        "range_1d": range_1d,
        "reshape": reshape,
        "reverse": reverse,
        "scatter_along_axis": scatter_along_axis,
        "scatter_nd": scatter_nd,
        "shape": shape,
        "slice_by_index": slice_by_index,
        "slice_by_size": slice_by_size,
        "slice_update": slice_update,
        "split": split,
        "squeeze": squeeze,
        "stack": stack,
        "tile": tile,
        "transpose": transpose,
    }
)

MOVES = (
    frozenset(HANDLERS)
    - {"fill", "fill_like", "one_hot", "range_1d"}
    - {
        "scatter_along_axis",
        "scatter_nd",
    }
)
"""Operators that only move values, which need no second rounding."""
