# SPDX-License-Identifier: Apache-2.0
"""What `load` returns: frozen, typed, and the same few shapes for every data set.

A `Dataset` has two parts, `train` and `test`, of one kind: `Examples` (arrays), `Series`
(recordings of unequal length), `Texts`, `Nodes` (of one graph), `Ratings` or `Words`. Every part
has a length and `take(rows)`, and that is all that a partition needs to know.

Where the world itself divides the data (hospitals, subjects, books, users), `Dataset.clients`
names the owners and every part's `client` holds, for each row, an index into those names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


class Part(Protocol):
    """What partitions and simulations may ask of `Dataset.train` and `Dataset.test`."""

    @property
    def client(self) -> Rows | None:
        """Index into `Dataset.clients` for each row; None where nobody owns rows."""

    def __len__(self) -> int: ...

    def take(self, rows: Rows) -> Self:
        """The same kind of part with these rows, in this order."""


PartT = TypeVar("PartT", bound=Part)


def _same_length(kind: str, lengths: dict[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of {kind} differ in length: {lengths}")


def _taken(column: Array | None, rows: Rows) -> Any:
    return None if column is None else column[rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """N examples as arrays.

    Attributes:
        x: ``(N, ...)`` inputs: float32 features or images in 0..1, int64 symbols for text.
        y: ``(N,)`` int64 classes or float32 targets, or ``(N, ...)`` where the data set says so.
        client: ``(N,)`` int64 indices into `Dataset.clients`, or None.
    """

    x: Array
    y: Array
    client: Rows | None = None

    def __post_init__(self) -> None:
        lengths = {"x": len(self.x), "y": len(self.y)}
        if self.client is not None:
            lengths["client"] = len(self.client)
        _same_length("Examples", lengths)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Self:
        return type(self)(x=self.x[rows], y=self.y[rows], client=_taken(self.client, rows))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """N recordings of unequal length.

    Attributes:
        x: N float32 arrays ``(T_n, channels)``.
        y: ``(N,)`` int64 classes.
        rate_hz: Samples a second.
        client: As in `Examples`.
    """

    x: tuple[Array, ...]
    y: Array
    rate_hz: float
    client: Rows | None = None

    def __post_init__(self) -> None:
        lengths = {"x": len(self.x), "y": len(self.y)}
        if self.client is not None:
            lengths["client"] = len(self.client)
        _same_length("Series", lengths)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Self:
        return type(self)(
            x=tuple(self.x[row] for row in rows.tolist()),
            y=self.y[rows],
            rate_hz=self.rate_hz,
            client=_taken(self.client, rows),
        )

    def windows(self, length: int, step: int) -> Examples:
        """Cut every recording into windows ``(length, channels)`` that start ``step`` samples
        apart.

        A window inherits the class and the client of its recording. A recording shorter than
        ``length`` gives none.

        Raises:
            ValueError: ``length`` or ``step`` is below 1.
        """
        if length < 1 or step < 1:
            raise ValueError(f"length and step must be >= 1, got {length} and {step}")
        cut: list[Array] = []
        origin: list[int] = []
        for row, recording in enumerate(self.x):
            for start in range(0, len(recording) - length + 1, step):
                cut.append(recording[start : start + length])
                origin.append(row)
        channels = self.x[0].shape[1] if self.x else 0
        rows = np.asarray(origin, np.int64)
        return Examples(
            x=np.stack(cut) if cut else np.empty((0, length, channels), np.float32),
            y=self.y[rows],
            client=_taken(self.client, rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """N texts, with targets where the data set has them.

    Attributes:
        x: N strings: documents, verses or SMILES.
        y: ``(N,)`` int64 classes or float32 targets; None for bare language.
        client: As in `Examples`.
    """

    x: tuple[str, ...]
    y: Array | None = None
    client: Rows | None = None

    def __post_init__(self) -> None:
        lengths = {"x": len(self.x)}
        if self.y is not None:
            lengths["y"] = len(self.y)
        if self.client is not None:
            lengths["client"] = len(self.client)
        _same_length("Texts", lengths)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Rows) -> Self:
        return type(self)(
            x=tuple(self.x[row] for row in rows.tolist()),
            y=_taken(self.y, rows),
            client=_taken(self.client, rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """One graph with a feature vector and a class at every node.

    Attributes:
        x: ``(V, F)`` float32 node features.
        y: ``(V,)`` int64 classes.
        edges: ``(2, E)`` int64 node pairs, each undirected edge once, no self-loops.
    """

    x: Array
    y: Array
    edges: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nodes:
    """Some nodes of one graph. The graph is shared, never copied.

    Attributes:
        graph: The whole graph; a node's neighbours need not be in `rows`.
        rows: ``(N,)`` int64 node numbers.
        client: As in `Examples`.
    """

    graph: Graph
    rows: Rows
    client: Rows | None = None

    @property
    def y(self) -> Array:
        """``(N,)`` int64 classes of these nodes."""
        labels: Array = self.graph.y[self.rows]
        return labels

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Rows) -> Self:
        return type(self)(graph=self.graph, rows=self.rows[rows], client=_taken(self.client, rows))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ratings:
    """N ratings of items by users.

    Attributes:
        user: ``(N,)`` int64, 0 <= user < users.
        item: ``(N,)`` int64, 0 <= item < items.
        y: ``(N,)`` float32: stars, or how often it was played.
        users: How many users the data set has, in both parts together.
        items: How many items.
    """

    user: Rows
    item: Rows
    y: Array
    users: int
    items: int

    def __post_init__(self) -> None:
        _same_length("Ratings", {"user": len(self.user), "item": len(self.item), "y": len(self.y)})

    @property
    def client(self) -> Rows | None:
        """Every user owns the ratings that they gave."""
        return self.user

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Self:
        return type(self)(
            user=self.user[rows],
            item=self.item[rows],
            y=self.y[rows],
            users=self.users,
            items=self.items,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Words:
    """A population of words: what heavy-hitter analytics estimate.

    Attributes:
        x: N distinct words, most frequent first.
        y: ``(N,)`` float64 relative frequencies; they sum to 1 over the whole data set.
    """

    x: tuple[str, ...]
    y: Array

    def __post_init__(self) -> None:
        _same_length("Words", {"x": len(self.x), "y": len(self.y)})

    @property
    def client(self) -> Rows | None:
        """Nobody owns a word."""
        return None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Rows) -> Self:
        return type(self)(x=tuple(self.x[row] for row in rows.tolist()), y=self.y[rows])

    def draw(self, people: int, seed: int) -> tuple[str, ...]:
        """One word for each of ``people``, drawn by frequency; the same seed draws the same."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(self.x), size=people, p=self.y / self.y.sum())
        return tuple(self.x[row] for row in chosen.tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset(Generic[PartT]):
    """One data set, divided into training and test part once and for all.

    Attributes:
        name: The name that `load` knows it by.
        train: What clients may learn from.
        test: Never trained on. Empty where there is nothing to hold out (`Words`).
        classes: Class names in the order of their numbers; empty where the target is a number.
        features: Names of the columns of ``x``; empty for images, texts and graphs.
        clients: Natural owners; empty where the world does not divide the data.
    """

    name: str
    train: PartT
    test: PartT
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()

    def of_client(self, name: str) -> Dataset[PartT]:
        """What one natural owner holds, both parts.

        Raises:
            KeyError: No owner has this name.
        """
        if name not in self.clients:
            known = ", ".join(self.clients) if self.clients else "none: nobody owns this data"
            raise KeyError(f"{self.name} has no client {name!r}; it has {known}")
        number = self.clients.index(name)
        return replace(self, train=_owned(self.train, number), test=_owned(self.test, number))


def _owned(part: PartT, number: int) -> PartT:
    if part.client is None:
        raise ValueError("a data set with client names needs client indices in both parts")
    return part.take(np.flatnonzero(part.client == number))


def seal(thing: object) -> None:
    """Make every array inside a data set, or a part of one, read-only."""
    if isinstance(thing, np.ndarray):
        thing.flags.writeable = False
    elif isinstance(thing, tuple):
        for each in thing:
            seal(each)
    elif is_dataclass(thing):
        for each in fields(thing):
            seal(getattr(thing, each.name))


def by_digest(keys: Sequence[str], labels: Sequence[Hashable], share: float) -> tuple[Rows, Rows]:
    """Divide rows into train and test, the same way on every machine and in every release.

    Within each label, rows are ordered by the SHA-256 of their key and the first ``share`` of them
    (rounded) is the test part. No random generator is involved, so no version of one can change
    the split; whoever holds some of the rows can divide them without asking anyone.

    Returns:
        Two sorted int64 row arrays: train, test.
    """
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    groups: dict[Hashable, list[int]] = {}
    for row in order:
        groups.setdefault(labels[row], []).append(row)
    held = [row for group in groups.values() for row in group[: round(len(group) * share)]]
    test = np.asarray(sorted(held), np.int64)
    return np.setdiff1d(np.arange(len(keys), dtype=np.int64), test), test
