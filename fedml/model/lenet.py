# SPDX-License-Identifier: Apache-2.0
"""LeNet (LeCun et al. 1998) as the non-IID benchmarks use it: ReLU, max pooling, 6 and 16 maps.

44,426 parameters on 28x28 images without padding, which is the network of NIID-Bench (Li et al.
2022); 61,706 with the padding that makes them 32x32 as in 1998.
"""

from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5x5 convolutions with 2x2 pooling, then 120, 84 and ``classes`` units.

    Args:
        channels: Of the image.
        side: Its height and width.
        classes: Outputs.
        padding: Around the image, before the first convolution.
    """

    def __init__(
        self, channels: int = 1, side: int = 28, classes: int = 10, padding: int = 0
    ) -> None:
        super().__init__()
        left = ((side + 2 * padding - 4) // 2 - 4) // 2
        if left < 1:
            raise ValueError(f"an image of side {side} leaves nothing after two convolutions")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Linear(16 * left**2, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, side, side)`` to ``(N, classes)`` logits."""
        y: Tensor = self.head(self.features(x).flatten(1))
        return y
