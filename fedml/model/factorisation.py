# SPDX-License-Identifier: Apache-2.0
"""Matrix factorisation for recommendation (Koren, Bell, Volinsky 2009, equation 4)."""

import torch
from torch import Tensor, nn


class MatrixFactorisation(nn.Module):
    """``mean + user's bias + item's bias + user's taste . item's traits``.

    A federated run sends the whole of it, users' rows included. `examples/movielens` shares what is
    known of items only, and works out each user's taste where the ratings are.

    Args:
        users: How many.
        items: How many.
        width: Numbers that describe a taste.
    """

    def __init__(self, users: int = 943, items: int = 1682, width: int = 16) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.user_bias = nn.Embedding(users, 1)
        self.item_bias = nn.Embedding(items, 1)
        self.mean = nn.Parameter(torch.zeros(()))
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 2)`` int64 pairs of user and item to ``(N,)`` ratings."""
        user, item = x[:, 0], x[:, 1]
        match_ = (self.users(user) * self.items(item)).sum(dim=1)
        bias = self.user_bias(user) + self.item_bias(item)
        rating: Tensor = self.mean + bias.squeeze(1) + match_
        return rating
