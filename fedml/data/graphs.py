# SPDX-License-Identifier: Apache-2.0
"""Cora: 2,708 papers, which words they use, whom they cite, and to which of seven fields they
belong.

The usual task is semi-supervised: few labelled nodes, the whole graph visible. `few_labels` draws
such a split; the one that `load` returns has 20 labelled papers a class (Yang et al. 2016) and
all others as test. Shchur et al. 2018 measure on the largest component only: `largest_component`,
then `few_labels`.
"""

import hashlib

import numpy as np

from fedml.data import parquet
from fedml.data.dataset import Array, Dataset, Graph, Nodes, Rows
from fedml.data.errors import ImpossibleSplit
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

# By the number in the file (McCallum et al. 2000; the names of the LINQS copy).
FIELDS = (
    "Neural_Networks",
    "Rule_Learning",
    "Reinforcement_Learning",
    "Probabilistic_Methods",
    "Theory",
    "Genetic_Algorithms",
    "Case_Based",
)
LABELS_PER_CLASS = 20


def few_labels(graph: Graph, per_class: int, seed: int = 0) -> tuple[Nodes, Nodes]:
    """``per_class`` nodes of every class, and all other nodes.

    Nodes are ordered by a digest of seed and number, so a seed means the same split everywhere.

    Raises:
        ImpossibleSplit: A class has too few nodes to leave one for the test.
    """
    order = sorted(
        range(len(graph.y)), key=lambda node: hashlib.sha256(f"{seed}/{node}".encode()).digest()
    )
    labelled: list[int] = []
    for number in np.unique(graph.y).tolist():
        members = [node for node in order if graph.y[node] == number]
        if not 1 <= per_class < len(members):
            raise ImpossibleSplit(
                f"class {number} has {len(members)} nodes: cannot label {per_class} and test others"
            )
        labelled += members[:per_class]
    train = np.asarray(sorted(labelled), np.int64)
    test = np.setdiff1d(np.arange(len(graph.y), dtype=np.int64), train)
    return Nodes(graph=graph, rows=train), Nodes(graph=graph, rows=test)


def largest_component(graph: Graph) -> Graph:
    """The largest connected part, its nodes renumbered in their order."""
    label = np.arange(len(graph.y))
    # The smallest number spreads along edges until nothing changes: as many steps as the diameter.
    while True:
        lowest = label.copy()
        np.minimum.at(lowest, graph.edges[0], label[graph.edges[1]])
        np.minimum.at(lowest, graph.edges[1], label[graph.edges[0]])
        if (lowest == label).all():
            break
        label = lowest
    return subgraph(graph, np.flatnonzero(label == np.bincount(label).argmax()))


def subgraph(graph: Graph, rows: Rows) -> Graph:
    """These nodes, renumbered in the given order, and the edges among them.

    What a client that owns only these nodes can see.
    """
    place = np.full(len(graph.y), -1, np.int64)
    place[rows] = np.arange(len(rows))
    moved: Array = place[graph.edges]
    return Graph(x=graph.x[rows], y=graph.y[rows], edges=moved[:, (moved >= 0).all(axis=0)])


def read_cora(files: Files) -> Dataset[Nodes]:
    """Two Parquet tables; citations lose their direction and count once."""
    papers = parquet.read(files["papers"])
    citations = parquet.read(files["citations"])
    number = papers["nodeId"]
    order = np.argsort(number)
    ends = np.stack([citations["sourceNodeId"], citations["targetNodeId"]])
    ends = order[np.searchsorted(number, ends, sorter=order)]
    ends = np.sort(ends[:, ends[0] != ends[1]], axis=0)
    graph = Graph(
        x=papers["features.list.item"].reshape(len(number), -1).astype(np.float32),
        y=papers["subject"],
        edges=np.unique(ends, axis=1),
    )
    train, test = few_labels(graph, LABELS_PER_CLASS)
    return Dataset(name="cora", train=train, test=test, classes=FIELDS)


def _resource(member: str, sha256: str) -> PythonFile:
    return PythonFile(
        package="graphdatascience",
        version="2.2",
        member=f"graphdatascience/resources/cora/{member}.parquet.gzip",
        sha256=sha256,
    )


PROVIDERS = (
    Provider(
        name="cora",
        title="Cora: citations among 2,708 papers of seven fields",
        licence="none stated; published for research",
        source="McCallum et al. 2000; Sen et al. 2008; in graphdatascience 2.2",
        size="140 + 2,568 nodes, 5,278 edges",
        download_mb=2.1,
        files={
            "papers": _resource(
                "cora_nodes", "c54c0625af98570287dcb25e9f29e0b229948352a8de1dbf202fa39f36bfe591"
            ),
            "citations": _resource(
                "cora_rels", "e0059f81e607c0262e93fbe3c77950b06098dab167f0071cba97a82c9440ca01"
            ),
        },
        read=read_cora,
    ),
)
