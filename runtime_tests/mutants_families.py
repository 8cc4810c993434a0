"""Damage to files of few bits, of two lengths, of classifiers, and to fp16 files with a step.

Each format says how its constants and its functions' graphs are reached; what is done to
them is written once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import mutants_reach_coreml
import mutants_reach_onnx
import mutants_reach_tflite
from mutants import Change, Mutant
from mutants_reach import LONG, SHORT, STATES, STEP, double, grow, negate_row

REACH = {
    "onnx": mutants_reach_onnx.ONNX,
    "tflite": mutants_reach_tflite.TFLITE,
    "coreml": mutants_reach_coreml.COREML,
}


def mutants_of() -> list[Mutant]:
    """Return the mutants of both families."""
    found = []
    for target, reach in REACH.items():

        def add(
            family: str,
            kind: str,
            name: str,
            change: Change,
            loads: bool = True,
            *,
            target: str = target,
        ) -> None:
            # ONNX's functions are files beside the one that is damaged.
            whole = target == "onnx"
            inside = partial(_inside, change) if whole else change
            found.append(Mutant(target, kind, name, inside, loads, whole, family))

        add("int8", "int8 zero point", "shifted by one", partial(reach.zero_point, "forward"))
        for family in ("int8",) if target == "coreml" else ("int8", "narrow"):
            add(family, "int8 scale", "doubled", partial(reach.scale, "forward", double))
            change = partial(reach.weight, "forward", negate_row)
            add(family, "int8 weight", "a row negated", change)
        for function in (LONG, SHORT):
            at = f"of {function}"
            change = partial(reach.weight, function, negate_row)
            add("lengths", "a function's weight", f"a row negated, {at}", change)
            change = partial(reach.swap, function, ("logits", "other"))
            add("lengths", "outputs swapped", at, change)
        add("lengths", "functions exchanged", "both lengths", reach.exchange, loads=False)
        for function in ("forward", STEP):
            at = f"of {function}"
            add("stream", "fp16 layer", f"by 1.01, {at}", partial(reach.weight, function, grow))
            add("stream", "ε changed", f"by 1000, {at}", partial(reach.epsilon, function))
        add("stream", "step's state", "two outputs swapped", partial(reach.swap, STEP, STATES))
        add("stream", "step's state", "not updated", reach.keep)
        if target == "coreml":
            for name, part, how in mutants_reach_coreml.PALETTE:
                change = partial(mutants_reach_coreml.palette, part, how)
                add("narrow", f"palette's {part}", name, change)
            for function in (LONG, SHORT):
                add(
                    "lengths",
                    "labels shifted",
                    f"classes of {function}",
                    partial(mutants_reach_coreml.exchange_classes, function),
                )
        if target == "onnx":
            add(
                "lengths",
                "metadata of another model",
                "in the shorter length's file",
                mutants_reach_onnx.foreign_metadata,
            )
            add(
                "lengths",
                "functions exchanged",
                "a copy of the longer",
                mutants_reach_onnx.copy_longer,
                loads=False,
            )
    return found


def _inside(change: Change, bundle: Path) -> None:
    (path,) = [p for p in (bundle / "onnx").glob("*.onnx") if p.name.count(".") == 1]
    change(path)
