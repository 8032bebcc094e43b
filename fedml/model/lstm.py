# SPDX-License-Identifier: Apache-2.0
"""The character model of the federated papers: embedding of 8, two LSTM layers of 256.

McMahan et al. 2017 train it on Shakespeare; Reddi et al. 2021 with 90 symbols, 820,522 parameters.
torch keeps a second bias vector in each layer, 2,048 parameters in all, hence 822,570.
"""

from torch import Tensor, nn


class CharacterLSTM(nn.Module):
    """Predicts every next symbol of a text.

    Args:
        symbols: Size of the alphabet.
        embedding: Numbers that stand for one symbol.
        hidden: Width of each layer.
        layers: How many.
    """

    def __init__(
        self, symbols: int = 90, embedding: int = 8, hidden: int = 256, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, length)`` int64 symbols to ``(N, symbols, length)`` logits.

        The classes come second, as `torch.nn.functional.cross_entropy` wants them.
        """
        y, _state = self.lstm(self.embedding(x))
        logits: Tensor = self.head(y).transpose(1, 2)
        return logits
