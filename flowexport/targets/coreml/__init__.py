"""Core ML: coremltools converts anywhere, macOS runs."""

from flowexport.targets.coreml.target import TARGET

__all__ = ["TARGET"]
