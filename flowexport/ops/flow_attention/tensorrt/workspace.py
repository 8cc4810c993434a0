"""The kernel's scratch memory, for builders that have no compiled kernel to ask.

The same arithmetic as ``most_segments`` and ``lay_out`` in ``cuda/launch.cu``;
a test compares the two.
"""

from __future__ import annotations

from flowexport.ops.flow_attention.tensorrt.kernel import Problem

_WANTED_BLOCKS = 528
_LONGEST_SEGMENT = 4096


def workspace_bytes(p: Problem) -> int:
    """Return the bytes that are enough for this problem and for every smaller one."""
    width = 8
    while width < max(p.width, p.value_width):
        width *= 2
    pairs = p.batch * p.heads
    tokens = max(p.sinks, p.sources)
    if p.splits > 0:
        segments = pairs * p.splits
    else:
        segments = max(pairs * -(-tokens // _LONGEST_SEGMENT), _WANTED_BLOCKS - 1 + pairs)
    floats: list[int] = [segments * width * width, segments, segments]
    if not p.causal:
        floats.append(pairs * width * width)
    if not p.flow_over_heads:
        floats += [segments * width] * 4
    if p.causal or p.flow_over_heads:
        floats.append(pairs * p.sinks)
    if p.causal or p.flow_over_heads or p.competition_over_heads:
        floats.append(pairs * p.sources)
    if p.causal:
        floats += [pairs * p.sinks] * 2
    return sum(-(-count // 64) * 256 for count in floats)
