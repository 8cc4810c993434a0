"""The torch operator: opcheck, gradients, one node through export, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention import (
    VARIANTS,
    FlowVariant,
    flow_attention,
    flow_attention_reference,
    op_arguments,
    variant_of,
)

OP = torch.ops.flowexport.flow_attention.default


def inputs(batch: int = 2, sinks: int = 5, sources: int = 5, dtype=torch.float64, **kw):
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, sinks, 2, 3), (batch, sources, 2, 3), (batch, sources, 2, 4))
    return tuple(torch.randn(s, generator=g, dtype=dtype).requires_grad_(**kw) for s in shapes)


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name: str) -> None:
    q, k, v = inputs(requires_grad=True)
    torch.library.opcheck(OP, (q, k, v, *op_arguments(VARIANTS[name])))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient(name: str) -> None:
    args = inputs(batch=1, sinks=3, sources=3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: flow_attention(*x, VARIANTS[name]), args)


@pytest.mark.parametrize("name", VARIANTS)
def test_arguments_describe_the_variant(name: str) -> None:
    assert variant_of(op_arguments(VARIANTS[name])) == VARIANTS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_export_keeps_one_node(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flow_attention(q, k, v, VARIANTS[name])

    batch = torch.export.Dim("batch", min=1, max=64)
    args = inputs(requires_grad=False)
    exported = torch.export.export(Module(), args, dynamic_shapes=({0: batch},) * 3)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [OP]
    q, k, v = inputs(batch=3, requires_grad=False)
    truth = flow_attention_reference(q, k, v, VARIANTS[name])
    torch.testing.assert_close(exported.module()(q, k, v), truth, rtol=0, atol=0)


BAD = [
    ("3 dimensions", lambda q, k, v: (q[0], k, v)),
    ("same batch and head", lambda q, k, v: (q[:1], k, v)),
    ("same batch and head", lambda q, k, v: (q[:, :, :1], k, v)),
    ("5 tokens and v 4", lambda q, k, v: (q, k, v[:, :4])),
    ("width 3 and k 2", lambda q, k, v: (q, k[..., :2], v)),
    ("dtypes torch.float32", lambda q, k, v: (q.float(), k, v)),
    ("dtype torch.int64", lambda q, k, v: (q.long(), k.long(), v.long())),
]


@pytest.mark.parametrize(("message", "spoil"), BAD, ids=[m for m, _ in BAD])
@pytest.mark.parametrize("call", [flow_attention, flow_attention_reference])
def test_bad_tensors_are_told(message: str, spoil, call) -> None:
    with pytest.raises(InputError, match=message):
        call(*spoil(*inputs(requires_grad=False)), VARIANTS["standard"])


@pytest.mark.parametrize("name", ["causal", "mobile"])
def test_unequal_lengths_are_told(name: str) -> None:
    with pytest.raises(InputError, match="5 tokens and k 4"):
        flow_attention(*inputs(sources=4, requires_grad=False), VARIANTS[name])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("feature map is 'tanh'", {"feature_map": "tanh"}),
        ("flow axis is 'width'", {"flow_axis": "width"}),
        ("expected low < high", {"clamp": (1.0, -1.0)}),
        ("eps is negative", {"eps": -1e-6}),
        ("a causal variant has clamp None", {"causal": True, "clamp": None}),
        ("at most 80 apart", {"causal": True, "clamp": (-50.0, 50.0)}),
        ("a causal variant sums over tokens", {"causal": True, "flow_axis": "heads"}),
    ],
)
def test_bad_variants_are_told(message: str, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=message):
        FlowVariant(**options)
