"""A causal artifact step by step: its state as a value, checked before every call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.types import Session


@dataclass(frozen=True)
class StreamState:
    """What a causal model remembers between two steps.

    Attributes:
        model: identity of the model (its recipe's sha256): a state fits no other.
        values: one array a state input; the first dimension of all but ``t`` is the batch.
        steps: steps seen.
    """

    model: str
    values: Mapping[str, np.ndarray]
    steps: int = 0

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all values."""
        return sum(v.nbytes for v in self.values.values())

    def for_batch(self, batch: int) -> StreamState:
        """Return a state of batch 1 repeated for ``batch`` streams of the same length."""
        repeated = {
            n: np.repeat(v, batch, axis=0) if v.ndim > 1 else v for n, v in self.values.items()
        }
        return StreamState(self.model, repeated, self.steps)


class Stream:
    """Steps of a causal artifact on a runtime.

    Args:
        session: of ``artifact.function("step")``; the caller closes it.
        max_steps: the model's longest stream, or None.

    Raises:
        InputError: the session is of another function.
    """

    def __init__(self, session: Session, max_steps: int | None = None) -> None:
        artifact = session.artifact
        self._where = f"step {artifact.target} {artifact.model}"
        function = artifact.functions.get(artifact.entry)
        if function is None or not function.state:
            raise InputError(
                f"{self._where}: the session is of {artifact.entry!r}; expected the function"
                " 'step' of a causal model.",
                fix='target.load(artifact.function("step"))',
            )
        self.session, self.max_steps = session, max_steps
        self._function = function

    def check(self, state: StreamState) -> None:
        """Raise InputError unless the state is this model's: its hash, names, shapes, dtypes."""
        fix = "start from the bundle's reset state, golden/state.safetensors"
        mine = self.session.artifact.recipe_sha256
        if state.model != mine:
            raise InputError(
                f"{self._where}: the state is of the model {state.model[:12]}…;"
                f" expected {mine[:12]}….",
                fix=fix,
            )
        specs = self._function.state_specs
        if set(state.values) != {s.name for s in specs}:
            raise InputError(
                f"{self._where}: the state has {sorted(state.values)};"
                f" expected {sorted(s.name for s in specs)}.",
                fix=fix,
            )
        for spec in specs:
            spec.check(state.values[spec.name], f"{self._where}: state")
        if self.max_steps is not None and state.steps >= self.max_steps:
            raise InputError(
                f"{self._where}: the stream has {state.steps} steps;"
                f" expected fewer than {self.max_steps}, the model's longest stream.",
                fix=fix,
            )

    def step(
        self, feeds: Mapping[str, np.ndarray], state: StreamState
    ) -> tuple[dict[str, np.ndarray], StreamState]:
        """Run one step.

        Args:
            feeds: the inputs that are not state, (batch, ...).
            state: the reset state or that of the step before; not changed.

        Returns:
            The outputs that are not state, and the next state.

        Raises:
            InputError: the state is another model's or its shapes do not fit, a
                feed does not fit, or the stream is longer than the model allows.
        """
        self.check(state)
        names = self._function.state
        twice = set(feeds) & set(names)
        if twice:
            raise InputError(f"{self._where}: {twice.pop()} is state; expected it in the state.")
        results = self.session.run({**feeds, **state.values})
        following = {name: results.pop(output) for name, output in names.items()}
        return results, StreamState(state.model, following, state.steps + 1)
