# SPDX-License-Identifier: Apache-2.0
"""Ways to divide one data set among clients, from even to as uneven as life.

Every function is pure and returns a partition: one sorted array of row numbers for each client,
disjoint, together all rows, none empty. The same arguments and seed return the same partition.
Where no such partition exists the error says which number to change.

Names as in Li et al. 2022 (NIID-Bench, arXiv 2102.02079), where each kind of skew is compared.
"""

from collections.abc import Sequence

import numpy as np

from fedml.data.dataset import Array, Part, Rows
from fedml.data.errors import ImpossibleSplit

Partition = tuple[Rows, ...]


def iid(examples: int, clients: int, *, seed: int = 0) -> Partition:
    """Shuffle and cut into parts whose sizes differ by at most one.

    Raises:
        ImpossibleSplit: Fewer examples than clients.
    """
    _enough(examples, clients, 1)
    order = np.random.default_rng(seed).permutation(examples)
    return _sorted(np.array_split(order, clients))


def dirichlet(
    labels: Array,
    clients: int,
    alpha: float,
    *,
    seed: int = 0,
    minimum: int = 1,
    level: bool = True,
) -> Partition:
    """Label skew: for each class, shares of the clients drawn from Dir(alpha) (Hsu et al. 2019).

    Small ``alpha`` gives clients few classes; large ``alpha`` comes close to `iid`. A client
    short of ``minimum`` examples after the draw takes the rest from the largest clients, from the
    class that they have most of; at usual sizes that happens to none.

    Args:
        labels: ``(N,)`` classes.
        clients: How many clients.
        alpha: Concentration, > 0.
        seed: Of the draw.
        minimum: Examples that every client has at least.
        level: A client that holds an even share already gets no more. The published NIID-Bench
            partitions are made so, which keeps sizes closer than the bare formula does.

    Raises:
        ImpossibleSplit: ``alpha`` is not positive, or fewer than ``clients * minimum`` examples.
    """
    _enough(len(labels), clients, minimum)
    if not alpha > 0:
        raise ImpossibleSplit(f"alpha must be > 0, got {alpha}")
    rng = np.random.default_rng(seed)
    owner = np.empty(len(labels), np.int64)
    held = np.zeros(clients, np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = _dirichlet_shares(rng, alpha, clients)
        if level:
            shares = np.where(held * clients < len(labels), shares, 0.0)
            # All the mass of a small alpha can sit on clients that are full.
            open_to = held * clients < len(labels)
            shares = shares if shares.sum() > 0 else open_to / open_to.sum()
        cuts = (np.cumsum(shares / shares.sum())[:-1] * len(rows)).astype(np.int64)
        for client, piece in enumerate(np.split(rows, cuts)):
            owner[piece] = client
            held[client] += len(piece)
    _top_up(owner, labels, clients, minimum)
    return _by_owner(owner, clients)


def shards(labels: Array, clients: int, per_client: int, *, seed: int = 0) -> Partition:
    """Sort by class, cut into even shards, deal ``per_client`` to each (McMahan et al. 2017).

    With two shards each on MNIST, most clients see two digits: the paper's "pathological" split.

    Raises:
        ImpossibleSplit: Fewer examples than shards, or ``per_client`` below 1.
    """
    if per_client < 1:
        raise ImpossibleSplit(f"shards per client must be >= 1, got {per_client}")
    _enough(len(labels), clients, per_client)
    rng = np.random.default_rng(seed)
    # Shuffled first, then sorted stably: which rows of a class share a shard is random.
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return _sorted([np.concatenate([pieces[piece] for piece in hand]) for hand in dealt])


def classes_each(labels: Array, clients: int, count: int, *, seed: int = 0) -> Partition:
    """#C = k: every client has exactly ``count`` classes, each divided evenly among its owners.

    Raises:
        ImpossibleSplit: ``count`` is not between 1 and the number of classes, the clients together
            cannot hold every class, or a class has fewer examples than owners.
    """
    kinds = np.unique(labels)
    _enough(len(labels), clients, 1)
    if not 1 <= count <= len(kinds):
        raise ImpossibleSplit(f"{count} classes each: there are {len(kinds)}")
    if clients * count < len(kinds):
        raise ImpossibleSplit(
            f"{clients} clients with {count} classes each cannot hold all {len(kinds)} classes",
            hint=f"give each at least {-(-len(kinds) // clients)}",
        )
    rng = np.random.default_rng(seed)
    owners: list[list[int]] = [[] for _ in kinds]
    for client in range(clients):
        # The least owned classes first, ties by lot: every class finds an owner, none too many.
        lots = rng.permutation(len(kinds))
        for kind in sorted(lots.tolist(), key=lambda kind: len(owners[kind]))[:count]:
            owners[kind].append(client)
    owner = np.empty(len(labels), np.int64)
    for kind, sharing in zip(kinds, owners, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == kind))
        if len(rows) < len(sharing):
            raise ImpossibleSplit(
                f"class {kind} has {len(rows)} examples for {len(sharing)} clients",
                hint="use fewer clients or fewer classes each",
            )
        for client, piece in zip(sharing, np.array_split(rows, len(sharing)), strict=True):
            owner[piece] = client
    return _by_owner(owner, clients)


def quantity(
    examples: int, clients: int, alpha: float, *, seed: int = 0, minimum: int = 1
) -> Partition:
    """Quantity skew: sizes drawn from Dir(alpha), rows at random.

    Raises:
        ImpossibleSplit: ``alpha`` is not positive, or fewer than ``clients * minimum`` examples.
    """
    _enough(examples, clients, minimum)
    if not alpha > 0:
        raise ImpossibleSplit(f"alpha must be > 0, got {alpha}")
    rng = np.random.default_rng(seed)
    # The minimum is set aside first, so that the sizes need no repair.
    spare = examples - clients * minimum
    shares = np.cumsum(_dirichlet_shares(rng, alpha, clients))
    ends = np.concatenate([[0], (shares[:-1] * spare).astype(np.int64), [spare]])
    sizes = np.diff(ends) + minimum
    return _sorted(np.split(rng.permutation(examples), np.cumsum(sizes)[:-1]))


def natural(part: Part, clients: int | None = None) -> Partition:
    """The owners that the data itself names: hospitals, subjects, books, users.

    Args:
        part: Training or test part of a data set.
        clients: Put the owners together into this many clients, the largest first, each to the
            client that has least so far. None: every owner is a client.

    Raises:
        ImpossibleSplit: Nobody owns these rows, or there are fewer owners than ``clients``.
    """
    if part.client is None:
        raise ImpossibleSplit(
            "this data set names no owners", hint="use iid, dirichlet, shards or quantity"
        )
    names, owner, sizes = np.unique(part.client, return_inverse=True, return_counts=True)
    if clients is None:
        clients = len(names)
    _at_least_one(clients)
    if clients > len(names):
        raise ImpossibleSplit(f"{len(names)} owners cannot be {clients} clients")
    if clients == len(names):
        return _by_owner(owner, clients)
    held = np.zeros(clients, np.int64)
    merged = np.empty(len(names), np.int64)
    for name in np.argsort(-sizes, kind="stable").tolist():
        merged[name] = int(held.argmin())
        held[merged[name]] += sizes[name]
    return _by_owner(merged[owner], clients)


def feature_noise(x: Array, partition: Sequence[Rows], level: float, *, seed: int = 0) -> Array:
    """Feature skew: client i of n gets Gaussian noise of variance ``level * (i + 1) / n``.

    Args:
        x: ``(N, ...)`` floating-point features; left as they are.
        partition: Which rows each client has.
        level: Variance of the noisiest client, >= 0.
        seed: Of the noise; a client's noise does not depend on the other clients.

    Returns:
        A new array like ``x``.

    Raises:
        ImpossibleSplit: ``level`` is negative or ``x`` holds no floating-point numbers.
    """
    if not level >= 0:
        raise ImpossibleSplit(f"noise level must be >= 0, got {level}")
    if not np.issubdtype(x.dtype, np.floating):
        raise ImpossibleSplit(f"noise needs floating-point features, not {x.dtype}")
    noisy = x.copy()
    for client, rows in enumerate(partition):
        rng = np.random.default_rng((seed, client))
        deviation = np.sqrt(level * (client + 1) / len(partition))
        noise = rng.standard_normal((len(rows), *x.shape[1:]), dtype=np.float32)
        noisy[rows] += (deviation * noise).astype(x.dtype)
    return noisy


# Spellings that FedML's configuration files use, too.
_METHODS = {
    "iid": "iid",
    "homo": "iid",
    "uniform": "iid",
    "dirichlet": "dirichlet",
    "hetero": "dirichlet",
    "shards": "shards",
    "classes": "classes",
    "quantity": "quantity",
    "natural": "natural",
}


def divide(
    part: Part,
    method: str,
    clients: int,
    *,
    alpha: float = 0.5,
    per_client: int = 2,
    minimum: int = 1,
    seed: int = 0,
) -> Partition:
    """Divide by the name of a method, as configuration files do.

    Args:
        part: What is divided.
        method: ``iid`` (``homo``, ``uniform``), ``dirichlet`` (``hetero``), ``shards``,
            ``classes``, ``quantity`` or ``natural``.
        clients: How many clients.
        alpha: For ``dirichlet`` and ``quantity``.
        per_client: Shards or classes of each client.
        minimum: For ``dirichlet`` and ``quantity``: examples that every client has at least.
        seed: Of the draw.

    Raises:
        ImpossibleSplit: The method is unknown, needs classes that the data does not have, or cannot
            be satisfied.
    """
    match _METHODS.get(method):
        case "iid":
            return iid(len(part), clients, seed=seed)
        case "quantity":
            return quantity(len(part), clients, alpha, seed=seed, minimum=minimum)
        case "natural":
            return natural(part, clients)
        case "dirichlet":
            return dirichlet(_classes(part), clients, alpha, seed=seed, minimum=minimum)
        case "shards":
            return shards(_classes(part), clients, per_client, seed=seed)
        case "classes":
            return classes_each(_classes(part), clients, per_client, seed=seed)
    raise ImpossibleSplit(
        f"no partition method is called {method!r}", hint=f"try {', '.join(_METHODS)}"
    )


def _classes(part: Part) -> Array:
    y: object = getattr(part, "y", None)
    if not isinstance(y, np.ndarray) or y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ImpossibleSplit(
            "this partition method needs one class a row, and the data has none",
            hint="use iid, quantity or natural",
        )
    return y


def _at_least_one(clients: int) -> None:
    if clients < 1:
        raise ImpossibleSplit(f"need at least one client, got {clients}")


def _enough(examples: int, clients: int, minimum: int) -> None:
    _at_least_one(clients)
    if minimum < 1:
        raise ImpossibleSplit(f"every client needs at least one example, got minimum={minimum}")
    if clients * minimum > examples:
        raise ImpossibleSplit(
            f"{examples} examples cannot give {clients} clients at least {minimum} each",
            hint=f"use at most {examples // minimum} clients",
        )


def _dirichlet_shares(rng: np.random.Generator, alpha: float, clients: int) -> Array:
    """One draw from Dir(alpha, …, alpha); also where alpha is so small that all gammas
    underflow."""
    shares: Array = rng.dirichlet(np.full(clients, alpha))
    if not np.isfinite(shares).all() or shares.sum() <= 0:
        # The limit of alpha -> 0: everything to one client.
        shares = np.zeros(clients)
        shares[rng.integers(clients)] = 1.0
    return shares


def _top_up(owner: Rows, labels: Array, clients: int, minimum: int) -> None:
    """Give clients that are short of `minimum` rows of the largest clients. Changes ``owner``."""
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes < minimum).tolist():
        while sizes[client] < minimum:
            giver = int(sizes.argmax())
            rows = np.flatnonzero(owner == giver)
            kinds, counts = np.unique(labels[rows], return_counts=True)
            plenty = rows[labels[rows] == kinds[counts.argmax()]]
            spare = min(minimum - sizes[client], sizes[giver] - minimum, len(plenty))
            owner[plenty[:spare]] = client
            sizes[giver] -= spare
            sizes[client] += spare


def _by_owner(owner: Rows, clients: int) -> Partition:
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=clients)
    return tuple(np.split(order.astype(np.int64), np.cumsum(sizes)[:-1]))


def _sorted(pieces: Sequence[Array]) -> Partition:
    return tuple(np.sort(piece).astype(np.int64) for piece in pieces)
