"""torch.export of a model, and the passes that make its graph export-friendly."""

from flowexport.lowering.ends import add_probabilities, divide_input
from flowexport.lowering.lengths import forward_name, lower_buckets
from flowexport.lowering.passes.image_like import image_like
from flowexport.lowering.program import LoweredProgram, decompose, find_attentions, lower
from flowexport.lowering.specialise import check_static, specialise
from flowexport.lowering.streaming import StreamingModule, check_streaming, lower_streaming

__all__ = [
    "LoweredProgram",
    "StreamingModule",
    "add_probabilities",
    "check_static",
    "check_streaming",
    "decompose",
    "divide_input",
    "find_attentions",
    "forward_name",
    "image_like",
    "lower",
    "lower_buckets",
    "lower_streaming",
    "specialise",
]
