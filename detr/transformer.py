"""Encoder and decoder of DETR (paper, section A.3), batches first.

Key masks are bool [B, 1, 1, K], true where a token may be attended to, or None when nothing is padded.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.attention import MultiheadAttention
from detr.memory import run


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward; the position is added to queries and keys, not to values."""

    def __init__(self, dim: int, heads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, src: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        """src and pos [B, N, D] -> [B, N, D]."""
        if self.pre_norm:
            x = self.norm1(src)
            src = src + self.dropout(self.self_attn(x + pos, x + pos, x, mask))
            return src + self.dropout(self._feed_forward(self.norm2(src)))
        src = self.norm1(src + self.dropout(self.self_attn(src + pos, src + pos, src, mask)))
        return self.norm2(src + self.dropout(self._feed_forward(src)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.linear1(x).relu()))


class TransformerEncoder(nn.Module):
    recompute = False  # see detr.memory

    def __init__(self, layers: int, dim: int, heads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, heads, dim_feedforward, dropout, pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim) if pre_norm else None

    def forward(self, src: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        """src and pos [B, N, D] -> memory [B, N, D]."""
        for layer in self.layers:
            src = run(self, layer, src, pos, mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward.

    The query position is added to queries and keys of the self-attention and to queries of the
    cross-attention; the feature position to keys of the cross-attention; neither to values.
    """

    def __init__(self, dim: int, heads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.multihead_attn = MultiheadAttention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, tgt: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        """tgt and query_pos [B, Q, D], memory and pos [B, N, D] -> [B, Q, D]."""
        if self.pre_norm:
            x = self.norm1(tgt)
            tgt = tgt + self.dropout(self.self_attn(x + query_pos, x + query_pos, x))
            x = self.norm2(tgt)
            tgt = tgt + self.dropout(self.multihead_attn(x + query_pos, memory + pos, memory, mask))
            return tgt + self.dropout(self._feed_forward(self.norm3(tgt)))
        tgt = self.norm1(tgt + self.dropout(self.self_attn(tgt + query_pos, tgt + query_pos, tgt)))
        tgt = self.norm2(tgt + self.dropout(self.multihead_attn(tgt + query_pos, memory + pos, memory, mask)))
        return self.norm3(tgt + self.dropout(self._feed_forward(tgt)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.linear1(x).relu()))


class TransformerDecoder(nn.Module):
    recompute = False  # see detr.memory

    def __init__(self, layers: int, dim: int, heads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(dim, heads, dim_feedforward, dropout, pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, query_pos: Tensor, memory: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        """query_pos [B, Q, D], memory and pos [B, N, D] -> the normalised output of every layer [L, B, Q, D].

        The shared norm is applied to what is returned; the next layer gets the raw output.
        """
        tgt = torch.zeros_like(query_pos)
        outputs = []
        for layer in self.layers:
            tgt = run(self, layer, tgt, query_pos, memory, pos, mask)
            outputs.append(self.norm(tgt))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """DETR's encoder and decoder over learned queries; without decoder layers it is the encoder alone."""

    def __init__(
        self, dim: int, heads: int, enc_layers: int, dec_layers: int, dim_feedforward: int,
        dropout: float, pre_norm: bool,
    ):  # fmt: skip
        super().__init__()
        self.encoder = TransformerEncoder(enc_layers, dim, heads, dim_feedforward, dropout, pre_norm)
        if dec_layers:
            self.decoder = TransformerDecoder(dec_layers, dim, heads, dim_feedforward, dropout, pre_norm)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, pos: Tensor, mask: Tensor | None, query_embed: Tensor) -> Tensor:
        """src and pos [B, N, D], query_embed [Q, D] -> [L, B, Q, D]."""
        return self.decode(self.encoder(src, pos, mask), pos, mask, query_embed)

    def decode(self, memory: Tensor, pos: Tensor, mask: Tensor | None, query_embed: Tensor) -> Tensor:
        """memory and pos [B, N, D], query_embed [Q, D] -> [L, B, Q, D]."""
        query_pos = query_embed.expand(memory.shape[0], -1, -1)
        return self.decoder(query_pos, memory, pos, mask)
