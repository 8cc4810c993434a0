"""ONNX: one file that any runtime reads, the attention a function of standard operators."""

from flowexport.targets.onnx.target import TARGET, OnnxTarget

__all__ = ["TARGET", "OnnxTarget"]
