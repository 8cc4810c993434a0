"""The two sides of each row of :mod:`flowexport.measure_goals`: files, sessions and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.baseline.programs import (
    absorbed_passes,
    absorbed_products,
    causal_passes,
    causal_products,
    features_and_products,
    projections_only,
    save_published,
)
from flowexport.baseline.sessions import BASELINE, LIMIT, OURS, difference
from flowexport.baseline.stock import export_stock
from flowexport.bench.steps import STEPS_A_ROUND
from flowexport.core.errors import VerificationError
from flowexport.core.hashing import sha256_file
from flowexport.core.types import Artifact, Options, Precision, Session, TensorSpec
from flowexport.measure_forms import layer
from flowexport.ops.installed import installed_ops
from flowexport.ops.segments import loops
from flowexport.registry import TARGETS

# Rounding in another order over sums of up to 4,096 tokens.
TOLERANCE = 5e-5
CHECKED_STEPS = 32
# Further sessions of a row: the bound with features and products, that with the flows' passes
# over the tokens too, our own forward.
PRODUCTS, PASSES, OWN_FORWARD = "products", "passes", "own_forward"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kind: ``layer``, ``causal``, ``step`` or ``softmax``.
        tokens, heads, width: N, H, D of the attention.
        wanted: least ratio of the baseline's median time to ours.
        less_memory: least ratio of the baseline's extra memory to ours, or None.
        rounds: runs of each unless the caller says otherwise.
    """

    kind: str
    target: str
    tokens: int
    heads: int
    width: int
    wanted: float
    less_memory: float | None = None
    rounds: int = 60

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.target}-{self.tokens}"


def compared(row: Row, sessions: Mapping[str, Session], feeds: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of ours from the baseline, or of the fused kernel from softmax.

    Raises:
        VerificationError: it is above :data:`TOLERANCE`, so no ratio is given.
    """
    where = f"measure {row.name}"
    if row.kind != "softmax":
        return difference(sessions[BASELINE], sessions[OURS], [feeds], TOLERANCE, where)[1]
    import torch

    q, k, v = (
        torch.from_numpy(feeds[n]).unflatten(-1, (row.heads, row.width)).transpose(1, 2)
        for n in "qkv"
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    got = sessions[BASELINE].run(feeds)["y"]
    worst = float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"{where}: the fused kernel differs from softmax attention by {worst:.1e} of its"
            f" largest output; expected at most {TOLERANCE:.0e}, so no ratio is given."
        )
    return worst


def feeds_of(inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        s.name: generator.standard_normal([int(d) for d in s.shape], np.float32) for s in inputs
    }


def _core(row: Row, variant: str) -> Any:
    """Return the attention without projections as a module: q, k, v (B, N, C) -> (B, N, C)."""
    import torch
    from torch import nn

    from flowexport.ops.flow_attention import VARIANTS, flow_attention

    class Core(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.unflatten(-1, (row.heads, row.width)) for x in (q, k, v))
            return flow_attention(q, k, v, VARIANTS[variant]).flatten(2)

    return Core()


def _core_inputs(row: Row) -> list[TensorSpec]:
    return [TensorSpec(n, (1, row.tokens, row.heads * row.width)) for n in "qkv"]


def _converted(
    row: Row, module: Any, inputs: Sequence[TensorSpec], outputs: Sequence[str], out: Path
) -> Artifact:
    from flowexport.lowering import lower

    out.mkdir()
    ops = installed_ops()
    program = lower(module, inputs, outputs, name="layer", ops=ops)
    return TARGETS.get(row.target).convert(program, Options(), out)


def published(row: Row, root: Path) -> dict[str, Artifact]:
    """Return the stock export of the published form, ours, and the bounds.

    The bounds are our conversion of the same module with less in it: a layer's projections
    alone (``limit``), and all with the features and the products but no flow (``products``),
    in the layout that costs the runtime least; for a causal core on ONNX Runtime, and on LiteRT
    where that layout absorbs projections, also with the flows' passes over the tokens (``passes``).
    """
    if row.kind == "layer":
        module = layer(row.tokens, row.heads, row.width, "vision").eval()
        inputs = [TensorSpec("x", (1, row.tokens, row.heads * row.width))]
    else:
        module, inputs = _core(row, "causal").eval(), _core_inputs(row)
    artifacts = {BASELINE: _stock(row, module, inputs, root)}
    artifacts[OURS] = _converted(row, module, inputs, ["y"], root / OURS)
    if row.kind == "layer":
        artifacts[LIMIT] = _replaced(row, module, inputs, projections_only, root / LIMIT)
    artifacts[PRODUCTS] = products_bound(row, module, inputs, root / PRODUCTS)
    if row.kind == "causal" and row.target == "onnx":
        artifacts[PASSES] = causal_bound(row, module, inputs, causal_passes, root / PASSES)
    elif _absorbs(row):
        artifacts[PASSES] = absorbed_bound(row, module, inputs, absorbed_passes, root / PASSES)
    return artifacts


def products_bound(row: Row, module: Any, inputs: Sequence[TensorSpec], out: Path) -> Artifact:
    """Return our conversion of the features, products and any projections, without a flow."""
    if row.kind == "causal":
        return causal_bound(row, module, inputs, causal_products, out)
    if not _absorbs(row):
        return _replaced(row, module, inputs, features_and_products, out)
    return absorbed_bound(row, module, inputs, absorbed_products, out)


def causal_bound(
    row: Row, module: Any, inputs: Sequence[TensorSpec], function: Any, out: Path
) -> Artifact:
    """Return our conversion of a causal core with the attention replaced, in a loop on ONNX.

    Args:
        function: as :func:`causal_products`.
    """
    with loops() if row.target == "onnx" else nullcontext():
        return _replaced(row, module, inputs, function, out)


def _absorbs(row: Row) -> bool:
    """Say whether absorbing pays: the small products, (D, C) by (C, D), weigh less than v's."""
    return row.kind == "layer" and row.target == "tflite" and row.tokens >= row.heads * row.width


def absorbed_bound(
    row: Row, module: Any, inputs: Sequence[TensorSpec], function: Any, out: Path
) -> Artifact:
    """Return our conversion of a layer with v's and the output's layers given to a function.

    Args:
        function: as :func:`absorbed_products`.
    """
    import torch
    from torch import nn

    from flowexport.ops.flow_attention import VARIANTS, op_arguments

    class Absorbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = module.proj
            weights = module.qkv.weight.detach().chunk(3)
            biases = module.qkv.bias.detach().chunk(3)
            self.q, self.k, self.v = (
                nn.utils.skip_init(nn.Linear, w.shape[1], w.shape[0]) for w in weights
            )
            for linear, w, b in zip((self.q, self.k, self.v), weights, biases, strict=True):
                linear.weight.data, linear.bias.data = w, b

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (f(x).unflatten(-1, (row.heads, row.width)) for f in (self.q, self.k))
            weights = (self.v.weight, self.proj.weight, self.proj.bias)
            return function(q, k, x, *weights, *op_arguments(VARIANTS["vision"]))

    return _converted(row, Absorbed(), inputs, ["y"], out)


def _replaced(
    row: Row, module: Any, inputs: Sequence[TensorSpec], function: Any, out: Path
) -> Artifact:
    """Return our conversion of the module with a function in place of each attention."""
    from flowexport.lowering.replaced import Replaced

    bare = Replaced(module, {op.overload: function for op in installed_ops()})
    return _converted(row, bare, inputs, ["y"], out)


def _stock(row: Row, module: Any, inputs: Sequence[TensorSpec], root: Path) -> Artifact:
    """Return the target's stock export of the module with the published form."""
    save_published(module, inputs, row.name, root / "published.pt2")
    y = TensorSpec("y", inputs[0].shape)
    path = root / f"stock{TARGETS.get(row.target).suffix}"
    return export_stock(row.target, root / "published.pt2", "layer", inputs, [y], path)


def softmax(row: Row, root: Path) -> dict[str, Artifact]:
    """Return ONNX Runtime's fused MultiHeadAttention, ours and its bound, without projections."""
    import onnx
    from onnx import TensorProto, helper

    inputs = _core_inputs(row)
    core = _core(row, "vision")
    ours = _converted(row, core, inputs, ["y"], root / OURS)
    products = _replaced(row, core, inputs, features_and_products, root / PRODUCTS)
    shape = list(inputs[0].shape)
    domain = "com.microsoft"
    graph = helper.make_graph(
        [
            helper.make_node(
                "MultiHeadAttention", list("qkv"), ["y"], domain=domain, num_heads=row.heads
            )
        ],
        "softmax",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)],
        ir_version=10,
    )
    path = root / "softmax.onnx"
    onnx.save(model, path)
    fused = Artifact(
        target=row.target,
        path=path,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        precision=Precision.FP32,
        model="softmax",
        recipe_sha256="",
        form="softmax",
        inputs=ours.inputs,
        outputs=ours.outputs,
    )
    return {BASELINE: fused, OURS: ours, PRODUCTS: products}


class _Fed(Session):
    """A session that runs ``times`` on feeds of its own, so that unlike ones run in turns."""

    def __init__(self, session: Session, feeds: Mapping[str, np.ndarray], times: int = 1) -> None:
        super().__init__(session.artifact)
        self._session, self._feeds, self._times = session, feeds, times

    @property
    def info(self) -> Any:
        return self._session.info

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for _ in range(self._times):
            result = self._session.run(self._feeds)
        return result

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.run(feeds)


def step_sessions(row: Row, root: Path, stack: ExitStack) -> tuple[dict[str, Session], float]:
    """Return the stock export of the published forward, our forward, and our step.

    Raises:
        VerificationError: some steps, or our forward, do not give the published outputs.
    """
    import torch
    from torch import nn

    from flowexport.ops.flow_attention import VARIANTS
    from flowexport.ops.flow_attention.streaming import FlowState, initial_state, step

    variant = VARIANTS["causal"]
    reset = initial_state(variant, 1, row.heads, row.width, row.width)
    names = list(FlowState._fields)

    class Step(nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            q, k, v = (x.unflatten(-1, (row.heads, row.width)) for x in (q, k, v))
            y, following = step(q, k, v, FlowState(*state), variant)
            return y.flatten(1), *following

    frame = [TensorSpec(n, (1, row.heads * row.width)) for n in "qkv"]
    state = [TensorSpec(n, tuple(x.shape)) for n, x in zip(names, reset, strict=True)]
    target = TARGETS.get(row.target)
    outputs = ["y", *(f"next_{n}" for n in names)]
    step_file = _converted(row, Step(), [*frame, *state], outputs, root / "step")
    one = stack.enter_context(target.load(step_file, threads=1))
    module, inputs = _core(row, "causal").eval(), _core_inputs(row)
    forwards = {
        BASELINE: target.load(_stock(row, module, inputs, root), threads=1),
        OWN_FORWARD: target.load(_converted(row, module, inputs, ["y"], root / OURS), threads=1),
    }
    for session in forwards.values():
        stack.enter_context(session)
    sequence = feeds_of(inputs)
    where = f"measure {row.name}"
    worst = difference(forwards[BASELINE], forwards[OWN_FORWARD], [sequence], TOLERANCE, where)[1]
    wanted = forwards[BASELINE].run(sequence)["y"]
    values = {n: x.numpy() for n, x in zip(names, reset, strict=True)}
    steps = 0.0
    for t in range(min(CHECKED_STEPS, row.tokens)):
        feeds = {**{n: sequence[n][:, t] for n in "qkv"}, **values}
        results = one.run(feeds)
        values = {n: results[f"next_{n}"] for n in names}
        steps = max(steps, float(np.abs(results["y"] - wanted[:, t]).max()))
    worst = max(worst, steps / float(np.abs(wanted).max()))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"{where}: steps differ from the forward by {worst:.1e} of its largest"
            f" output; expected at most {TOLERANCE:.0e}, so no ratio is given."
        )
    fed: dict[str, Session] = {kind: _Fed(x, sequence) for kind, x in forwards.items()}
    return {**fed, OURS: _Fed(one, feeds, times=STEPS_A_ROUND)}, worst
