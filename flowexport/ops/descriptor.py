"""What lowering must know of an attention operator; one value per folder in ``ops/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload


@dataclass(frozen=True)
class AttentionSite:
    """One attention node of a program, with the facts that decide its form.

    Shapes are (B, N, H, D) with names for dynamic sizes; ``arguments`` are the
    operator's plain-valued arguments after q, k, v.
    """

    op: str
    module_path: str
    q_shape: tuple[int | str, ...]
    k_shape: tuple[int | str, ...]
    v_shape: tuple[int | str, ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """The form chosen for one site, and why (kept in the manifest)."""

    form: str
    reason: str

    def told(self, miss: object | None) -> Choice:
        """Return the choice with what a pass could not match, if anything, in its reason."""
        return self if miss is None else Choice(self.form, f"{self.reason}; as written: {miss}")


@dataclass(frozen=True)
class Absorbing:
    """An attention operator with the linear layers behind and before it: v's and the output's.

    Its arguments are (q, k, x, value weight, value bias or None, output weight, output bias
    or None) and the operator's own after v; its result is the output layer's.

    Attributes:
        overload: the torch operator.
        forms: decompositions of it by name; the same names are among the operator's own
            forms, for where the layers cannot be absorbed.
    """

    overload: OpOverload
    forms: Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class AttentionDescriptor:
    """An attention operator as lowering sees it.

    Attributes:
        name: the fused operator's name in finished files (``FlowAttention``).
        overload: the torch operator that ``torch.export`` keeps as one node.
        forms: export-friendly decompositions by name; each takes the
            operator's own arguments and returns its result.
        choose: (target, precision, site) -> Choice; the one table of forms.
        attributes: the operator's plain arguments as ONNX attributes; None where
            the operator has no ONNX node and is always decomposed.
        misfit: (form, site) -> what of the attention the form does not compute, as a
            predicate ("is causal"), or None where it does; left out where all do.
        absorbing: the operator together with two of its linear layers, or None.
    """

    name: str
    overload: OpOverload
    forms: Mapping[str, Callable[..., Any]]
    choose: Callable[[str, str, AttentionSite], Choice]
    attributes: Callable[[tuple[Any, ...]], dict[str, Any]] | None = None
    misfit: Callable[[str, AttentionSite], str | None] | None = None
    absorbing: Absorbing | None = None

    def misfit_of(self, form: str, site: AttentionSite) -> str | None:
        """Return why a form does not compute an attention, or None."""
        if form not in self.forms:
            return "has no such form"
        return None if self.misfit is None else self.misfit(form, site)

    def fitting(self, site: AttentionSite) -> set[str]:
        """Return the forms that compute an attention."""
        return {form for form in self.forms if self.misfit_of(form, site) is None}
