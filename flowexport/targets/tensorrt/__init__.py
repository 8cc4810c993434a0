"""TensorRT: a serialised engine, built from the ONNX file."""

from flowexport.targets.tensorrt.target import TARGET, TensorRTTarget

__all__ = ["TARGET", "TensorRTTarget"]
