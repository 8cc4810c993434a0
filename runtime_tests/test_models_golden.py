"""The models compute what the authors' code computes, and export with one node per attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flowexport_models import FAMILIES, MODELS, build_model, build_spec
from safetensors.torch import load_file

from flowexport.core.errors import FlowExportError, InputError, UnknownNameError
from flowexport.core.types import Precision
from flowexport.lowering import lower
from flowexport.ops.flow_attention.lowered import DESCRIPTOR

GOLDEN = Path(__file__).parent / "golden"
# Relative to the largest output; the authors' own float32 error reaches 4e-7.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

TIME_SERIES = {
    "feat_dim": 12,
    "max_len": 29,
    "d_model": 64,
    "n_heads": 8,
    "num_layers": 2,
    "d_ff": 48,
    "num_classes": 9,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "flowformer_vision": (
        "flowformer-vision",
        {
            "img_size": 64,
            "embed_dim": [24, 48, 96, 192],
            "depth": [1, 1, 2, 1],
            "mlp_ratio": [4, 4, 4, 4],
            "num_classes": 10,
        },
    ),
    "flowformer_vision_96": (
        "flowformer-vision",
        {
            "img_size": 96,
            "embed_dim": [24, 36, 48, 60],
            "depth": [1, 1, 1, 1],
            "mlp_ratio": [2, 2, 2, 2],
            "num_classes": 7,
        },
    ),
    "flowformer_timeseries_learnable": (
        "flowformer-timeseries",
        {**TIME_SERIES, "pos_encoding": "learnable", "activation": "gelu"},
    ),
    "flowformer_timeseries_fixed": (
        "flowformer-timeseries",
        {**TIME_SERIES, "pos_encoding": "fixed", "activation": "relu"},
    ),
    "flowformer_gpt_nano": (
        "flowformer-gpt",
        {"vocab_size": 65, "block_size": 64, "n_layer": 3, "n_head": 3, "n_embd": 48},
    ),
}


def read(case: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    data = load_file(GOLDEN / f"{case}.safetensors")
    weights = {k.removeprefix("weight:"): v for k, v in data.items() if k.startswith("weight:")}
    inputs = [data[k] for k in ("input:x", "input:padding_masks", "input:idx") if k in data]
    return weights, inputs, data["output"]


def error(module: torch.nn.Module, inputs: list[torch.Tensor], expected: torch.Tensor) -> float:
    with torch.no_grad():
        actual = module(*inputs)
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, dtype: torch.dtype) -> None:
    family, config = CASES[case]
    weights, inputs, expected = read(case)
    module = build_model(family, **config).eval()
    assert {k: v.shape for k, v in module.state_dict().items()} == {
        k: v.shape for k, v in weights.items()
    }
    module.load_state_dict(weights)
    module.to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    assert error(module, inputs, expected) <= TOLERANCE[dtype]
    if len(inputs) == 2:
        assert inputs[1].dtype is torch.bool
        assert error(module, [inputs[0], inputs[1].to(dtype)], expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("flowformer_vision", {"num_heads": 6}),
        ("flowformer_vision", {"clamp": [-5, 5]}),
        ("flowformer_timeseries_fixed", {"clamp": [-1, 1]}),
        ("flowformer_gpt_nano", {"clamp": [-5, 5]}),
        ("flowformer_timeseries_fixed", {"activation": "gelu"}),
    ],
)
def test_golden_sees_a_wrong_configuration(case: str, wrong: dict[str, Any]) -> None:
    family, config = CASES[case]
    weights, inputs, expected = read(case)
    module = build_model(family, **{**config, **wrong}).eval()
    module.load_state_dict(weights)
    module.double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    assert error(module, inputs, expected) > 1e-6


def test_padding_is_zeroed_in_the_head_only() -> None:
    weights, inputs, _ = read("flowformer_timeseries_fixed")
    module = build_model(
        *CASES["flowformer_timeseries_fixed"][:1], **CASES["flowformer_timeseries_fixed"][1]
    ).eval()
    module.load_state_dict(weights)
    with torch.no_grad():
        nothing = module(inputs[0], torch.zeros_like(inputs[1]))
    torch.testing.assert_close(nothing, module.output_layer.bias.expand_as(nothing))


def test_imagenet_model_has_the_papers_size() -> None:
    with torch.device("meta"):
        module = MODELS["flowformer-vision-224"].build()
    count = sum(p.numel() for p in module.parameters())
    assert round(count / 1e6, 1) == 43.3
    assert [blocks[0].attn.heads for blocks in module.blocks] == [
        (12, 8),
        (12, 16),
        (12, 32),
        (12, 64),
    ]
    assert module.pos_embed.shape == (1, 3136, 96)


@pytest.mark.parametrize("name", MODELS)
def test_named_spec_fits_its_module(name: str) -> None:
    spec = MODELS[name]
    with torch.device("meta"):
        module = spec.build()
    assert spec.inputs == module.config.inputs()
    if spec.labels:
        assert len(spec.labels) == module.config.num_classes
    assert (spec.weights is None) == (spec.dataset is None)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    ("name", "sites"),
    [("flowformer-vision-digits", 4), ("flowformer-timeseries-japanese-vowels", 3)],
)
def test_exports_with_dynamic_batch(name: str, sites: int, precision: Precision) -> None:
    spec = MODELS[name]
    torch.manual_seed(0)
    module = spec.build().eval()
    inputs = [torch.rand(s.static(batch=3).shape) for s in spec.inputs]
    with torch.no_grad():
        expected = module(*inputs)
    program = lower(
        module, spec.inputs, spec.output_names, name=name, ops=[DESCRIPTOR], precision=precision
    )
    assert len(program.attentions) == sites
    assert {a.q_shape[0] for a in program.attentions} == {"batch"}
    assert program.outputs[0].shape[0] == "batch"
    assert program.outputs[0].dtype == "float32"
    for batch in (3, 1):
        with torch.no_grad():
            actual = program.exported.module()(*(x[:batch] for x in inputs))
        # Half precision keeps 11 bits; some tens of operations follow each other.
        bound = 1e-5 if precision is Precision.FP32 else 2e-2
        assert (actual - expected[:batch]).abs().max() <= bound * expected.abs().max()


def test_no_tensor_of_an_exported_model_has_rank_above_four() -> None:
    for name in ("flowformer-vision-digits", "flowformer-timeseries-japanese-vowels"):
        spec = MODELS[name]
        program = lower(spec.build(), spec.inputs, spec.output_names, name=name, ops=[DESCRIPTOR])
        ranks = [
            n.meta["val"].dim()
            for n in program.exported.graph.nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        ]
        assert ranks and max(ranks) <= 4


def test_gpt_sizes_are_the_authors() -> None:
    from flowexport_models.flowformer_gpt import SIZES, flowformer_gpt

    with torch.device("meta"):
        models = {name: flowformer_gpt(name) for name in SIZES}
    # Without the head, as flowformergpt prints it; GPT-2's 124 M has one q/k/v Linear instead.
    count = sum(p.numel() for p in models["gpt2"].transformer.parameters())
    assert round(count / 1e6) == 124
    assert models["gpt-nano"].config.n_embd == 48
    with pytest.raises(UnknownNameError, match="gpt-nano"):
        flowformer_gpt("gpt-nan")


def test_gpt_is_causal_and_refuses_longer_sequences() -> None:
    family, config = CASES["flowformer_gpt_nano"]
    module = build_model(family, **config).eval()
    idx = torch.randint(0, 65, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = idx.clone()
    changed[0, 12:] = (idx[0, 12:] + 1) % 65
    with torch.no_grad():
        a, b = module(idx), module(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a[:, 12:], b[:, 12:])
    with pytest.raises(InputError, match="idx has 65 tokens; expected at most 64"):
        module(torch.zeros(1, 65, dtype=torch.int64))


def test_gpt_exports_with_dynamic_batch_and_length() -> None:
    family, config = CASES["flowformer_gpt_nano"]
    module = build_model(family, **config).eval()
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", max=64)
    exported = torch.export.export(
        module, (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=({0: batch, 1: length},)
    )
    idx = torch.randint(0, 65, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(idx), module(idx))


def test_recipe_sizes_make_their_own_inputs() -> None:
    spec = build_spec("flowformer-timeseries", feat_dim=3, max_len=10, num_classes=2, d_model=16)
    assert [s.shape for s in spec.inputs] == [("batch", 10, 3), ("batch", 10)]
    module = spec.build().eval()
    assert module(torch.rand(2, 10, 3), torch.ones(2, 10)).shape == (2, 2)


@pytest.mark.parametrize(
    ("family", "config", "kind", "words"),
    [
        ("flowformer-visio", {}, UnknownNameError, ["flowformer-visio", *FAMILIES, "did you mean"]),
        ("flowformer-vision", {"image_size": 64}, UnknownNameError, ["image_size", "img_size"]),
        ("flowformer-vision", {"img_size": 100}, InputError, ["img_size is 100", "multiple of 32"]),
        ("flowformer-vision", {"img_size": "224"}, InputError, ["img_size is '224'"]),
        ("flowformer-vision", {"num_heads": 7}, InputError, ["embed_dim is 96 with 7 heads"]),
        ("flowformer-vision", {"num_heads": 0}, InputError, ["num_heads is 0"]),
        ("flowformer-vision", {"num_heads": [12, 12]}, InputError, ["num_heads", "list of 4"]),
        ("flowformer-vision", {"depth": [1, 1]}, InputError, ["depth is [1, 1]", "list of 4"]),
        ("flowformer-vision", {"embed_dim": 96}, InputError, ["embed_dim is 96"]),
        ("flowformer-vision", {"clamp": [1, -1]}, InputError, ["clamp", "low < high"]),
        ("flowformer-timeseries", {"feat_dim": 3}, InputError, ["lacks max_len, num_classes"]),
        (
            "flowformer-timeseries",
            {**TIME_SERIES, "pos_encoding": "rotary"},
            InputError,
            ["pos_encoding is 'rotary'", "learnable, fixed"],
        ),
        (
            "flowformer-timeseries",
            {**TIME_SERIES, "dropout": 1.5},
            InputError,
            ["dropout is 1.5"],
        ),
    ],
)
def test_bad_configuration_is_named(
    family: str, config: dict[str, Any], kind: type[FlowExportError], words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        build_model(family, **config)
    for word in words:
        assert word in str(caught.value)
