"""The models that are converted and then damaged, and the recipe of each family."""

from __future__ import annotations

import streaming_tools
from streaming_tools import changed

MODEL = '''
"""Two blocks and two heads of one shape; the first is fitted, so that labels mean something.

The small one has one block and is as drawn: fitted heads enlarge what int8 rounds off.
"""

import numpy as np
import torch
from torch import nn

from flowexport.ops.flow_attention import VARIANTS
from flowexport_models import DATASETS
from flowexport_models.attention import FlowAttention

WIDTH, HEADS, CLASSES = 16, 2, 9


class Block(nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = FlowAttention(WIDTH, WIDTH, WIDTH, HEADS, VARIANTS[variant])
        self.expand = nn.Linear(WIDTH, 2 * WIDTH)
        self.shrink = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y)
        return x + self.shrink(nn.functional.gelu(self.expand(x)))


class Model(nn.Module):
    def __init__(self, deep):
        super().__init__()
        self.embed = nn.Linear(12, WIDTH)
        self.first = Block("standard")
        self.second = Block("timeseries") if deep else nn.Identity()
        self.logits = nn.Linear(WIDTH, CLASSES)
        self.other = nn.Linear(WIDTH, CLASSES)

    def pooled(self, x, padding_mask):
        hidden = self.second(self.first(self.embed(x))) * padding_mask.unsqueeze(-1)
        return hidden.sum(1) / padding_mask.sum(1, keepdim=True)

    def forward(self, x, padding_mask):
        pooled = self.pooled(x, padding_mask)
        return self.logits(pooled), torch.softmax(self.other(torch.relu(pooled)), dim=-1)


def build_small():
    return build(deep=False)


def build(deep=True):
    torch.manual_seed(7)
    model = Model(deep)
    if not deep:
        return model
    with torch.no_grad():
        for block in (model.first, model.second):
            for part in (block.attention.query_projection, block.attention.key_projection):
                part.weight *= 4  # logits of attention that the clamp and the sigmoids feel
            for parameter in (block.norm.weight, block.norm.bias):
                parameter += 0.1 * torch.randn_like(parameter)
        train = DATASETS["japanese-vowels-train"]()
        features = model.pooled(*(torch.from_numpy(train.inputs[n]) for n in ("x", "padding_mask")))
        ones = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
        wanted = torch.from_numpy(np.eye(CLASSES)[train.targets])
        fitted = torch.linalg.lstsq(ones, wanted, driver="gelsd").solution.float()
        model.logits.weight.copy_(fitted[:-1].T)
        model.logits.bias.copy_(fitted[-1])
    return model
'''

RECIPE = """schema: flowexport.recipe/1
name: mutants
model: mutant_model.py:build
inputs: {x: batchx29x12, padding_mask: batchx29}
outputs: [logits, other]
labels: [speaker 1, speaker 2, speaker 3, speaker 4, speaker 5,
  speaker 6, speaker 7, speaker 8, speaker 9]
preprocessing: {scale: 0.5, mean: [0.25]}
targets:
  onnx: {}
  tflite: {}
  coreml: {}
  tensorrt: {profiles: [{batch: [1, 1, 2]}], compute_capabilities: ["8.9"], check_rebuild: false}
evaluation: {dataset: japanese-vowels-test, limit: 48}
tolerances:
  fp32:
    max_rel: 2.0e-5
    min_cosine: 0.9999999
    min_sqnr_db: 90
    min_top1_agreement: 1.0
    max_accuracy_drop: 0.0
    min_prediction_agreement: 1.0
    reason: those of the shipped recipes (fp32 rounding of 6e-8 grows about tenfold)
fusions:
  onnx: {FlowAttention: 2}
bench: {warmup: 1, min_runs: 3, min_seconds: 0}
"""


_TARGETS = RECIPE[RECIPE.index("  onnx: {}") : RECIPE.index("evaluation")]
_LIMITS = RECIPE[RECIPE.index("  fp32:") : RECIPE.index("fusions")]
FAMILIES = {
    "plain": RECIPE,
    "int8": changed(
        RECIPE,
        ("mutant_model.py:build", "mutant_model.py:build_small"),
        (
            _TARGETS,
            "  onnx: {precision: int8-static}\n"
            "  tflite: {precision: int8-static}\n"
            "  coreml: {precision: int8-static}\n"
            "calibration: {dataset: japanese-vowels-train}\n",
        ),
        ("tolerances:\n" + _LIMITS, ""),
        ("FlowAttention: 2", "FlowAttention: 1"),
    ),
    # Weights alone in few bits.
    "narrow": changed(
        RECIPE,
        ("mutant_model.py:build", "mutant_model.py:build_small"),
        (
            _TARGETS,
            "  onnx: {precision: int8-weights}\n  tflite: {precision: int8-weights}\n"
            "  coreml: {precision: palette4}\n",
        ),
        ("tolerances:\n" + _LIMITS, ""),
        ("FlowAttention: 2", "FlowAttention: 1"),
    ),
    # Two lengths (functions of one file), each format in another precision; Core ML's classifier.
    "lengths": changed(
        RECIPE,
        ("mutant_model.py:build", "mutant_model.py:build_small"),
        ("batchx29x12", "batchxlengthx12"),
        ("batchx29}", "batchxlength}\nbuckets: {length: [16, 29]}"),
        (
            _TARGETS,
            "  onnx: {precision: int8-dynamic}\n  tflite: {precision: fp16}\n"
            "  coreml: {classifier: true}\n",
        ),
        ("tolerances:\n" + _LIMITS, ""),
        ("FlowAttention: 2", "FlowAttention: 1"),
    ),
    # Half precision, and a step whose state is a value.
    "stream": changed(
        streaming_tools.RECIPE,
        ("streaming: {lengths: [70]}", "streaming: true\nprecision: fp16"),
        ("  onnx: {}\n", "  onnx: {}\n  tflite: {}\n  coreml: {}\n"),
        ("  fp32: {max_rel: 1.0e-5, reason: two short layers in fp32; steps are promised to equal a"
         " forward}", "  fp16: {max_rel: 1.0e-2, reason: that of the shipped recipe}"),
    ),
}  # fmt: skip
