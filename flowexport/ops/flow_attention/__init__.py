"""Flow-Attention (Wu et al., ICML 2022): reference, torch operator and export-friendly forms.

Names are imported when asked for: the TensorRT plugin lives below and starts
in processes that hold no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowexport.ops.flow_attention.op import OP_NAME, flow_attention, op_arguments, variant_of
    from flowexport.ops.flow_attention.reference import flow_attention_reference
    from flowexport.ops.flow_attention.variant import VARIANTS, FlowVariant

__all__ = [
    "OP_NAME",
    "VARIANTS",
    "FlowVariant",
    "flow_attention",
    "flow_attention_reference",
    "op_arguments",
    "variant_of",
]

_PLACES = {"VARIANTS": "variant", "FlowVariant": "variant", "flow_attention_reference": "reference"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'op')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
