"""A sequence in segments of tokens: one loop in a target that has loops, else a copy a segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_LOOPS: ContextVar[bool | None] = ContextVar("loops", default=None)

Step = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


@contextmanager
def loops(wanted: bool = True) -> Iterator[None]:
    """Export each :func:`over_segments` within, of a static batch, as one ``scan`` operator.

    Not ``wanted``: as copies, even where a ``loops()`` is within.
    """
    token = _LOOPS.set(wanted and may_loop())
    try:
        yield
    finally:
        _LOOPS.reset(token)


def may_loop() -> bool:
    """Whether no ``loops(False)`` is around."""
    return _LOOPS.get() is not False


def over_segments(
    step: Step, carry: tuple[Tensor, ...], tokens: Sequence[Tensor], size: int
) -> Tensor:
    """Run a step over each ``size`` tokens in turn.

    Args:
        step: ``(carry, *tokens of a segment)`` to (its result, the next carry of the same shapes).
        carry: before the first segment.
        tokens: tensors (B or 1, L, H, W), L a multiple of ``size``.

    Returns:
        (B, L, H, M) of the results (B·size/c, H, c, M), whatever even c is.
    """
    batch, length = tokens[0].shape[:2]
    # torch's scan fixes a dynamic batch.
    if not (_LOOPS.get() and isinstance(batch, int)):
        results = []
        for own in zip(*(x.split(size, dim=1) for x in tokens), strict=True):
            result, carry = step(carry, *own)
            _, heads, _, width = result.shape
            results.append(result.transpose(1, 2).reshape(batch, size, heads, width))
        return torch.cat(results, dim=1)
    from torch._higher_order_ops.scan import scan

    def body(
        carry: tuple[Tensor, ...], own: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        result, following = step(carry, *own)
        # ONNX Runtime moves an axis past two others twice as fast as it swaps two axes.
        result = result.unflatten(2, (2, -1)).permute(0, 2, 3, 1, 4)
        # The operator wants the carry's strides kept and results that are no views.
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in following), (
            result.contiguous()
        )

    stacked = tuple(_stacked(x, length // size) for x in tokens)
    _, found = scan(body, carry, stacked)  # (S, BG, 2, c/2, H, M)
    shape: Any = found.shape[4:]
    if batch == 1:
        return found.reshape(1, length, *shape)
    found = found.reshape(length // size, batch, size, *shape).transpose(0, 1)
    return found.reshape(batch, length, *shape)


def _stacked(x: Tensor, segments: int) -> Tensor:
    """(B, L, ...) -> (S, B, L/S, ...); by one reshape, which moves nothing, where B is 1."""
    batch, length, *rest = x.shape
    if batch == 1:
        return x.reshape(segments, 1, length // segments, *rest)
    return x.reshape(batch, segments, length // segments, *rest).transpose(0, 1)
