"""What the page shows of the range check that came before a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowexport.report.format import number

ARITHMETICS = {
    "fp16": "IEEE half",
    "fp16_ftz": "half, subnormals flushed",
    "fp16_acc16": "half, sums in half",
    "bf16": "bfloat16",
    "fp32": "float32",
}


def range_check(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the page's section on a target's range check, or None where there was none.

    Args:
        found: ``range_check`` of the manifest's target; see ``schemas/check.json``.
    """
    if not found or not found["layers"]:
        return None
    shown = list(found["layers"][0]["chosen"])
    return {
        "action": found["action"],
        "samples": found.get("samples", ""),
        "arithmetics": [(ARITHMETICS.get(a, a), a in found["decisive"]) for a in shown],
        "rows": [
            {
                "name": layer["module"] or "model",
                "function": layer["function"],
                "tokens": layer["tokens"][1],
                "form": layer["form"] if found["taken"] is None else found["taken"],
                "cells": [
                    _cell(verdicts[a])
                    for verdicts in (layer["published"], layer["replacement"] or layer["chosen"])
                    for a in shown
                ],
            }
            for layer in found["layers"]
        ],
    }


def _cell(verdict: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the error in words, and whether it is safe."""
    if verdict["lost"]:
        return f"{100 * verdict['lost']:.0f} % lost", verdict["safe"]
    if verdict["error"] is None:
        return "not finite", verdict["safe"]
    return number(verdict["error"]), verdict["safe"]
