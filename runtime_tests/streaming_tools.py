"""A tiny causal model and its recipe."""

from __future__ import annotations

from pathlib import Path

RECIPE = """schema: flowexport.recipe/1
name: tiny-stream
model:
  family: flowformer-causal-timeseries
  config: {feat_dim: 3, max_len: 8, num_classes: 3, d_model: 8, n_heads: 2, num_layers: 1, d_ff: 8}
weights: {random: 0}
streaming: {lengths: [70]}
targets:
  onnx: {}
tolerances:
  fp32: {max_rel: 1.0e-5, reason: two short layers in fp32; steps are promised to equal a forward}
fusions:
  onnx: {FlowAttention: 1}
bench: {warmup: 1, min_runs: 3, min_seconds: 0}
"""


def changed(text: str, *changes: tuple[str, str]) -> str:
    """Return a recipe with some of its text replaced, which must be in it."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def write_recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    """Write the recipe with some of its text replaced; return its path."""
    path = folder / "tiny-stream.yaml"
    path.write_text(changed(RECIPE, *changes))
    return path
