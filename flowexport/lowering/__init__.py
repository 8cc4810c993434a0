"""torch.export of a model, and the passes that make its graph export-friendly."""

from flowexport.lowering.program import LoweredProgram, decompose, find_attentions, lower
from flowexport.lowering.specialise import require_static, specialise

__all__ = [
    "LoweredProgram",
    "decompose",
    "find_attentions",
    "lower",
    "require_static",
    "specialise",
]
