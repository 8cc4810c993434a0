"""Flow-Attention (Wu et al., ICML 2022): reference, torch operator and export-friendly forms."""

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
