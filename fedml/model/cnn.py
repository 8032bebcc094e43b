# SPDX-License-Identifier: Apache-2.0
"""The convolutional network of the FedAvg paper (McMahan et al. 2017): 1,663,370 parameters."""

from torch import Tensor, nn


class FedAvgCNN(nn.Module):
    """Two 5x5 convolutions (32 and 64 channels) with 2x2 pooling, 512 units, softmax.

    "Same" padding is what the published number of parameters needs: 28 -> 14 -> 7, and
    7 * 7 * 64 * 512 weights between.

    Args:
        channels: Of the image.
        side: Its height and width, a multiple of 4.
        classes: Outputs.
    """

    def __init__(self, channels: int = 1, side: int = 28, classes: int = 10) -> None:
        super().__init__()
        if side < 4 or side % 4:
            raise ValueError(f"side must be a multiple of 4, got {side}")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Linear(64 * (side // 4) ** 2, 512), nn.ReLU(), nn.Linear(512, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, side, side)`` to ``(N, classes)`` logits."""
        y: Tensor = self.head(self.features(x).flatten(1))
        return y
