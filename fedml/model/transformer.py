# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer, GPT-2's layout (Radford et al. 2019) at a size for one small machine.

At GPT-2's sizes it has GPT-2's 124,439,808 parameters.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor, nn


class _Block(nn.Module):
    """Attention to earlier places, then a wide layer; each normalised before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = self.attend(self.norm1(x)).view(batch, length, 3, self._heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).reshape(batch, length, width))
        wide = F.gelu(self.widen(self.norm2(x)), approximate="tanh")
        y: Tensor = x + self.narrow(wide)
        return y


class Transformer(nn.Module):
    """Predicts every next symbol from all before it.

    Args:
        symbols: Size of the alphabet or vocabulary.
        length: Longest text, in symbols.
        width: Numbers that stand for one place; a multiple of ``heads``.
        heads: Attention heads of every layer.
        layers: How many.
    """

    def __init__(
        self,
        symbols: int = 97,
        length: int = 128,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Layers that write into the running sum start smaller, so that it keeps its size.
                deep = name.endswith(("join.weight", "narrow.weight"))
                spread = 0.02 / math.sqrt(2 * layers) if deep else 0.02
                nn.init.normal_(parameter, std=spread)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, length)`` int64 symbols to ``(N, symbols, length)`` logits.

        The classes come second, as `torch.nn.functional.cross_entropy` wants them.

        Raises:
            ValueError: The text is longer than the model.
        """
        if x.shape[1] > self.place.num_embeddings:
            raise ValueError(
                f"{x.shape[1]} symbols are too many: the model takes {self.place.num_embeddings}"
            )
        place = torch.arange(x.shape[1], device=x.device)
        y = self.norm(self.blocks(self.symbol(x) + self.place(place)))
        # The table that reads symbols in also reads them out (Press and Wolf 2017).
        return F.linear(y, self.symbol.weight).transpose(1, 2)
