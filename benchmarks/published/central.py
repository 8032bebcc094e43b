# SPDX-License-Identifier: Apache-2.0
"""Published accuracies of models trained in one place: what federated ones are measured against."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedml import model as models
from fedml.data.dataset import Dataset, Examples, Nodes
from fedml.data.graphs import largest_component
from fedml.federate.local_sgd import Evaluation, LocalSGD
from fedml.model.graph import adjacency

LABELLED, VALIDATION, PATIENCE = 20, 30, 50


def softmax(clothes: Dataset[Examples], seed: int) -> float:
    """Test accuracy of softmax regression on all of Fashion-MNIST."""
    # torch, whose threads a test can keep to one: NumPy's BLAS starts more for matrices this small.
    net = models.create("linear", seed=seed)
    rng = np.random.default_rng(seed)
    # Small steps at the end: what large ones leave moves the accuracy by half a point.
    for rate, epochs in ((0.05, 20), (0.005, 5)):
        LocalSGD(lr=rate, batch_size=100, epochs=epochs)(net, clothes.train, {}, rng)
    return Evaluation()(net, clothes.test, {})["accuracy"]


def gcn(cora: Dataset[Nodes], seed: int) -> float:
    """Test accuracy of a GCN on Cora's largest component, as Shchur et al. 2018 measure it.

    20 nodes a class are labelled and 30 a class stop the training, drawn by ``seed``; the model is
    that of the lowest validation loss, 50 epochs after which it is given up. Hidden width 64,
    dropout 0.8, rate 0.01 and weight decay 0.001 are what their search found.
    """
    graph = largest_component(cora.train.graph)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(graph.y))
    by_class = [order[graph.y[order] == kind] for kind in np.unique(graph.y)]
    train = np.concatenate([rows[:LABELLED] for rows in by_class])
    held = np.concatenate([rows[LABELLED : LABELLED + VALIDATION] for rows in by_class])
    test = np.concatenate([rows[LABELLED + VALIDATION :] for rows in by_class])
    x = torch.from_numpy(graph.x / np.maximum(1, graph.x.sum(axis=1, keepdims=True))).to_sparse()
    matrix, y = adjacency(graph.edges, len(graph.y), "gcn"), torch.from_numpy(graph.y)
    net = models.create("gcn", seed=seed, hidden=64, dropout=0.8)
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    best, accuracy, since = float("inf"), 0.0, 0
    while since < PATIENCE:
        net.train()
        optimiser.zero_grad()
        loss = functional.cross_entropy(net(x, matrix)[train], y[train])
        torch.autograd.backward(loss)
        optimiser.step()
        net.eval()
        with torch.inference_mode():
            z = net(x, matrix)
        here = float(functional.cross_entropy(z[held], y[held]))
        since += 1
        if here < best:
            best, since = here, 0
            accuracy = float((z[test].argmax(dim=1) == y[test]).float().mean())
    return accuracy
