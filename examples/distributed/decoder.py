"""A language model of the usual kind in plain torch, from its sizes alone: what the scripts of this folder train and count."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder; ``kv_heads`` is smaller than ``heads`` with grouped-query attention."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


class Block(nn.Module):
    """Causal attention and a gated feed-forward network, each after a normalisation and added to its input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        head = sizes.width // sizes.heads
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        self.attention_norm, self.hidden_norm = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.query = nn.Linear(sizes.width, sizes.width, bias=False)
        self.key = nn.Linear(sizes.width, sizes.kv_heads * head, bias=False)
        self.value = nn.Linear(sizes.width, sizes.kv_heads * head, bias=False)
        self.output = nn.Linear(sizes.width, sizes.width, bias=False)
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, length, width)`` to the same shape."""
        normed = self.attention_norm(x)
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (each.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for each in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        normed = self.hidden_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocabulary)``. Positions are left out: this is about memory."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        if sizes.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits of the next token at each position."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def on_meta(sizes: Sizes, dtype: torch.dtype) -> Decoder:
    """The model without memory for its numbers."""
    with torch.device("meta"):
        return Decoder(sizes).to(dtype)
