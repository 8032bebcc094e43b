# SPDX-License-Identifier: Apache-2.0
"""Linear, logistic and softmax regression: one layer, no activation.

The loss decides which: squared error, binary or softmax cross-entropy on the plain outputs.
FedML's "lr" puts a sigmoid before the cross-entropy; on the same data that costs six points of
accuracy.
"""

from torch import Tensor, nn


class Linear(nn.Module):
    """``outputs`` affine functions of the flattened input.

    Args:
        inputs: Numbers in one example.
        outputs: Classes, or 1 for regression and yes-or-no questions.
    """

    def __init__(self, inputs: int = 784, outputs: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to ``(N, outputs)`` logits."""
        y: Tensor = self.linear(x.flatten(1))
        return y
