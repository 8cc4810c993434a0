"""flowexport: Flowformer models from PyTorch to phones, browsers and edge GPUs.

Importing this package imports no heavy dependency; the stages live in
:mod:`flowexport.pipeline`.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowexport.core.types import TensorSpec
    from flowexport.pipeline import Result, benchmark, convert, verify

__all__ = ["Result", "TensorSpec", "__version__", "benchmark", "convert", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from flowexport import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'flowexport' has no attribute {name!r}")
