"""TFLite (LiteRT): litert-torch converts, ai-edge-litert runs."""

from flowexport.targets.tflite.target import TARGET

__all__ = ["TARGET"]
