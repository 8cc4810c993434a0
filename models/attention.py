"""Flow-Attention layers with the authors' parameter names (Wu et al., ICML 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from flowexport.ops.flow_attention import VARIANTS, FlowVariant, flow_attention
from flowexport.ops.flow_attention.streaming import FlowState, step


class FlowAttention(nn.Module):
    """Flow-Attention between separate q/k/v/out projections (arXiv 2202.06258, section 3).

    State-dict names: ``{query,key,value,out}_projection.{weight,bias}``.

    Args:
        d_input: channels of the three inputs.
        d_model: channels of the projected queries, keys and values; a multiple of ``n_heads``.
        d_output: channels of the result.
        n_heads: H; each head is ``d_model / n_heads`` wide.
        variant: which published attention, e.g. ``VARIANTS["causal"]``.
    """

    def __init__(
        self,
        d_input: int,
        d_model: int,
        d_output: int,
        n_heads: int,
        variant: FlowVariant = VARIANTS["standard"],
    ) -> None:
        super().__init__()
        self.heads = (n_heads, d_model // n_heads)
        self.variant = variant
        self.query_projection = nn.Linear(d_input, d_model)
        self.key_projection = nn.Linear(d_input, d_model)
        self.value_projection = nn.Linear(d_input, d_model)
        self.out_projection = nn.Linear(d_model, d_output)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend: queries (B, L, d_input), keys and values (B, S, d_input) -> (B, L, d_output)."""
        q = self.query_projection(queries).unflatten(-1, self.heads)
        k = self.key_projection(keys).unflatten(-1, self.heads)
        v = self.value_projection(values).unflatten(-1, self.heads)
        return self.out_projection(flow_attention(q, k, v, self.variant).flatten(2))

    def step(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        """Attend from one step to those before it: (B, d_input) -> (B, d_output), next state."""
        q = self.query_projection(x).unflatten(-1, self.heads)
        k = self.key_projection(x).unflatten(-1, self.heads)
        v = self.value_projection(x).unflatten(-1, self.heads)
        result, state = step(q, k, v, state, self.variant)
        return self.out_projection(result.flatten(1)), state


class FusedFlowAttention(nn.Module):
    """Flow-Attention of a sequence with itself, q, k and v from one Linear (the vision code).

    State-dict names: ``{qkv,proj}.{weight,bias}``.

    Args:
        dim: channels of input and result; a multiple of ``n_heads``.
        n_heads: H; each head is ``dim / n_heads`` wide.
        variant: which published attention.
    """

    def __init__(self, dim: int, n_heads: int, variant: FlowVariant = VARIANTS["vision"]) -> None:
        super().__init__()
        self.heads = (n_heads, dim // n_heads)
        self.variant = variant
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, N, dim) -> (B, N, dim)."""
        # Chunks, then heads: every tensor keeps rank <= 4.
        q, k, v = (part.unflatten(-1, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(flow_attention(q, k, v, self.variant).flatten(2))
