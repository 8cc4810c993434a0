"""Causal models that read a sequence step by step, with a state of fixed size.

A causal model computes each step from the steps before it alone, and
Flow-Attention keeps them as running means (:mod:`flowexport.ops.flow_attention.streaming`):
L calls of ``step`` equal one ``forward``, at a cost that does not grow with L.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from flowexport_models.attention import FlowAttention
from torch import Tensor, nn

from flowexport.core.errors import InputError
from flowexport.core.types import TensorSpec
from flowexport.ops.flow_attention.streaming import FlowState

STEPS_SEEN = "t"
"""Name of the state that counts the steps; one for the whole model."""


class CausalModel(nn.Module, ABC):
    """One sequence in, one result for every step out; in one call or step by step.

    ``forward`` takes (B, L, ...) and returns (B, L, ...); ``step`` takes (B, ...)
    and the state, and returns (B, ...) and the next state. Nothing is kept in the module.
    """

    max_steps: int | None = None
    """The longest stream, or None where there is no bound."""

    @abstractmethod
    def state_specs(self) -> tuple[TensorSpec, ...]:
        """Return name, shape and dtype of each state tensor; ``batch`` is the batch."""

    @abstractmethod
    def step(self, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute one step.

        Args:
            x: (B, ...), one step of forward's input.
            state: of :meth:`initial_state` or of the step before; not changed. It stays
                float32 in a half model: a mean in half stops moving after about 2,000 steps.

        Returns:
            The step's result, and the next state with the same names, shapes and dtypes.
        """

    def initial_state(
        self, batch: int = 1, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the state before the first step (the ``reset`` state): zeros."""
        return {
            s.name: torch.zeros(*map(int, s.static(batch=batch).shape), dtype=dtype)
            for s in self.state_specs()
        }


def attention_specs(prefix: str, attention: FlowAttention) -> tuple[TensorSpec, ...]:
    """Return the state of one causal Flow-Attention, without the count of steps.

    Raises:
        InputError: the variant is not causal, or has no clamp: its reset state is not zeros.
    """
    variant, (heads, width) = attention.variant, attention.heads
    if not variant.causal or variant.needs_maximum:
        raise InputError(
            f"build {prefix}: the attention's variant is {variant}; expected a causal one with a"
            " clamp."
        )
    sums = [(name, (width,)) for name in ("k_mean", "q_mean", "k_flow", "q_flow")]
    shapes = [*sums, ("weight_mean", (1,)), ("context", (width, width))]
    return tuple(TensorSpec(f"{prefix}_{n}", ("batch", heads, *shape)) for n, shape in shapes)


def attention_state(prefix: str, state: Mapping[str, Tensor]) -> FlowState:
    """Collect one attention's state from the model's."""
    own = {n: state[f"{prefix}_{n}"] for n in FlowState._fields if f"{prefix}_{n}" in state}
    # Not carried: the clamp makes the running maximum needless, and it stays 0.
    unused = torch.zeros_like(own["weight_mean"])
    return FlowState(**own, weight_max=unused, t=state[STEPS_SEEN])


def named_state(prefix: str, state: FlowState) -> dict[str, Tensor]:
    """Return one attention's state under the model's names; the opposite of attention_state."""
    parts = state._asdict()
    return {f"{prefix}_{n}": v for n, v in parts.items() if n not in ("weight_max", STEPS_SEEN)}
