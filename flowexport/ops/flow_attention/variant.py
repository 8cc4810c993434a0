"""One description for every published variant of Flow-Attention.

Paper: Wu et al., *Flowformer: Linearizing Transformers with Conservation
Flows*, ICML 2022 (arXiv 2202.06258).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flowexport.core.errors import InputError

FEATURE_MAPS = ("sigmoid", "relu")
AXES = ("tokens", "heads")
# exp of a clamped Ô stays in half's range without the maximum subtracted up to here.
LARGEST_EXPONENT = 10.0
# A later token's e_t must not shrink the earlier ones' to 0 in float32.
WIDEST_CAUSAL_CLAMP = 80.0


@dataclass(frozen=True)
class FlowVariant:
    """What distinguishes one published Flow-Attention from another.

    Attributes:
        feature_map: φ. ``sigmoid``, or ``relu`` for ``relu(x) + eps``.
        clamp: bounds of the conserved source flow Ô, or None.
        eps: ε added to both factors of each flow's dot product.
        outer_eps: a second ε added to each of the four dot products after the
            sum (the vision code); 0 where the code has none.
        causal: prefix sums instead of full sums.
        flow_axis: what the flows Σ run over: ``tokens``, or ``heads`` at the
            same token (MobileAttention, needs L = S).
        competition_axis: what the competition's softmax runs over.
    """

    feature_map: str = "sigmoid"
    clamp: tuple[float, float] | None = (-1.0, 1.0)
    eps: float = 1e-6
    outer_eps: float = 0.0
    causal: bool = False
    flow_axis: str = "tokens"
    competition_axis: str = "tokens"

    def __post_init__(self) -> None:
        for kind, value, valid in (
            ("feature map", self.feature_map, FEATURE_MAPS),
            ("flow axis", self.flow_axis, AXES),
            ("competition axis", self.competition_axis, AXES),
        ):
            if value not in valid:
                raise InputError(f"flow attention: {kind} is {value!r}; expected one of {valid}.")
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise InputError(f"flow attention: clamp is {self.clamp}; expected low < high.")
        if self.eps < 0 or self.outer_eps < 0:
            raise InputError("flow attention: eps is negative; expected eps >= 0.")
        if self.causal and (self.flow_axis, self.competition_axis) != ("tokens", "tokens"):
            raise InputError("flow attention: a causal variant sums over tokens only.")
        span = float("inf") if self.clamp is None else self.clamp[1] - self.clamp[0]
        if self.causal and span > WIDEST_CAUSAL_CLAMP:
            raise InputError(
                f"flow attention: a causal variant has clamp {self.clamp};"
                f" expected bounds at most {WIDEST_CAUSAL_CLAMP:.0f} apart."
            )

    @property
    def needs_maximum(self) -> bool:
        """Whether exp(Ô) could overflow unless the softmax's maximum is subtracted."""
        return self.clamp is None or max(map(abs, self.clamp)) > LARGEST_EXPONENT


VARIANTS: Mapping[str, FlowVariant] = MappingProxyType(
    {
        "standard": FlowVariant(),
        "causal": FlowVariant(causal=True),
        "vision": FlowVariant(outer_eps=1e-6),
        "timeseries": FlowVariant(clamp=None),
        "nlp": FlowVariant(clamp=(-5.0, 5.0), causal=True),
        "rl": FlowVariant(clamp=(-10.0, 10.0), causal=True),
        "lra": FlowVariant(feature_map="relu", clamp=None, competition_axis="heads"),
        "mobile": FlowVariant(flow_axis="heads"),
    }
)
"""The published variants, by the name of the code base that defines each."""
