"""Every form against the reference: all variants, shapes, value ranges, golden vectors."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from attention_golden import CASES, golden_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowexport.core.errors import InputError
from flowexport.ops.flow_attention import (
    VARIANTS,
    FlowVariant,
    causal,
    flow_attention_reference,
    op_arguments,
)
from flowexport.ops.flow_attention.causal import causal_chunked, exclusive_prefix
from flowexport.ops.flow_attention.causal_half import causal_means
from flowexport.ops.flow_attention.half import chunks
from flowexport.ops.flow_attention.lowered import FORMS, STATIC_LENGTH, applicable, attention_of
from flowexport.ops.segments import loops, over_segments

# Beside the published variants: a clamp so wide that exp needs the maximum, and a causal one.
ALL = {
    **VARIANTS,
    "wide": FlowVariant(clamp=(-40.0, 40.0)),
    "causal-wide": FlowVariant(clamp=(-40.0, 40.0), causal=True),
    "causal-outer": FlowVariant(causal=True, outer_eps=1e-6),
}
PAIRS = [
    (name, form)
    for name, v in ALL.items()
    for form in applicable(v)
    if form not in ("published", "channel_first_projected")  # the latter is channel_first
]
# The order of sums in fp64; the worst seen is 4e-15.
EXACT = 1e-12


def inputs(
    batch: int, sinks: int, sources: int, heads: int, width: int, value_width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, sinks, heads, width), (batch, sources, heads, width)]
    shapes.append((batch, sources, heads, value_width))
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return q, k, v


RANGES = {
    "normal": lambda x: x,
    "zeros": torch.zeros_like,
    "saturated": lambda x: x + 30,
    "cold": lambda x: x - 12,
    "mixed": lambda x: x * 8,
    "huge": lambda x: x * 300,
}


def error(form: str, q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant) -> float:
    """Return the form's largest error over the reference's largest value."""
    truth = flow_attention_reference(q, k, v, variant)
    result = attention_of(form)(q, k, v, *op_arguments(variant))
    assert result.shape == truth.shape and result.dtype == truth.dtype
    if not truth.numel():
        return 0.0
    assert truth.isfinite().all()
    return ((result - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize(("name", "form"), PAIRS)
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_form_equals_the_reference(name: str, form: str, data: st.DataObject) -> None:
    variant = ALL[name]
    lengths = st.sampled_from([1, 2, 5, 17, 63, 64, 65, 67, 100, 131, 192])
    sources = data.draw(lengths, "S")
    tied = variant.causal or variant.flow_axis == "heads"
    sinks = sources if tied else data.draw(lengths, "L")
    q, k, v = inputs(
        data.draw(st.integers(0, 3), "B"),
        sinks,
        sources,
        data.draw(st.integers(1, 4), "H"),
        data.draw(st.integers(1, 9), "D"),
        data.draw(st.integers(1, 9), "M"),
        data.draw(st.integers(0, 99), "seed"),
    )
    q = RANGES[data.draw(st.sampled_from(sorted(RANGES)), "q")](q)
    k = RANGES[data.draw(st.sampled_from(sorted(RANGES)), "k")](k)
    assert error(form, q, k, v, variant) <= EXACT


@pytest.mark.parametrize(
    ("case", "form"), [(c, f) for c, v in CASES.items() for f in applicable(VARIANTS[v])]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_form_reproduces_the_golden_vectors(
    case: str, form: str, dtype: torch.dtype, bound: float
) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, variant: FlowVariant) -> Tensor:
        return attention_of(form)(q, k, v, *op_arguments(variant))

    assert golden_error(case, attention, dtype) <= bound


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_ranks_stay_at_four(name: str, form: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    ranks = []

    class Ranks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                ranks.append(result.dim())
            return result

    q, k, v = (x.float() for x in inputs(1, 192, 192, 2, 4, 4, 0))
    with Ranks():
        attention_of(form)(q, k, v, *op_arguments(ALL[name]))
    assert ranks and max(ranks) <= 4


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_no_bare_reciprocal(name: str, form: str) -> None:
    """coremltools 9.0 turns 1.0 / x into inverse with epsilon 1e-4."""

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_of(form)(q, k, v, *op_arguments(ALL[name]))

    exported = torch.export.export(Module(), inputs(1, 192, 192, 2, 4, 4, 0))
    targets = {str(n.target) for n in exported.graph.nodes}
    assert not [t for t in targets if "reciprocal" in t or "rdiv" in t]
    for node in exported.graph.nodes:
        if "div" in str(node.target):
            assert isinstance(node.args[0], torch.fx.Node)


KINDS = ("vision", "timeseries", "lra", "mobile", "causal")
DYNAMIC = [(n, f) for n, f in PAIRS if f not in STATIC_LENGTH and n in KINDS]


@pytest.mark.parametrize(("name", "form"), DYNAMIC)
def test_dynamic_length_and_batch_stay_dynamic(name: str, form: str) -> None:
    variant = ALL[name]

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_of(form)(q, k, v, *op_arguments(variant))

    batch = torch.export.Dim("batch", min=1, max=8)
    sinks = torch.export.Dim("sinks", min=1, max=4096)
    tied = variant.causal or variant.flow_axis == "heads"
    sources = sinks if tied else torch.export.Dim("sources", min=1, max=4096)
    exported = torch.export.export(
        Module(),
        inputs(2, 12, 12 if tied else 10, 2, 4, 3, 0),
        dynamic_shapes=({0: batch, 1: sinks}, {0: batch, 1: sources}, {0: batch, 1: sources}),
    )
    assert not [n for n in exported.graph.nodes if "sym_float" in str(n.target)]
    q, k, v = inputs(3, 29, 29 if tied else 41, 2, 4, 3, 1)
    truth = flow_attention_reference(q, k, v, variant)
    torch.testing.assert_close(exported.module()(q, k, v), truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "published"])
def test_form_refuses_a_variant_that_it_does_not_compute(form: str) -> None:
    variant = VARIANTS["standard" if form.startswith("causal_") else "causal"]
    with pytest.raises(InputError, match=f"form {form.removesuffix('_projected')} has a"):
        attention_of(form)(*inputs(1, 4, 4, 1, 2, 2, 0), *op_arguments(variant))


@pytest.mark.parametrize("form", FORMS)
def test_bad_shapes_are_told(form: str) -> None:
    variant = VARIANTS["causal" if form.startswith("causal_") else "standard"]
    q, k, v = inputs(1, 4, 4, 1, 2, 2, 0)
    with pytest.raises(InputError, match="k has 4 tokens and v 3"):
        attention_of(form)(q, k, v[:, :3], *op_arguments(variant))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
def test_prefix_over_chunks_in_two_levels(count: int) -> None:
    x = torch.randn(2, count, 3, 2, dtype=torch.float64)
    truth = x.cumsum(1) - x
    torch.testing.assert_close(exclusive_prefix(x), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, v in ALL.items() if v.causal])
@pytest.mark.parametrize(("length", "segments"), [(128, 1), (192, 2), (300, 3), (385, 4)])
def test_segments_equal_the_reference(
    name: str, length: int, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "SEGMENT", 2)
    sizes = []

    def counted(step, carry, tokens, size):  # type: ignore[no-untyped-def]
        sizes.append(tokens[0].shape[1] // size)
        return over_segments(step, carry, tokens, size)

    monkeypatch.setattr(causal, "over_segments", counted)
    for at, shape in RANGES.items():
        q, k, v = inputs(2, length, length, 3, 4, 6, 5)
        q, k = shape(q), shape(k)
        assert error("causal_scan", q, k, v, ALL[name]) <= EXACT, at
    assert set(sizes) == ({segments} if segments > 1 else set())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_takes_the_same_segments(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(body, carry, stacked):  # type: ignore[no-untyped-def]
        results = []
        for own in zip(*stacked, strict=True):
            carry, result = body(carry, own)
            results.append(result)
        return carry, torch.stack(results)

    monkeypatch.setattr(importlib.import_module("torch._higher_order_ops.scan"), "scan", scan)
    monkeypatch.setattr(causal, "SEGMENT", 1)
    q, k, v = inputs(batch, 150, 150, 2, 3, 4, 7)
    with loops():
        assert error("causal_scan", q, k, v, ALL["causal-wide"]) <= EXACT


def test_long_causal_sequence_takes_two_levels() -> None:
    variant = replace(VARIANTS["causal"])
    q, k, v = inputs(1, 4500, 4500, 1, 2, 2, 0)
    assert error("causal_chunked", q, k, v, variant) <= EXACT
    assert error("causal_means", q, k, v, variant) <= EXACT
    for form in (causal_chunked, causal_means):
        assert form(q, k, v, *op_arguments(variant)).shape == (1, 4500, 1, 2)


@pytest.mark.parametrize("size", [1, 49, 64, 65, 97, 196, 784, 3136, 4099, 16384, 65536, 65537])
def test_chunks_cover_every_token_once(size: int) -> None:
    runs = chunks(size)
    assert sum(count * length for _, count, length in runs) == size
    assert all(length <= 1024 and count <= 1024 for _, count, length in runs)
    assert [start for start, *_ in runs] == [0, *(c * n for _, c, n in runs[:-1])]
