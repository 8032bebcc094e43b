# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a round, and with which random numbers.

Everything here is a function of its arguments alone, so the simulator, a deployed broker and a
broker that restarted in the middle of a round all choose the same clients and hand each the same
generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# What the numbers are for is part of the key, so that no two uses share a stream.
_CHOICE, _CLIENT, _SERVER = 0, 1, 2


def choose(seed: int, round_index: int, clients: Sequence[int], count: int) -> list[int]:
    """Pick ``count`` clients for a round, uniformly, without replacement.

    Args:
        seed: The run's seed, >= 0.
        round_index: Which round, from 0.
        clients: Those who can take part, distinct; the order they are given in does not matter.
        count: How many, >= 1; all of ``clients`` are taken when there are no more.

    Returns:
        The chosen ones, sorted: the canonical order of the round.

    Raises:
        ValueError: ``count`` < 1, no clients, or a client twice.
    """
    # A range is sorted and distinct as it is; a simulator asks a thousand times a second.
    known: Sequence[int] = clients
    if not (isinstance(clients, range) and clients.step > 0):
        known = sorted(clients)
        if len(set(known)) < len(known):
            raise ValueError("a client is listed twice")
    if count < 1 or not known:
        raise ValueError(f"cannot choose {count} of {len(known)} clients")
    if count >= len(known):
        return list(known)
    # The raw words of a bit generator never change between releases of numpy, as `choice` may.
    keys = _bits(_CHOICE, seed, round_index).random_raw(len(known))
    return [known[i] for i in sorted(np.argpartition(keys, count - 1)[:count].tolist())]


def generator(seed: int, round_index: int, client: int) -> np.random.Generator:
    """The random numbers of one client in one round, independent of every other pair's."""
    return _stream(_CLIENT, seed, round_index, client)


def server_generator(seed: int, round_index: int) -> np.random.Generator:
    """The server's own random numbers in one round (noise, bucketing)."""
    return _stream(_SERVER, seed, round_index)


def with_spares(count: int, expected_loss: float) -> int:
    """How many clients to ask so that ``count`` of them answer, on average.

    Args:
        count: Answers wanted, >= 1.
        expected_loss: The share of clients that drop out, in [0, 1).

    Returns:
        ``ceil(count / (1 - expected_loss))`` (Bonawitz et al. 2019, section 2.3, over-select by
        30 %, is an expected loss of 0.23).
    """
    if count < 1 or not 0 <= expected_loss < 1:
        raise ValueError(f"need count >= 1 and a loss in [0, 1), got {count} and {expected_loss}")
    return math.ceil(count / (1 - expected_loss))


def _stream(use: int, *key: int) -> np.random.Generator:
    return np.random.Generator(_bits(use, *key))


def _bits(use: int, *key: int) -> np.random.Philox:
    if min(key) < 0:
        raise ValueError(f"seeds, rounds and clients count from 0, got {key}")
    # Length-prefixed words: SeedSequence reads (1,) and (1, 0) as the same entropy.
    return np.random.Philox(np.random.SeedSequence([len(key), use, *key]))
