"""The truth that artifacts are held against: the torch module in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flowexport.core.errors import InputError

CHUNK = 32


def reference_outputs(
    module: Any,
    cases: Mapping[str, Mapping[str, np.ndarray]],
    output_names: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Run a copy of a torch module in float64 on every case.

    The copy is in eval mode and the given module is not changed. Floating
    inputs are widened, others stay; inputs are passed by position, in the
    feeds' order. Batches above 32 samples run in pieces.

    Args:
        module: ``torch.nn.Module`` that returns a tensor, a sequence or a
            mapping of tensors.
        cases: case name -> input name -> array, batch first.
        output_names: names of the results, in the module's order.

    Returns:
        Case name -> output name -> float64 array.

    Raises:
        InputError: the module returns another number of results, or one that is not finite.
    """
    import copy

    import torch

    double = copy.deepcopy(module).double().eval()
    expected: dict[str, dict[str, np.ndarray]] = {}
    with torch.no_grad():
        for done, (case, feeds) in enumerate(cases.items(), 1):
            samples = len(next(iter(feeds.values())))
            pieces = []
            for start in range(0, samples, CHUNK):
                tensors = [
                    torch.from_numpy(np.array(value[start : start + CHUNK]))
                    for value in feeds.values()
                ]
                results = double(*[t.double() if t.is_floating_point() else t for t in tensors])
                pieces.append(_named(results, output_names, case))
            expected[case] = {
                name: np.concatenate([piece[name] for piece in pieces]) for name in output_names
            }
            for name, value in expected[case].items():
                if not np.isfinite(value).all():
                    raise InputError(
                        f"verify reference: {name} of case {case} is not finite in float64; "
                        f"expected finite values.",
                        fix="check the weights and the preprocessing",
                    )
            if progress is not None:
                progress(done, len(cases))
    return expected


def _named(results: Any, names: Sequence[str], case: str) -> dict[str, np.ndarray]:
    if isinstance(results, Mapping):
        values = list(results.values())
    elif isinstance(results, (tuple, list)):
        values = list(results)
    else:
        values = [results]
    if len(values) != len(names):
        raise InputError(
            f"verify reference: case {case} has {len(values)} results; "
            f"expected {len(names)}: {', '.join(names)}."
        )
    return {n: v.detach().double().numpy() for n, v in zip(names, values, strict=True)}
