"""Where a package's operators come from: PyTorch module paths, attention cores; and what
stays in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch.export import ExportedProgram

from flowexport.core.errors import ConversionError, InputError
from flowexport.lowering.program import module_path

ATTENTION = "attention"
"""The rule that means every operator that an attention node became."""

STATE = "state"
"""The rule that means what moves a step's state; see ``lowering.streaming.state_nodes``."""


@dataclass(frozen=True)
class Place:
    """Origin of an operator: its module's path, and whether an attention node became it.

    ``state``: whether it moves a step's state.
    """

    path: str
    attention: bool
    state: bool = False


def number_nodes(
    exported: ExportedProgram, attentions: Iterable[str], state: Collection[str] = ()
) -> dict[int, Place]:
    """Number a graph's nodes, as coremltools carries them along, and say where each is from.

    Args:
        exported: changed: every node gets a ``debug_handle``.
        attentions: the attention operators (``flowexport.flow_attention.default``).
        state: names of the nodes that move a step's state.
    """
    wanted = set(attentions)
    places = {}
    for number, node in enumerate(exported.graph.nodes, 1):
        if node.op != "call_function":
            continue
        node.meta["debug_handle"] = number
        sources = list(node.meta.get("from_node") or ())
        seen = set()
        while sources:
            source = sources.pop()
            seen.add(source.target)
            sources += source.from_node or ()
        places[number] = Place(module_path(node), bool(seen & wanted), node.name in state)
    return places


def place_of(operation: Any, places: Mapping[int, Place]) -> Place | None:
    """Return a pymil operation's origin; None where coremltools or a pass added it."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    handle = operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or [None]
    return None if handle[0] is None else places.get(int(handle[0]))


def fits(rule: str, op_type: str, place: Place | None) -> bool:
    """Whether a rule means an operator: by its type, its module's path, or as attention."""
    if rule == op_type:
        return True
    if place is None:
        return False
    if rule == ATTENTION:
        return place.attention
    if rule == STATE:
        return place.state
    return fnmatchcase(place.path, rule) or place.path.startswith(f"{rule}.")


def half_selector(rules: Sequence[str], places: Mapping[int, Place]) -> Callable[[Any], bool]:
    """Return coremltools' ``op_selector``: whether an operator becomes half precision."""

    def select(operation: Any) -> bool:
        place = place_of(operation, places)
        return not any(fits(rule, operation.op_type, place) for rule in rules)

    return select


def named_results(
    program: Any, places: Mapping[int, Place], rules: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Read a converted pymil program.

    Returns:
        Module path by result name; and by rule the results that it keeps in float32,
        casts aside.
    """
    paths: dict[str, str] = {}
    kept: dict[str, list[str]] = {rule: [] for rule in rules}
    for function in program.functions.values():
        for operation in function.operations:
            if operation.op_type == "const":
                continue
            place = place_of(operation, places)
            for result in operation.outputs:
                if place is not None:
                    paths[result.name] = place.path
                for rule in rules:
                    if operation.op_type != "cast" and fits(rule, operation.op_type, place):
                        kept[rule].append(result.name)
    return paths, kept


def require_kept(
    spec: Any, kept: Mapping[str, Sequence[str]], function: str, model: str
) -> dict[str, int]:
    """Return how many float results each rule keeps in float32, in the finished file.

    Raises:
        InputError: a rule matches no operator with a float result.
        ConversionError: one of its results is half precision all the same.
    """
    from coremltools.proto import MIL_pb2

    body = spec.mlProgram.functions[function]
    kinds = {
        result.name: MIL_pb2.DataType.Name(result.type.tensorType.dataType)
        for operation in body.block_specializations[body.opset].operations
        for result in operation.outputs
        if result.type.WhichOneof("type") == "tensorType"
    }
    counts: Counter[str] = Counter()
    for rule, names in kept.items():
        found = {name: kinds[name] for name in names if kinds.get(name, "").startswith("FLOAT")}
        halves = [name for name, kind in found.items() if kind != "FLOAT32"]
        if halves:
            raise ConversionError(
                f"convert coreml {model}: keep_fp32 {rule!r}: {halves[0]} is {found[halves[0]]};"
                " expected FLOAT32."
            )
        if not found:
            raise InputError(
                f"convert coreml {model}: keep_fp32 has {rule!r}, which is no operator's type and"
                " no module's path here; expected one that matches.",
                fix="`flowexport inspect` lists the operators' types; a path like `blocks.0.*`",
            )
        counts[rule] = len(found)
    return dict(counts)
