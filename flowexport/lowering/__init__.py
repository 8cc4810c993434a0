"""torch.export of a model, and the passes that make its graph export-friendly."""

from flowexport.lowering.program import LoweredProgram, decompose, find_attentions, lower
from flowexport.lowering.specialise import require_static, specialise
from flowexport.lowering.streaming import StreamingModule, check_streaming, lower_streaming

__all__ = [
    "LoweredProgram",
    "StreamingModule",
    "check_streaming",
    "decompose",
    "find_attentions",
    "lower",
    "lower_streaming",
    "require_static",
    "specialise",
]
