# SPDX-License-Identifier: Apache-2.0
"""U-Net (Ronneberger et al. 2015) for segmentation: a class for every pixel, 23 convolutions.

Padded, so that the output has the size of the image, and with group normalisation (see
`fedml.model.resnet` for why). At the paper's width, for colour images and one output: 31,037,633
parameters.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor, nn


def _twice(into: int, out: int, groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (into, out):
        layers += [
            nn.Conv2d(width, out, 3, padding=1, bias=False),
            nn.GroupNorm(groups, out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down ``depth`` times, up again, with a bridge at every level.

    Args:
        channels: Of the image.
        classes: Outputs for each pixel.
        width: Channels of the first level; every level below has twice as many.
        depth: How often the image is halved; its sides are multiples of ``2 ** depth``.
        groups: Of every normalisation; divides ``width``.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 2,
        width: int = 64,
        depth: int = 4,
        groups: int = 8,
    ) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"width {width} is no multiple of {groups} groups")
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _twice(into, out, groups)
            for into, out in zip([channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * out, out, 2, stride=2) for out in reversed(widths[:-1])
        )
        self.join = nn.ModuleList(_twice(2 * out, out, groups) for out in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, height, width)`` to ``(N, classes, height, width)`` logits.

        Raises:
            ValueError: A side of the image is no multiple of ``2 ** depth``.
        """
        step = 2 ** len(self.up)
        if x.shape[2] % step or x.shape[3] % step:
            raise ValueError(f"sides must be multiples of {step}, got {tuple(x.shape[2:])}")
        bridges: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            bridges.append(x)
        bridges.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([bridges.pop(), up(x)], dim=1))
        y: Tensor = self.head(x)
        return y
