# SPDX-License-Identifier: Apache-2.0
"""Cora, molecules, ratings, recordings, and the readers under them."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml import data
from fedml.data import parquet
from fedml.data.dataset import Graph
from fedml.data.errors import DamagedData, ImpossibleSplit
from fedml.data.graphs import few_labels, largest_component, subgraph
from fedml.data.molecules import sdf_fields
from fedml.data.ratings import read_movielens
from fedml.data.sensors import unpickle_arrays
from fedml.data.smiles import FEATURES, graphs, molecular_graph

Load = Callable[[str], data.Dataset[Any]]


def chain(nodes: int) -> Graph:
    """0 - 1 - 2 - … in one line, classes in turn."""
    return Graph(
        x=np.arange(nodes, dtype=np.float32)[:, None],
        y=np.arange(nodes) % 2,
        edges=np.stack([np.arange(nodes - 1), np.arange(1, nodes)]),
    )


def test_cora_is_the_published_one(real: Load) -> None:
    cora = real("cora")
    graph = cora.train.graph

    assert graph.x.shape == (2708, 1433)
    assert graph.x.sum() == 49_216
    assert graph.edges.shape == (2, 5278)
    assert (graph.edges[0] < graph.edges[1]).all()
    counts = dict(zip(cora.classes, np.bincount(graph.y).tolist(), strict=True))
    assert counts == {
        "Neural_Networks": 818,
        "Rule_Learning": 180,
        "Reinforcement_Learning": 217,
        "Probabilistic_Methods": 426,
        "Theory": 351,
        "Genetic_Algorithms": 418,
        "Case_Based": 298,
    }


def test_most_citations_stay_within_a_field(real: Load) -> None:
    graph = real("cora").train.graph
    assert (graph.y[graph.edges[0]] == graph.y[graph.edges[1]]).mean() == pytest.approx(
        0.81, abs=0.01
    )


def test_the_largest_component_is_the_published_one(real: Load) -> None:
    part = largest_component(real("cora").train.graph)
    assert len(part.y) == 2485
    assert part.edges.shape == (2, 5069)


def test_few_labels_are_even_and_disjoint_from_the_test() -> None:
    graph = chain(50)
    train, test = few_labels(graph, 5, seed=4)

    assert np.bincount(train.y).tolist() == [5, 5]
    assert np.array_equal(np.sort(np.concatenate([train.rows, test.rows])), np.arange(50))
    assert np.array_equal(train.rows, few_labels(graph, 5, seed=4)[0].rows)
    assert not np.array_equal(train.rows, few_labels(graph, 5, seed=5)[0].rows)
    with pytest.raises(ImpossibleSplit, match="25 nodes"):
        few_labels(graph, 25)


def test_the_largest_component_of_two_chains_is_the_longer() -> None:
    edges = np.asarray([[0, 1, 4, 5, 6], [1, 2, 5, 6, 7]])
    graph = Graph(x=np.arange(9.0)[:, None], y=np.zeros(9, np.int64), edges=edges)
    part = largest_component(graph)

    assert part.x.ravel().tolist() == [4, 5, 6, 7]
    assert part.edges.tolist() == [[0, 1, 2], [1, 2, 3]]


def test_a_client_sees_only_edges_among_its_own_nodes() -> None:
    part = subgraph(chain(6), np.asarray([5, 1, 2, 4]))

    assert part.x.ravel().tolist() == [5, 1, 2, 4]
    assert sorted(map(sorted, part.edges.T.tolist())) == [[0, 3], [1, 2]]


def hybrid(values: list[int], width: int) -> bytes:
    """Parquet's mixture of runs and bit-packed groups, written the way the specification says."""
    out = b""
    at = 0
    while at < len(values):
        run = next((n for n in range(at, len(values)) if values[n] != values[at]), len(values)) - at
        if run >= 8 or len(values) - at < 8:
            out += varint(run << 1) + values[at].to_bytes((width + 7) // 8, "little")
            at += run
        else:
            group = values[at : at + 8]
            packed = sum(value << (width * place) for place, value in enumerate(group))
            out += varint(3) + packed.to_bytes(width, "little")
            at += 8
    return out


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@given(data_=st.data(), width=st.integers(1, 17))
def test_parquet_integers_come_back(data_: st.DataObject, width: int) -> None:
    value = st.integers(0, 2**width - 1) | st.just(1)
    values = data_.draw(st.lists(value, max_size=200))
    read = parquet._hybrid(hybrid(values, width), width, len(values))
    assert read.tolist() == values


def test_other_files_are_no_parquet() -> None:
    with pytest.raises(DamagedData, match="not a Parquet file"):
        parquet.read(b"PAR1 and then nothing")


def test_solubility_falls_with_the_length_of_the_chain(real: Load) -> None:
    train = real("solubility").train
    known = dict(zip(train.x, train.y.tolist(), strict=True))
    assert known["CCCCC"] == pytest.approx(-3.18)
    sizes = [len(molecular_graph(text).elements) for text in train.x]
    assert np.corrcoef(sizes, train.y)[0, 1] < -0.4


@pytest.mark.parametrize("name", ["solubility", "freesolv"])
def test_every_molecule_of_the_real_sets_is_read(name: str, real: Load) -> None:
    loaded = real(name)
    x, edges, owner = graphs(loaded.train.x)

    assert np.array_equal(np.unique(owner), np.arange(len(loaded.train)))
    assert (owner[edges[0]] == owner[edges[1]]).all()
    assert x.shape[1] == len(FEATURES)
    # A molecule in one piece with V atoms has at least V - 1 bonds; salts have several pieces.
    pieces = sum(text.count(".") + 1 for text in loaded.train.x)
    assert edges.shape[1] >= len(x) - pieces


@pytest.mark.parametrize(
    ("smiles", "elements", "bonds"),
    [
        ("CCO", "C C O", {(0, 1), (1, 2)}),
        ("CC(=O)O", "C C O O", {(0, 1), (1, 2), (1, 3)}),
        ("c1ccccc1", "C C C C C C", {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5)}),
        ("C%12CC%12", "C C C", {(0, 1), (1, 2), (0, 2)}),
        ("[Na+].[Cl-]", "Na Cl", set()),
        ("ClCBr", "Cl C Br", {(0, 1), (1, 2)}),
        ("c1cc[nH]c1", "C C C N C", {(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)}),
        ("C[C@@H](N)O", "C C N O", {(0, 1), (1, 2), (1, 3)}),
        ("F/C=C\\F", "F C C F", {(0, 1), (1, 2), (2, 3)}),
        ("[2H]C", "C", set()),
    ],
)
def test_smiles_become_atoms_and_bonds(
    smiles: str, elements: str, bonds: set[tuple[int, int]]
) -> None:
    molecule = molecular_graph(smiles)
    assert " ".join(molecule.elements) == elements
    assert {tuple(sorted(bond)) for bond in molecule.bonds} == bonds


def test_charges_are_read() -> None:
    assert molecular_graph("[NH4+].[O-2].[Ca++]").charges == (1, -2, 2)


@pytest.mark.parametrize("text", ["", "C(", "C)", "C1CC", "1C", "C?C", "[C"])
def test_what_is_no_smiles_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(DamagedData, match="not SMILES at character"):
        molecular_graph(text)


def test_sd_files_of_both_dialects() -> None:
    one = "x\n\n\n>  <SOL>  (1) \n-3.2\n\n>  <smiles>  (1) \nCC\n\n$$$$\n"
    other = one.replace(">  <smiles>  (1) ", "> <SMILES>").replace("\n", "\r\n")
    assert sdf_fields(one) == sdf_fields(other) == [{"sol": "-3.2", "smiles": "CC"}]


def test_movielens_is_the_published_one_and_tests_on_the_future(real: Load) -> None:
    movies = real("movielens-100k")

    assert (movies.train.users, movies.train.items) == (943, 1682)
    stars = np.bincount(np.concatenate([movies.train.y, movies.test.y]).astype(np.int64))
    assert stars.tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    held = np.bincount(movies.test.user, minlength=943)
    total = held + np.bincount(movies.train.user, minlength=943)
    assert (held == np.round(total * 0.2)).all()
    # User 196 rated 39 films; the last eight are held out, and nothing else of his.
    assert len(movies.of_client("196").train) == 31
    assert len(movies.of_client("196").test) == 8


def test_the_latest_ratings_of_each_user_are_held_out() -> None:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"7\t{item}\t3\t{1000 - item}" for item in range(1, 6)]  # the lowest item last
    lines += [f"9\t{item}\t4\t{1000 + item}" for item in range(1, 6)]
    made = read_movielens({"ratings": "\n".join(lines).encode()})

    held = zip(made.test.user.tolist(), made.test.item.tolist(), strict=True)
    assert [(made.clients[user], made.features[item]) for user, item in held] == [
        ("7", "1"),
        ("9", "5"),
    ]
    with pytest.raises(DamagedData, match="not MovieLens"):
        read_movielens({"ratings": b"user,item\n1,2\n"})


def test_lastfm_is_the_published_one(real: Load) -> None:
    plays = real("lastfm")
    assert (plays.train.users, plays.train.items) == (1892, 17_632)
    assert len(plays.train) + len(plays.test) == 92_834


def test_every_subject_records_fourteen_times(real: Load) -> None:
    watch = real("watch")

    assert len(watch.clients) == 10
    assert np.bincount(watch.train.client).tolist() == [10] * 10
    assert np.bincount(watch.test.client).tolist() == [4] * 10
    assert all(recording.shape[1] == 6 for recording in watch.train.x)
    windows = watch.train.windows(200, 100)
    assert windows.x.shape[1:] == (200, 6)
    assert set(np.unique(windows.y)) == set(range(7))


class Malicious:
    """Unpickles by calling a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_a_recording_that_calls_anything_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    pickle.dump({"x": Malicious()}, stream, protocol=2)

    with pytest.raises(DamagedData, match=r"builtin\w*\.print, which no array needs"):
        unpickle_arrays(stream.getvalue())
    assert capsys.readouterr().out == ""


def test_arrays_in_containers_are_read() -> None:
    stream = io.BytesIO()
    content = {"x": [np.arange(3.0)], "names": ["a"]}
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    pickle.dump(np.asarray(content, dtype=object), stream, protocol=2)
    # NumPy 2 writes names that the recording, which NumPy 1 wrote, does not have.
    old = stream.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")

    assert unpickle_arrays(old)["x"][0].tolist() == [0, 1, 2]
