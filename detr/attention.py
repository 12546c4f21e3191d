"""Multi-head attention over PyTorch's fused kernel, with the weights packed as in official checkpoints."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Attention with query, key and value projected by one packed matrix [3 * dim, dim].

    Its state dict is that of torch.nn.MultiheadAttention; batches come first.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return [
            split_heads(F.linear(x, w, b), self.heads)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [B, Q, D], key and value [B, K, D] -> [B, Q, D].

        mask: bool, true where attention is allowed, broadcastable to [B, heads, Q, K]; none allows all.
        """
        q, k, v = self._project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)))

    def explicit(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` written out, without dropout: its output and the attention weights [B, heads, Q, K].

        The slow path, for pictures; float32 or more from the projections to the weighted values.
        """
        q, k, v = self._project(query, key, value)
        scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            score = q @ k.transpose(-1, -2) * scale
            if mask is not None:
                score = score.masked_fill(~mask, float("-inf"))
            weights = score.softmax(-1)
            x = weights @ v
        return self.out_proj(merge_heads(x).to(query.dtype)), weights


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, D / heads] -> [B, N, D]."""
    return x.transpose(1, 2).flatten(2)
