# SPDX-License-Identifier: Apache-2.0
"""Networks on graphs, with a plain torch matrix as the graph: dense or sparse, nothing else needed.

Every layer is "gather from the neighbours, then mix": a product with a matrix that depends on the
graph only. `adjacency` makes that matrix, in the weighting that each paper uses. Several small
graphs are one graph without edges between them; `pooled` then adds up each one's nodes.
"""

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor, nn

Weighting = Literal["gcn", "mean", "sum"]


def adjacency(
    edges: npt.NDArray[Any], nodes: int, weighting: Weighting, *, dense: bool = False
) -> Tensor:
    """The matrix that gathers from neighbours.

    Args:
        edges: ``(2, E)`` integer node pairs, each undirected edge once, no self-loops.
        nodes: How many nodes there are.
        weighting: ``gcn``: D^-1/2 (A + I) D^-1/2 (Kipf and Welling 2017); ``mean``: rows of A that
            sum to 1, a node without neighbours gathers 0 (GraphSAGE); ``sum``: A itself (GIN).
        dense: An ordinary matrix instead of a sparse one; faster for a few hundred nodes.

    Returns:
        ``(nodes, nodes)`` float32, row i gathers for node i.

    Raises:
        ValueError: An end of an edge is not a node.
    """
    if edges.size and not (edges.min() >= 0 and edges.max() < nodes):
        raise ValueError(f"edges name nodes outside 0..{nodes - 1}")
    to = np.concatenate([edges[0], edges[1]])
    of = np.concatenate([edges[1], edges[0]])
    if weighting == "gcn":
        to = np.concatenate([to, np.arange(nodes)])
        of = np.concatenate([of, np.arange(nodes)])
    degree = np.bincount(to, minlength=nodes).astype(np.float64)
    match weighting:
        case "gcn":
            weight = 1 / np.sqrt(degree[to] * degree[of])
        case "mean":
            weight = 1 / degree[to]
        case "sum":
            weight = np.ones(len(to))
        case _:
            raise ValueError(f"weighting must be gcn, mean or sum, not {weighting!r}")
    where = torch.from_numpy(np.stack([to, of]).astype(np.int64))
    matrix = torch.sparse_coo_tensor(
        where,
        torch.from_numpy(weight.astype(np.float32)),
        (nodes, nodes),
        check_invariants=False,
    ).coalesce()
    return matrix.to_dense() if dense else matrix


def pooled(x: Tensor, graph: Tensor, graphs: int) -> Tensor:
    """Add up the nodes of each of several graphs.

    Args:
        x: ``(V, F)`` node features.
        graph: ``(V,)`` int64, which graph each node belongs to.
        graphs: How many graphs.

    Returns:
        ``(graphs, F)``.
    """
    return x.new_zeros(graphs, x.shape[1]).index_add(0, graph, x)


def _glorot(into: int, out: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(into, out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _thinned(x: Tensor, share: float, *, training: bool) -> Tensor:
    """Dropout. Of a sparse matrix only the stored numbers are drawn; the others are 0 anyway."""
    if not x.is_sparse:
        return F.dropout(x, share, training)
    x = x.coalesce()
    values = F.dropout(x.values(), share, training)
    return torch.sparse_coo_tensor(
        x.indices(), values, x.shape, check_invariants=False, is_coalesced=True
    )


def _times(x: Tensor, layer: nn.Module) -> Tensor:
    """The linear layer on dense or sparse features."""
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected a linear layer, not {type(layer).__name__}")
    if not x.is_sparse:
        y: Tensor = layer(x)
        return y
    y = torch.sparse.mm(x, layer.weight.t())
    return y if layer.bias is None else y + layer.bias


class GCN(nn.Module):
    """Graph convolution (Kipf and Welling 2017): on Cora 23,063 parameters.

    Takes the ``gcn`` matrix.

    Args:
        inputs: Features of a node.
        hidden: Width between the layers.
        outputs: Classes.
        layers: How many.
        dropout: Share of numbers set to zero before each layer, in training.
    """

    def __init__(
        self,
        inputs: int = 1433,
        hidden: int = 16,
        outputs: int = 7,
        layers: int = 2,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self._dropout = dropout
        self.layers = nn.ModuleList(
            _glorot(into, out, bias=False) for into, out in pairwise(widths)
        )
        self.biases = nn.ParameterList(torch.zeros(out) for out in widths[1:])

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``(V, inputs)`` features and the ``(V, V)`` matrix to ``(V, outputs)`` logits.

        Features that are mostly 0, as bags of words, are several times faster as a sparse tensor.
        """
        last = len(self.layers) - 1
        for depth, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            x = _thinned(x, self._dropout, training=self.training)
            # Mixed first: the product with the graph is then as narrow as it can be.
            x = matrix @ _times(x, layer) + bias
            if depth < last:
                x = F.relu(x)
        return x


class GraphSAGE(nn.Module):
    """GraphSAGE with the mean of all neighbours (Hamilton et al. 2017, Algorithm 1).

    Takes the ``mean`` matrix. Arguments as `GCN`.
    """

    def __init__(
        self,
        inputs: int = 1433,
        hidden: int = 64,
        outputs: int = 7,
        layers: int = 2,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self._dropout = dropout
        # W [h ; mean of neighbours] as two products, so that the mean need not be built twice.
        self.own = nn.ModuleList(_glorot(a, b) for a, b in pairwise(widths))
        self.neighbours = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``(V, inputs)`` features and the ``(V, V)`` matrix to ``(V, outputs)`` logits.

        Features that are mostly 0, as bags of words, are several times faster as a sparse tensor.
        """
        last = len(self.own) - 1
        for depth, (own, neighbours) in enumerate(zip(self.own, self.neighbours, strict=True)):
            x = _thinned(x, self._dropout, training=self.training)
            x = _times(x, own) + matrix @ _times(x, neighbours)
            if depth < last:
                x = F.normalize(F.relu(x), dim=1)
        return x


class GIN(nn.Module):
    """Graph isomorphism network (Xu et al. 2019): as good at telling graphs apart as 1-WL.

    Takes the ``sum`` matrix. Whole graphs are classified or measured when ``graph`` is given.

    Args:
        inputs: Features of a node.
        hidden: Width of every layer.
        outputs: Classes, or 1 for a number.
        layers: How many times nodes look at their neighbours.
    """

    def __init__(
        self, inputs: int = 1433, hidden: int = 64, outputs: int = 7, layers: int = 3
    ) -> None:
        super().__init__()
        self.epsilon = nn.Parameter(torch.zeros(layers))
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs if depth == 0 else hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
            )
            for depth in range(layers)
        )
        # One read-out a layer: shallow layers generalise where deep ones tell apart (section 4.2).
        self.heads = nn.ModuleList(nn.Linear(hidden, outputs) for _ in range(layers))

    def forward(
        self, x: Tensor, matrix: Tensor, graph: Tensor | None = None, graphs: int = 0
    ) -> Tensor:
        """``(V, inputs)`` and the ``(V, V)`` matrix to ``(V, outputs)``, or ``(graphs, outputs)``.

        Args:
            x: Node features.
            matrix: Of all graphs together.
            graph: ``(V,)`` int64, the graph of each node; None for an answer for each node.
            graphs: How many graphs, with ``graph``.
        """
        answers: list[Tensor] = []
        for layer, head, epsilon in zip(self.layers, self.heads, self.epsilon, strict=True):
            x = layer((1 + epsilon) * x + matrix @ x)
            answers.append(head(x if graph is None else pooled(x, graph, graphs)))
        return torch.stack(answers).sum(dim=0)
