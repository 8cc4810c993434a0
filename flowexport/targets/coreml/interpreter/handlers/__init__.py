"""Every operator that the interpreter knows: MIL name -> handler, one file a kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flowexport.targets.coreml.interpreter.handlers import (
    activation,
    elementwise,
    linear,
    model,
    recurrent,
    reduction,
    resizing,
    shape,
)
from flowexport.targets.coreml.interpreter.handlers._values import TORCH_TYPES, Handler
from flowexport.targets.coreml.interpreter.handlers.model import CONSTEXPR, StateCell
from flowexport.targets.coreml.interpreter.handlers.shape import MOVES

_KINDS = (elementwise, reduction, shape, linear, activation, model, recurrent, resizing)

HANDLERS: Mapping[str, Handler] = MappingProxyType(
    {name: handler for kind in _KINDS for name, handler in kind.HANDLERS.items()}
)

__all__ = ["CONSTEXPR", "HANDLERS", "MOVES", "TORCH_TYPES", "Handler", "StateCell"]
