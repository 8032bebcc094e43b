# SPDX-License-Identifier: Apache-2.0
"""Adjacency matrices against their formulas, and what graph networks must not care about."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml import model
from fedml.model.graph import adjacency, pooled


@st.composite
def random_graphs(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    nodes = draw(st.integers(1, 12))
    pairs = [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return np.asarray(chosen, np.int64).reshape(-1, 2).T, nodes


@given(random_graphs())
def test_every_weighting_is_its_formula(graph: tuple[np.ndarray, int]) -> None:
    edges, nodes = graph
    plain = np.zeros((nodes, nodes))
    plain[edges[0], edges[1]] = plain[edges[1], edges[0]] = 1
    looped = plain + np.eye(nodes)
    root = np.diag(looped.sum(axis=1) ** -0.5)
    degree = plain.sum(axis=1, keepdims=True)

    for weighting, expected in (
        ("sum", plain),
        ("gcn", root @ looped @ root),
        ("mean", plain / np.maximum(degree, 1)),
    ):
        sparse = adjacency(edges, nodes, weighting)  # type: ignore[arg-type]
        dense = adjacency(edges, nodes, weighting, dense=True)  # type: ignore[arg-type]
        assert np.allclose(dense.numpy(), expected, atol=1e-6)
        assert torch.equal(sparse.to_dense(), dense)


@pytest.mark.parametrize(
    ("name", "weighting"), [("gcn", "gcn"), ("graphsage", "mean"), ("gin", "sum")]
)
def test_answers_move_with_the_nodes(name: str, weighting: str) -> None:
    rng = np.random.default_rng(3)
    edges = np.asarray([[0, 1, 2, 3, 0], [1, 2, 3, 4, 4]])
    x = rng.normal(size=(5, 6)).astype(np.float32)
    order = rng.permutation(5)
    place = np.argsort(order)
    net = model.create(name, inputs=6, seed=1).eval()

    def answer(features: np.ndarray, pairs: np.ndarray, dense: bool) -> np.ndarray:
        matrix = adjacency(pairs, 5, weighting, dense=dense)  # type: ignore[arg-type]
        with torch.no_grad():
            out: np.ndarray = net(torch.from_numpy(features), matrix).numpy()
        return out

    original = answer(x, edges, False)
    assert np.allclose(answer(x[order], place[edges], False), original[order], atol=1e-5)
    assert np.allclose(answer(x, edges, True), original, atol=1e-5)


@pytest.mark.parametrize("name", ["gcn", "graphsage"])
def test_sparse_features_give_the_same_answer_and_gradient(name: str) -> None:
    edges = np.asarray([[0, 1, 2], [1, 2, 3]])
    matrix = adjacency(edges, 4, "gcn")
    x = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    results = []
    for features in (x, x.to_sparse()):
        net = model.create(name, inputs=2, dropout=0.0, seed=1)
        out = net(features, matrix)
        (out**2).sum().backward()
        results.append([out, *(parameter.grad for parameter in net.parameters())])
    for dense, sparse in zip(*results, strict=True):
        assert torch.allclose(dense, sparse, atol=1e-5)


def test_dropout_of_sparse_features_thins_only_in_training() -> None:
    matrix = adjacency(np.zeros((2, 0), np.int64), 50, "gcn")
    x = torch.ones(50, 40).to_sparse()
    net = model.create("gcn", inputs=40, layers=1, seed=1)
    torch.manual_seed(1)
    assert not torch.equal(net(x, matrix), net(x, matrix))
    net.eval()
    assert torch.equal(net(x, matrix), net(x, matrix))


def test_graphs_in_one_batch_do_not_touch() -> None:
    x = torch.rand(5, 4)
    matrix = adjacency(np.asarray([[0, 3], [1, 4]]), 5, "sum")
    owner = torch.tensor([0, 0, 1, 2, 2])
    net = model.create("gin", inputs=4, seed=1)
    together = net(x, matrix, owner, 3)
    alone = net(x[:2], adjacency(np.asarray([[0], [1]]), 2, "sum"), owner[:2], 1)

    assert torch.allclose(together[0], alone[0], atol=1e-6)
    assert pooled(x, owner, 3).shape == (3, 4)
    assert torch.allclose(pooled(x, owner, 3)[2], x[3] + x[4])


def test_edges_to_nowhere_and_unknown_weightings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.2"):
        adjacency(np.asarray([[0], [3]]), 3, "sum")
    with pytest.raises(ValueError, match="gcn, mean or sum"):
        adjacency(np.asarray([[0], [1]]), 3, "max")  # type: ignore[arg-type]
