# SPDX-License-Identifier: Apache-2.0
"""Combine the updates of a round into one: the weighted mean, correctly rounded.

The result of every way of combining here is defined by one formula, for each coordinate::

    mean = dtype( fsum(w_k * x_k) / fsum(w_k) )        fsum: exact sum, rounded once to float64

so it depends on the updates alone: not on the order they came in, nor on how they were grouped
into partial sums, nor on the machine.

`Fold` is the fast one, for updates that stay readable until the result (files, or arrays that
nobody changes). It sums in plain float64, keeps a bound of its rounding error, and at the end
sums again, exactly, those few coordinates whose last bit the bound leaves open (Ziv's test). It
needs one float64 accumulator and some two megabytes, whatever the number of clients. Often no bit
is left open: where all terms are whole multiples of one unit, and together fewer than 2**53 of
them, float64 holds the exact sum. (Ties are common with few clients: the mean of two equal weights
lies half-way between two floats for every second coordinate.)
`exact_sum.PartialSum` is the one that forgets what it was given and can be merged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedml.federate.algorithm import Update
from fedml.federate.arrays import Array, Arrays
from fedml.federate.exact_sum import Levels, PartialSum, WeightedMetrics, mean_of, weighted
from fedml.federate.layout import (
    CHUNK,
    COARSEST,
    BadUpdate,
    Given,
    Layout,
    Source,
    Spec,
    SumBroken,
    admit,
    fineness,
    grid,
    magnitude,
    quiet,
    require_finite,
)

__all__ = ["BadUpdate", "Fold", "Layout", "PartialSum", "SumBroken", "combine", "weighted_mean"]

_ROWS = 4  # clients folded in one pass over the accumulator
_UNIT = 2.0**-53
_BATCH = 1 << 16  # coordinates summed again at a time

_Coordinates: TypeAlias = dict[str, npt.NDArray[np.intp]]


class Fold:
    """The weighted mean of one round, as updates come in.

    Everything given is referred to until `result`: leave arrays unchanged and files in place.
    """

    def __init__(self, layout: Layout | None = None, *, check_values: bool = True) -> None:
        """Expect updates of ``layout``.

        Args:
            layout: What each must hold (`Algorithm.layout`); None takes the first update's, which
                trusts the first client.
            check_values: Look for NaN and infinities in `add`, which costs one more reading of the
                update; otherwise `result` finds them.
        """
        self.layout = layout
        self._check_values = check_values
        self._added: list[tuple[int, Source, float]] = []
        self._folded = 0
        self._broken = False
        self._seen: set[int] = set()
        self._metrics = WeightedMetrics()
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        # Of each chunk: what bounds its sum, and the unit of which all its terms are multiples.
        self._bounds: dict[str, npt.NDArray[np.float64]] = {}
        self._units: dict[str, npt.NDArray[np.int64]] = {}
        self._exact: dict[str, Levels] = {}

    @property
    def clients(self) -> list[int]:
        """Who was added, sorted."""
        return sorted(self._seen)

    def add(
        self,
        client: int,
        given: Given,
        weight: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Take one client's update, in any order.

        Args:
            client: Its number in the round's cohort; each counts once.
            given: Arrays by name, or the path of a safetensors file.
            weight: How much it counts, in [0, 2**200].
            metrics: Named numbers, averaged with the same weight.

        Raises:
            BadUpdate: It is malformed or was counted before. The fold is as it was.
            SumBroken: An update accepted earlier has changed or gone since; start anew.
        """
        self._require_whole()
        if client in self._seen:
            raise BadUpdate(client, None, "was counted before")
        source = admit(client, given, weight, self.layout, values=self._check_values)
        source.close()
        if self.layout is None:
            self.layout = Layout(source.specs)
        self._seen.add(client)
        self._added.append((client, source, weight))
        self._metrics.add(metrics or {}, weight)
        if len(self._added) - self._folded == _ROWS:
            self._fold_pending()

    def result(self) -> Update:
        """The weighted mean of all that was added, in the layout's dtypes. Ends the fold.

        Raises:
            ValueError: Nothing of weight > 0 was added.
            BadUpdate: Values were not checked in `add`, and one is NaN or infinite.
            SumBroken: An update has changed or gone since it was accepted; start anew.
        """
        self._require_whole()
        total = math.fsum(weight for _, _, weight in self._added)
        if self.layout is None or not total > 0:
            raise ValueError("no update of weight > 0 to take a mean of")
        self._fold_pending()
        arrays: Arrays = {}
        unsure: _Coordinates = {}
        for name, spec in self.layout.tensors.items():
            if name in self._exact:
                levels = self._exact.pop(name)
                arrays[name] = mean_of(levels.rounded_sum(), total, spec.dtype).reshape(spec.shape)
            else:
                arrays[name], unsure[name] = self._finish(name, spec, total)
        for batch in _batches(unsure):
            with self._reading():
                again = self._sum_again(batch)
            for name, sums in again.items():
                flat = arrays[name].reshape(-1)
                flat[batch[name]] = mean_of(sums, total, flat.dtype)
        return Update(arrays=arrays, weight=total, metrics=self._metrics.means())

    def _fold_pending(self) -> None:
        """Add up to `_ROWS` updates to the accumulators in one pass."""
        pending = self._added[self._folded :]
        if not pending or self.layout is None:
            return
        if not self._sums and not self._exact:
            self._open(self.layout)
        weights = np.array([weight for _, _, weight in pending])
        fine = [fineness(weight) for _, _, weight in pending]
        rows = np.empty((len(pending), CHUNK))
        partial = np.empty(CHUNK)
        with self._reading(), quiet(), contextlib.ExitStack() as files:
            for _, source, _ in pending:
                files.callback(source.close)
            for name, start, stop in self.layout.chunks():
                if name in self._exact:
                    for client, source, weight in pending:
                        if not self._check_values:
                            require_finite(client, name, source.read(name, start, stop))
                        term = weighted(source, name, start, stop, weight)
                        self._exact[name].deposit(term, start)
                    continue
                size, chunk = stop - start, start // CHUNK
                bound, unit = float(self._bounds[name][chunk]), int(self._units[name][chunk])
                for row, (_, source, weight), whole in zip(rows, pending, fine, strict=True):
                    values = source.read(name, start, stop)
                    row[:size] = values
                    if _is_exact(bound, unit):
                        smallest, most = grid(values)
                        unit = min(unit, smallest + whole)
                    else:  # and never will be again
                        most = magnitude(values)
                    bound += weight * most
                # Summed in any order inside the product: `_finish` allows for all of them.
                np.dot(weights, rows[:, :size], out=partial[:size])
                self._sums[name][start:stop] += partial[:size]
                self._bounds[name][chunk], self._units[name][chunk] = bound, unit
        self._folded = len(self._added)

    def _require_whole(self) -> None:
        if self._broken:
            raise SumBroken("an update changed after it was accepted; fold the round anew")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """While accepted updates are read again; what breaks off in here leaves half a sum."""
        self._broken = True
        try:
            yield
        except BadUpdate:
            raise
        except (OSError, ValueError, OverflowError) as error:
            raise SumBroken(f"an accepted update cannot be read again: {error}") from error
        self._broken = False

    def _open(self, layout: Layout) -> None:
        for name, spec in layout.tensors.items():
            if spec.dtype.kind == "f" and spec.dtype.itemsize < 8:
                self._sums[name] = np.zeros(spec.size)
                chunks = -(-spec.size // CHUNK)
                self._bounds[name] = np.zeros(chunks)
                self._units[name] = np.full(chunks, COARSEST)
            else:
                # Float64 leaves no spare bits for a test of the last one.
                self._exact[name] = Levels(spec.size)

    def _finish(self, name: str, spec: Spec, total: float) -> tuple[Array, npt.NDArray[np.intp]]:
        """The mean of one tensor, and the coordinates whose last bit the error bound leaves open.

        The mean is written over the accumulator, chunk by chunk from the front, where it is
        always behind what is still to be read; so no second model is needed.
        """
        sums = self._sums.pop(name)
        out = sums.view(spec.dtype)
        open_bits: list[npt.NDArray[np.intp]] = []
        for index, start in enumerate(range(0, spec.size, CHUNK)):
            stop = min(start + CHUNK, spec.size)
            bound = self._bounds[name][index]
            if _is_exact(bound, int(self._units[name][index])):
                out[start:stop] = mean_of(sums[start:stop], total, spec.dtype)
                continue
            chunk = sums[start:stop].copy()
            if not np.isfinite(chunk).all():
                self._blame(name)
            # n terms of at most b in sum are added with an error of at most n * u * b, in any
            # order; twice that covers the rounding of the two lines that follow as well.
            slack = 2 * (len(self._added) + 2) * _UNIT * bound
            with np.errstate(over="ignore"):
                low = mean_of(chunk - slack, total, spec.dtype)
                high = mean_of(chunk + slack, total, spec.dtype)
            open_bits.append(np.flatnonzero(low != high) + start)
            out[start:stop] = low
        # Give the unused part of the accumulator back; `out` still points at its front.
        size, item = spec.size, spec.dtype.itemsize
        del out
        sums.resize(-(-size * item // 8), refcheck=False)
        empty = np.empty(0, np.intp)
        return (
            sums.view(spec.dtype)[:size].reshape(spec.shape),
            np.concatenate(open_bits) if open_bits else empty,
        )

    def _sum_again(self, batch: _Coordinates) -> dict[str, npt.NDArray[np.float64]]:
        """Exact sums of some coordinates, reading them once more from every update."""
        levels = {name: Levels(len(indices)) for name, indices in batch.items()}
        for _, source, weight in self._added:
            try:
                for name, indices in batch.items():
                    term = source.take(name, indices).astype(np.float64)
                    term *= weight
                    levels[name].deposit(term)
            finally:
                source.close()
        return {name: level.rounded_sum() for name, level in levels.items()}

    def _blame(self, name: str) -> None:
        """Raise BadUpdate for the client whose values made the sum of ``name`` not finite."""
        spec = self.layout.tensors[name] if self.layout else None
        for client, source, _ in self._added:
            if spec is not None:
                with quiet():
                    require_finite(client, name, source.read(name, 0, spec.size))
        raise SumBroken(f"tensor {name!r}: an update changed after it was accepted")


def _is_exact(bound: float, unit: int) -> bool:
    """Whether sums of multiples of ``2**unit`` were never rounded, if none exceeds ``bound``."""
    return bound <= math.ldexp(1.0, unit + 53)


def _batches(unsure: _Coordinates) -> Iterator[_Coordinates]:
    """The same coordinates, at most `_BATCH` at a time."""
    batch: _Coordinates = {}
    room = _BATCH
    for name, indices in unsure.items():
        while len(indices):
            batch[name], indices = indices[:room], indices[room:]
            room -= len(batch[name])
            if not room:
                yield batch
                batch, room = {}, _BATCH
    if batch:
        yield batch


def combine(updates: Iterable[Update]) -> Update:
    """All updates as one: the mean of their arrays and metrics, counted by weight.

    Args:
        updates: One or more, of equal names, shapes and dtypes.

    Returns:
        An update of the summed weight; client states are dropped.

    Raises:
        BadUpdate: They do not fit together, or one holds NaN or an infinity; clients are numbered
            by their place in ``updates``.
        ValueError: There is none of weight > 0.
    """
    fold = Fold(check_values=False)
    for place, update in enumerate(updates):
        fold.add(place, update.arrays, update.weight, update.metrics)
    return fold.result()


def weighted_mean(updates: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """Average arrays, each counted by its weight (McMahan et al. 2017, Algorithm 1).

    Args:
        updates: K mappings with equal names; under one name, K arrays of one shape and dtype.
        weights: K numbers >= 0, usually examples seen by each client; their sum is > 0.

    Returns:
        One mapping, same names, shapes and dtypes as ``updates[0]``.

    Raises:
        ValueError: Names, shapes, dtypes or weights do not fit together.
    """
    if len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates but {len(weights)} weights")
    return combine(
        Update(arrays=arrays, weight=weight)
        for arrays, weight in zip(updates, weights, strict=True)
    ).arrays
