# SPDX-License-Identifier: Apache-2.0
"""Residual networks (He et al. 2016) with group normalisation instead of batch normalisation.

Batch statistics of clients with different classes cannot be averaged into one network; Hsieh et
al. 2020 (arXiv 1910.00189) show that group normalisation (Wu and He 2018) does not have the
problem. Both have two numbers a channel, so the sizes are the published ones: 0.27 M parameters
for ResNet-20, 0.85 M for ResNet-56, 11.69 M for ResNet-18 with 1,000 classes.
"""

import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor, nn


def _conv3(into: int, out: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class _Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, into: int, out: int, stride: int, groups: int, *, projected: bool) -> None:
        super().__init__()
        self.conv1 = _conv3(into, out, stride)
        self.norm1 = nn.GroupNorm(groups, out)
        self.conv2 = _conv3(out, out)
        self.norm2 = nn.GroupNorm(groups, out)
        self._stride = stride
        self._wider = out - into
        self.way: nn.Module | None = None
        if projected and (stride != 1 or into != out):
            way = nn.Conv2d(into, out, 1, stride=stride, bias=False)
            nn.init.kaiming_normal_(way.weight, mode="fan_out", nonlinearity="relu")
            self.way = nn.Sequential(way, nn.GroupNorm(groups, out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.way is not None:
            x = self.way(x)
        else:
            # "Option A" of the paper: every other pixel, zeros for the new channels, no weights.
            x = x[:, :, :: self._stride, :: self._stride]
            x = F.pad(x, (0, 0, 0, 0, 0, self._wider))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """The narrow network for small images: three stages of 16, 32 and 64 channels.

    Args:
        depth: 6 n + 2 layers: 20, 32, 44, 56, 110.
        channels: Of the image.
        classes: Outputs.
        groups: Of every normalisation; divides 16.
    """

    def __init__(
        self, depth: int = 20, channels: int = 3, classes: int = 10, groups: int = 8
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, as 20 or 56, got {depth}")
        self.conv = _conv3(channels, 16)
        self.norm = nn.GroupNorm(groups, 16)
        blocks: list[nn.Module] = []
        into = 16
        for out in (16, 32, 64):
            for place in range((depth - 2) // 6):
                stride = 2 if place == 0 and out > 16 else 1
                blocks.append(_Block(into, out, stride, groups, projected=False))
                into = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, height, width)`` to ``(N, classes)`` logits."""
        y = self.blocks(F.relu(self.norm(self.conv(x))))
        logits: Tensor = self.head(y.mean(dim=(2, 3)))
        return logits


class ResNet18(nn.Module):
    """ResNet-18: a 7x7 convolution, pooling, four stages of two blocks, 64 to 512 channels.

    Args:
        channels: Of the image.
        classes: Outputs.
        groups: Of every normalisation; divides 64. Wu and He use 32.
    """

    def __init__(self, channels: int = 3, classes: int = 10, groups: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.GroupNorm(groups, 64)
        blocks: list[nn.Module] = []
        into = 64
        for out in (64, 128, 256, 512):
            for stride in (1 if out == 64 else 2, 1):
                blocks.append(_Block(into, out, stride, groups, projected=True))
                into = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, height, width)`` to ``(N, classes)`` logits."""
        y = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, stride=2, padding=1)
        logits: Tensor = self.head(self.blocks(y).mean(dim=(2, 3)))
        return logits
