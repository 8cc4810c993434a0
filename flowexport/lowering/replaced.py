"""A module whose attention operators are computed by other functions, its weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


class _Replacing(TorchFunctionMode):
    """Calls another function wherever one of the operators is called."""

    def __init__(self, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


class Replaced(nn.Module):
    """A module that calls ``functions[op]`` where it called ``op``; for eager runs and export.

    Args:
        module: shared, not copied; its training flag is taken over.
        functions: operator overload -> function of the operator's own arguments.
    """

    def __init__(self, module: nn.Module, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.module = module
        self._functions = dict(functions)
        self.training = module.training

    def forward(self, *inputs: Any) -> Any:
        with _Replacing(self._functions):
            return self.module(*inputs)
