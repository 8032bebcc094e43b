# SPDX-License-Identifier: Apache-2.0
"""Multi-layer perceptron; as it stands the "2NN" of McMahan et al. 2017: 199,210 parameters."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class Perceptron(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        inputs: Numbers in one example, which is flattened.
        hidden: Width of each hidden layer.
        outputs: Classes, or 1 for regression.
    """

    def __init__(
        self, inputs: int = 784, hidden: Sequence[int] = (200, 200), outputs: int = 10
    ) -> None:
        super().__init__()
        widths = (inputs, *hidden, outputs)
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layers += [nn.Linear(into, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to ``(N, outputs)`` logits."""
        y: Tensor = self.layers(x.flatten(1))
        return y
