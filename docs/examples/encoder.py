"""A small transformer encoder with rotary positions, for the gallery's scripts on text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / root mean square of x: no gain, no bias, nothing to learn."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return x scaled, (n, length, width)."""
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class ConditionalNorm(nn.Module):
    """LayerNorm whose gain and bias depend on a number that comes with the text, here the subtask."""

    def __init__(self, width: int, conditions: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Embedding(conditions, width), nn.Embedding(conditions, width)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return x normalised, (n, length, width), for one condition, a scalar tensor."""
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.gain(condition) + self.bias(condition)


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of dimensions by an angle that grows with the position, (n, heads, length, width); Su et al. 2021."""
    length, width = x.shape[-2:]
    frequencies = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * frequencies
    first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
    return torch.stack(turned, -1).flatten(-2)


class Layer(nn.Module):
    """Attention and a feed-forward part, each added to its input times a scale and normalised afterwards; no biases."""

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norms = nn.ModuleList([norm(width), norm(width)])

    def forward(self, x: Tensor, mask: Tensor, condition: Tensor | None, scale: float) -> Tensor:
        """Return the next x, (n, length, width)."""
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(rotated(queries), rotated(keys), values, attn_mask=mask)
        x = self.norms[0](x + scale * self.out(mixed.transpose(1, 2).flatten(2)), condition)
        return self.norms[1](x + scale * self.down(nn.functional.gelu(self.up(x))), condition)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Characters in, one vector each out. `scale` multiplies what every layer adds (RoFormerV2 lets it rise from 0)."""

    def __init__(
        self, characters: int, width: int = 64, layers: int = 2, norm: Callable[[int], nn.Module] = RMSNorm
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.first = norm(width)
        self.layers = nn.ModuleList([Layer(width, width // 16, norm) for _ in range(layers)])

    def forward(self, ids: Tensor, condition: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return shape (n, length, width) for ids of shape (n, length), 0 where there is nothing."""
        mask = (ids > 0)[:, None, None, :]
        x = self.first(self.embed(ids), condition)
        for layer in self.layers:
            x = layer(x, mask, condition, scale)
        return x


def pooled(vectors: Tensor, ids: Tensor) -> Tensor:
    """Return the mean over what is there, (n, width)."""
    there = (ids > 0).unsqueeze(-1).to(vectors.dtype)
    return (vectors * there).sum(1) / there.sum(1)
