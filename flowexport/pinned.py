"""Whether the form that a recipe pins computes the model's attentions, before any lowering.

One forward of the module tells which attentions it has; they are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowexport.core.errors import RecipeError
from flowexport.ops.installed import installed_ops
from flowexport.resolve import Subject, zeros

if TYPE_CHECKING:
    from flowexport.core.types import Options
    from flowexport.ops.descriptor import AttentionSite

DYNAMIC = "dynamic"


def check_pinned(subject: Subject, options: Mapping[str, Options]) -> None:
    """Refuse a pinned form that does not compute one of the model's attentions.

    Args:
        options: by target; ``extra["form"]`` is the pinned form.

    Raises:
        RecipeError: with file and line, and the forms that compute all of them.
    """
    pinned = {name: o.extra["form"] for name, o in options.items() if o.extra.get("form")}
    if not pinned:
        return
    known = {op.name: op for op in installed_ops()}
    sites = attentions(subject)
    for name, form in pinned.items():
        for site in sites:
            misfit = known[site.op].misfit_of(form, site)
            if misfit is None:
                continue
            able = [
                {f for f in known[s.op].forms if not known[s.op].misfit_of(f, s)} for s in sites
            ]
            common = sorted(set.intersection(*able))
            where = subject.recipe.where("targets", name, "form")
            raise RecipeError(
                f"{where}: form of {name} is {form!r}, but the {site.op} of {subject.spec.name}"
                f" {misfit}; expected {'one of: ' + ', '.join(common) if common else 'no form'}.",
                fix="name one of them, or drop `form` and the measured one is taken",
            )


def attentions(subject: Subject) -> tuple[AttentionSite, ...]:
    """Return the model's attentions in execution order, without their module paths.

    A token count that follows a named dimension of the inputs is :data:`DYNAMIC`.
    """
    named = {d for s in subject.spec.inputs for d in s.shape if isinstance(d, str)} - {"batch"}
    sizes = (2, 3) if named else (2,)
    found = [_calls(subject, dict.fromkeys(named, size)) for size in sizes]
    return tuple(_merged(calls) for calls in zip(*found, strict=True))


def _calls(subject: Subject, sizes: Mapping[str, int]) -> list[AttentionSite]:
    import torch

    from flowexport.lowering.replaced import Replaced
    from flowexport.ops.descriptor import AttentionSite

    calls: list[AttentionSite] = []

    def recorder(name: str) -> Callable[..., Any]:
        def record(q: Any, k: Any, v: Any, *arguments: Any) -> Any:
            calls.append(
                AttentionSite(name, "", tuple(q.shape), tuple(k.shape), tuple(v.shape), arguments)
            )
            return q.new_zeros((*q.shape[:3], v.shape[3]))

        return record

    functions = {op.overload: recorder(op.name) for op in installed_ops()}
    inputs = [zeros(s.static(batch=1, **sizes)) for s in subject.spec.inputs]
    with torch.no_grad():
        Replaced(subject.module, functions)(*inputs)
    return calls


def _merged(calls: Sequence[AttentionSite]) -> AttentionSite:
    """Return one attention of several runs, with what differs between them as dynamic."""

    def shape(of: str) -> tuple[int | str, ...]:
        runs = [getattr(call, of) for call in calls]
        return tuple(d[0] if len(set(d)) == 1 else DYNAMIC for d in zip(*runs, strict=True))

    return replace(
        calls[0], q_shape=shape("q_shape"), k_shape=shape("k_shape"), v_shape=shape("v_shape")
    )
