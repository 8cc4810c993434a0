"""Whether a form survives half precision at one attention layer, before any conversion.

The form is run on representative logits with every operator's result (and
every constant) rounded to the arithmetic at hand, and compared with the
reference in float64. Sums inside one operator stay wide, as in the GEMMs and
reductions of GPUs and NPUs, except in ``fp16_acc16``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from flowexport.core.errors import UnknownNameError
from flowexport.ops.accumulate import half_cumsum, half_matmul, half_sum
from flowexport.ops.descriptor import AttentionSite
from flowexport.ops.flow_attention.half import as_dynamic
from flowexport.ops.flow_attention.lowered import FORMS
from flowexport.ops.flow_attention.op import variant_of
from flowexport.ops.flow_attention.reference import flow_attention_reference


@dataclass(frozen=True)
class Arithmetic:
    """A storage format: what it rounds to, and the error allowed of the largest output.

    The bound of the short formats is eight units in the last place: the result passes
    through about a dozen rounded operators, whose errors partly cancel. With a half
    accumulator it is 32: a sum of n <= 256 terms walks √n half units at random, 8 at
    most, and four such sums follow one another.

    Attributes:
        flush: subnormals become 0.
        narrow: sums inside one operator are half, too.
    """

    dtype: torch.dtype
    flush: bool
    bound: float
    narrow: bool = False

    def round(self, x: Tensor) -> Tensor:
        """Return x rounded to the format, in x's own dtype."""
        y = x.to(self.dtype)
        if self.flush:
            y = torch.where(y.abs() < torch.finfo(self.dtype).tiny, torch.zeros_like(y), y)
        return y.to(x.dtype)


ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "fp16": Arithmetic(torch.float16, False, 8 * 2.0**-10),
        "fp16_ftz": Arithmetic(torch.float16, True, 8 * 2.0**-10),
        "fp16_acc16": Arithmetic(torch.float16, False, 32 * 2.0**-10, narrow=True),
        "bf16": Arithmetic(torch.bfloat16, False, 8 * 2.0**-7),
        # Sums are not wider than float32 here: their rounding over N tokens comes on top.
        "fp32": Arithmetic(torch.float32, False, 2e-5),
    }
)


@dataclass(frozen=True)
class SiteVerdict:
    """What one form does at one attention layer in one arithmetic.

    Attributes:
        module_path: of the layer.
        form, arithmetic: what was tried.
        safe: finite, within the bound, nothing lost.
        error: largest error over the largest output; inf where not finite.
        overflow: the first operator whose finite inputs gave inf or NaN, or "".
        subnormal: largest share of subnormal values in one operator's result.
        lost: share of the outputs that are 0 and should not be.
        reason: one sentence for the user.
    """

    module_path: str
    form: str
    arithmetic: str
    safe: bool
    error: float
    overflow: str
    subnormal: float
    lost: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def _narrow_sum(x: Tensor, axes: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return half_sum(x, range(x.dim()) if axes is None else axes, keepdim)


def _narrow_mean(x: Tensor, axes: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    total = _narrow_sum(x, axes, keepdim)
    return total / max(1, x.numel() // max(1, total.numel()))


_NARROW: Mapping[Any, Callable[..., Tensor]] = MappingProxyType(
    {
        torch.ops.aten.sum.dim_IntList: _narrow_sum,
        torch.ops.aten.mean.dim: _narrow_mean,
        torch.ops.aten.mm.default: half_matmul,
        torch.ops.aten.bmm.default: half_matmul,
        torch.ops.aten.cumsum.default: lambda x, axis, **_: half_cumsum(x, axis),
    }
)
"""What adds up inside one operator, among those that the forms are made of."""


class RoundingMode(TorchDispatchMode):
    """Round the floating results and constants of every operator inside the block.

    Attributes:
        overflow: name of the first operator that overflowed, or "".
        subnormal: largest share of subnormal values in one result.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic
        self.overflow = ""
        self.subnormal = 0.0
        # Lowering folds these, so they are stored rounded but computed exactly.
        self._constants = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if all(x in self._constants for x in leaves):
            result = func(*args, **(kwargs or {}))
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self._constants[x] = True
            return result
        args, kwargs = tree_map(self._stored, (args, dict(kwargs or {})))
        narrow = _NARROW.get(func) if self.arithmetic.narrow else None
        result = func(*args, **kwargs) if narrow is None else narrow(*args, **kwargs)
        return tree_map(lambda x: self._result(func, x), result)

    def _stored(self, value: Any) -> Any:
        """Return an argument as the graph stores it: constants are rounded."""
        if type(value) is float:
            return self.arithmetic.round(torch.tensor(value, dtype=torch.float64)).item()
        if isinstance(value, Tensor) and value in self._constants and value.is_floating_point():
            return self.arithmetic.round(value)
        return value

    def _result(self, func: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value
        rounded = self.arithmetic.round(value)
        if not self.overflow and not rounded.isfinite().all():
            self.overflow = str(func).removeprefix("aten.")
        small = (value != 0) & (value.abs() < torch.finfo(self.arithmetic.dtype).tiny)
        self.subnormal = max(self.subnormal, small.float().mean().item())
        return rounded


def check_site(
    site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, form: str, arithmetic: str
) -> SiteVerdict:
    """Say whether a form keeps the result at one layer in one arithmetic.

    Args:
        site: the layer; its variant and path are used, and whether its length is dynamic.
        q, k, v: representative logits and values, (B, N, H, D), any float dtype.
        form: a name in FORMS.
        arithmetic: a name in ARITHMETICS: ``fp16``, ``fp16_ftz`` (subnormals flushed),
            ``fp16_acc16`` (sums in half), ``bf16`` or ``fp32``.

    Raises:
        UnknownNameError: no such form or arithmetic.
        InputError: the tensors or the variant do not fit the form.
    """
    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS, where="check")
    if arithmetic not in ARITHMETICS:
        raise UnknownNameError("arithmetic", arithmetic, ARITHMETICS, where="check")
    rules = ARITHMETICS[arithmetic]
    q, k, v = (rules.round(x.detach().double()).float() for x in (q, k, v))
    truth = flow_attention_reference(q.double(), k.double(), v.double(), variant_of(site.arguments))
    dynamic = any(isinstance(shape[1], str) for shape in (site.q_shape, site.k_shape))
    length = as_dynamic() if dynamic else nullcontext()
    with torch.no_grad(), length, RoundingMode(rules) as mode:
        result = FORMS[form](q, k, v, *site.arguments).double()
    scale = truth.abs().max().item() if truth.numel() else 0.0
    finite = bool(result.isfinite().all())
    error = float("inf")
    if finite:
        error = (result - truth).abs().max().item() / scale if scale else 0.0
    lost = ((result == 0) & (truth.abs() > rules.bound * scale)).double().mean().item()
    lost = lost if truth.numel() else 0.0
    past = f"{mode.overflow} leaves the range of {arithmetic} at N = {k.shape[1]}"
    if not finite:
        reason = past
    elif lost > 0:
        cause = past if mode.overflow else f"1/I is too small for {arithmetic}"
        reason = f"{lost:.0%} of the results vanish: {cause}"
    elif error > rules.bound:
        reason = f"the error is {error:.1e} of the largest output; expected {rules.bound:.1e}"
    else:
        reason = f"error {error:.1e} of the largest output, at most {rules.bound:.1e}"
    safe = finite and lost == 0 and error <= rules.bound
    return SiteVerdict(
        site.module_path, form, arithmetic, safe, error, mode.overflow, mode.subnormal, lost, reason
    )


@dataclass(frozen=True)
class LogitRange:
    """Calibrated statistics of one tensor: mean, standard deviation, extremes."""

    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def of(cls, x: Tensor) -> LogitRange:
        """Measure a tensor."""
        y = x.double()
        return cls(y.mean().item(), y.std(correction=0).item(), y.min().item(), y.max().item())


def check_ranges(
    site: AttentionSite, ranges: Mapping[str, LogitRange], form: str, arithmetic: str
) -> SiteVerdict:
    """Check a layer from the ranges of ``q``, ``k`` and ``v`` alone; return the worst verdict.

    Three fillings: normal of the calibrated mean and deviation (clipped to the
    extremes), and q, k at the high and at the low extreme. Dynamic sizes take
    1 for the batch and 1,024 for tokens.
    """
    sizes = {0: 1, 1: 1024}

    def filled(shape: tuple[int | str, ...], fill: Callable[[Tensor], Tensor]) -> Tensor:
        concrete = [d if isinstance(d, int) else sizes[i] for i, d in enumerate(shape)]
        concrete[0] = 1  # samples of a batch are independent
        return fill(torch.randn(concrete, generator=generator, dtype=torch.float64))

    def normal(r: LogitRange) -> Callable[[Tensor], Tensor]:
        return lambda x: (x * r.std + r.mean).clamp(r.low, r.high)

    def constant(value: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.full_like(x, value)

    verdicts = []
    fillings: tuple[Callable[[LogitRange], Callable[[Tensor], Tensor]], ...] = (
        normal,
        lambda r: constant(r.high),
        lambda r: constant(r.low),
    )
    for filling in fillings:
        generator = torch.Generator().manual_seed(0)
        verdicts.append(
            check_site(
                site,
                filled(site.q_shape, filling(ranges["q"])),
                filled(site.k_shape, filling(ranges["k"])),
                filled(site.v_shape, normal(ranges["v"])),
                form,
                arithmetic,
            )
        )
    return max(verdicts, key=lambda v: (not v.safe, v.error))
