"""TensorRT: a serialised engine, built from the ONNX file.

The names are imported when asked for: the process that builds lives in this
package and holds no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowexport.targets.tensorrt.target import TARGET, TensorRTTarget

__all__ = ["TARGET", "TensorRTTarget"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from flowexport.targets.tensorrt import target

        return getattr(target, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
