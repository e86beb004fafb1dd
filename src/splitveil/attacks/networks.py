"""The parts that learned attackers are made of."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

HEADS = 4


@dataclass(repr=False)
class Past:
    """Keys and values of earlier positions, for one block: (batch, heads, positions, width of a head) each."""

    keys: Tensor | None = None
    values: Tensor | None = None


class Block(nn.Module):
    """A pre-norm transformer block with rotary positions; it begins as the identity."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, text: Tensor | None = None, past: Past | None = None) -> Tensor:
        """``x`` (batch, position, width); ``text`` (batch, position) says where attention may look, all where None.

        With ``past``, ``x`` is the next positions after it, and ``past`` grows.
        """
        batch, positions, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, positions, 3, HEADS, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        first = 0 if past is None or past.keys is None else past.keys.shape[2]
        q, k = rotated(q, first), rotated(k, first)
        if past is not None:
            if past.keys is not None and past.values is not None:
                k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
            past.keys, past.values = k, v
        mask = None if text is None else text[:, None, None, :]
        seen = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None and positions > 1
        )
        x = x + self.out(seen.transpose(1, 2).reshape(batch, positions, width))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))  # type: ignore[no-any-return]


def rotated(x: Tensor, first: int) -> Tensor:
    """Rotary positions on (…, position, width of a head), counted from ``first`` (Su et al. 2021)."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(repr=False)
class Pasts:
    """One ``Past`` a block, for generation token by token."""

    blocks: list[Past] = field(default_factory=list)

    @classmethod
    def of(cls, blocks: nn.ModuleList) -> "Pasts":
        return cls([Past() for _ in blocks])

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order: what a beam search needs."""
        for past in self.blocks:
            if past.keys is not None and past.values is not None:
                past.keys, past.values = past.keys[rows], past.values[rows]
