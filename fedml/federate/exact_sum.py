# SPDX-License-Identifier: Apache-2.0
"""Weighted sums without rounding, so that grouping and order cannot change a bit.

A sum is kept as a few float64 arrays ("levels") whose exact sum, coordinate by coordinate, is the
exact sum of everything that was added. One addition is Knuth's TwoSum, which splits ``a + b`` into
the rounded sum and the rounding error, both exact; the error goes to the next level, and a level is
opened only where an error is left over. Two levels are the rule; a third appears where values of
one coordinate span more than some 2**46.

What is exact cannot depend on order: clients may be summed on many machines, partial sums of
partial sums merged in any tree, and the result is that of the flat sum, bit for bit.

Knuth, "The Art of Computer Programming", vol. 2, 4.2.2, theorem B; Shewchuk, "Adaptive Precision
Floating-Point Arithmetic", 1997.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedml.federate.algorithm import Update
from fedml.federate.arrays import Array, Arrays, rounded, tagged, untagged
from fedml.federate.layout import BadUpdate, Given, Layout, Source, Spec, SumBroken, admit

_Doubles = npt.NDArray[np.float64]

_DEEPEST = 48  # levels of 53 bits that cover all of float64, and some
_LARGEST = 2.0**1000


class Levels:
    """The exact sum of float64 vectors of one length, as levels of float64."""

    __slots__ = ("_scratch", "_size", "arrays")

    def __init__(self, size: int) -> None:
        self._size = size
        self._scratch = np.empty((3, 0))
        self.arrays: list[_Doubles] = [np.zeros(size)]

    def deposit(self, term: _Doubles, start: int = 0) -> None:
        """Add ``term`` to the coordinates from ``start`` on; ``term`` is used up as scratch."""
        stop = start + len(term)
        if self._scratch.shape[1] < len(term):
            self._scratch = np.empty((3, len(term)))
        total, part, rest = self._scratch[:, : len(term)]
        depth = 0
        while True:
            if depth == _DEEPEST:
                raise OverflowError("a sum overflowed, or a term was not finite")
            if depth == len(self.arrays):
                self.arrays.append(np.zeros(self._size))
            level = self.arrays[depth][start:stop]
            # TwoSum: total = fl(level + term), and term becomes the exact rounding error.
            np.add(level, term, out=total)
            np.subtract(total, level, out=part)
            np.subtract(total, part, out=rest)
            np.subtract(level, rest, out=rest)
            np.subtract(term, part, out=term)
            np.add(term, rest, out=term)
            level[:] = total
            if not term.any():
                return
            depth += 1

    def rounded_sum(self, start: int = 0, stop: int | None = None) -> _Doubles:
        """The float64 nearest to the exact sum, coordinate by coordinate."""
        levels = [level[start:stop] for level in self.arrays]
        if len(levels) == 1:
            return levels[0].copy()
        total: _Doubles = levels[0] + levels[1]  # one addition: correctly rounded
        if len(levels) > 2:
            for i in np.flatnonzero(np.any(levels[2:], axis=0)).tolist():
                total[i] = math.fsum(float(level[i]) for level in levels)
        return total


class WeightedMetrics:
    """Exact weighted means of named numbers; each over the clients that reported it."""

    __slots__ = ("sums",)

    def __init__(self) -> None:
        # (sum of weight * value, sum of weight); None once a value was not finite.
        self.sums: dict[str, tuple[Fraction, Fraction] | None] = {}

    def add(self, metrics: Mapping[str, float], weight: float) -> None:
        """Count one client's numbers; one that counts and is not finite makes that mean NaN."""
        # What is said of no examples counts for nothing, whatever it is: often NaN.
        for name, value in metrics.items() if weight else ():
            product = weight * float(value)
            self._put(
                name,
                (Fraction(product), Fraction(weight)) if math.isfinite(product) else None,
            )

    def merge(self, other: WeightedMetrics) -> None:
        """Count all that ``other`` counted."""
        for name, pair in other.sums.items():
            self._put(name, pair)

    def means(self) -> dict[str, float]:
        """Name to mean; NaN where a value that was not finite stands behind it."""
        out: dict[str, float] = {}
        for name in sorted(self.sums):
            pair = self.sums[name]
            out[name] = float(pair[0]) / float(pair[1]) if pair else math.nan
        return out

    def _put(self, name: str, pair: tuple[Fraction, Fraction] | None) -> None:
        old = self.sums.get(name, (Fraction(0), Fraction(0)))
        self.sums[name] = (
            None if old is None or pair is None else (old[0] + pair[0], old[1] + pair[1])
        )


class PartialSum:
    """The exact weighted sum of some clients' updates; partial sums merge into partial sums.

    It holds two float64 arrays for each array of the update (four float32 models), whatever the
    number of clients, and nothing of what it was given. Where all updates end up in one place, as
    files, `aggregate.Fold` needs half of that and gives the same bits.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        """Expect updates of ``layout``; None takes the first update's."""
        self.layout = layout
        self.clients: set[int] = set()
        self.weight = Fraction(0)
        self._broken = False
        self._metrics = WeightedMetrics()
        self._levels: dict[str, Levels] = {}
        if layout is not None:
            self._open(layout)

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each."""
        return self._metrics.means()

    def add(
        self,
        client: int,
        given: Given,
        weight: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Add one client's update: arrays, or a safetensors file's path.

        Raises:
            BadUpdate: It is malformed or this client was counted before; nothing was added.
            SumBroken: Its file was cut or changed while it was added; start anew.
        """
        self._require_whole()
        if client in self.clients:
            raise BadUpdate(client, None, "was counted before")
        source = admit(client, given, weight, self.layout)
        self._broken = True  # until every chunk is in
        try:
            layout = self.layout or Layout(source.specs)
            self._open(layout)
            for name, start, stop in layout.chunks():
                self._levels[name].deposit(weighted(source, name, start, stop, weight), start)
        except (OSError, ValueError, OverflowError) as error:
            raise SumBroken(f"client {client}: its update changed after its check") from error
        finally:
            source.close()
        self._broken = False
        self.clients.add(client)
        self.weight += Fraction(weight)
        self._metrics.add(metrics or {}, weight)

    def merge(self, other: PartialSum) -> None:
        """Add all that ``other`` holds; ``other`` is left as it is.

        Raises:
            BadUpdate: A client is in both, or the layouts differ; nothing was added.
        """
        self._require_whole()
        other._require_whole()
        twice = self.clients & other.clients
        if twice:
            raise BadUpdate(min(twice), None, "was counted before")
        if other.layout is None:
            return
        if self.layout is not None:
            self.layout.check(min(other.clients, default=-1), other.layout.tensors)
        self._open(other.layout)
        self._broken = True
        for name, start, stop in other.layout.chunks():
            for level in other._levels[name].arrays:
                self._levels[name].deposit(level[start:stop].copy(), start)
        self._broken = False
        self.clients |= other.clients
        self.weight += other.weight
        self._metrics.merge(other._metrics)

    def result(self) -> Update:
        """The weighted mean of everything added, in the dtypes that were added.

        Raises:
            ValueError: Nothing of weight > 0 was added.
        """
        self._require_whole()
        if self.layout is None or not self.weight:
            raise ValueError("no update of weight > 0 to take a mean of")
        total = float(self.weight)
        arrays: Arrays = {}
        for name, spec in self.layout.tensors.items():
            out = np.empty(spec.size, spec.dtype)
            for start in range(0, spec.size, 1 << 16):
                stop = min(start + (1 << 16), spec.size)
                out[start:stop] = mean_of(
                    self._levels[name].rounded_sum(start, stop), total, spec.dtype
                )
            arrays[name] = out.reshape(spec.shape)
        return Update(arrays=arrays, weight=total, metrics=self._metrics.means())

    def to_arrays(self) -> Arrays:
        """Everything, as arrays that `from_arrays` turns back into an equal sum."""
        out: Arrays = {"clients": np.array(sorted(self.clients), np.int64)}
        out["weight"] = _parts(self.weight)
        for name, pair in self._metrics.sums.items():
            out |= tagged(f"metric::{name}", _metric_arrays(pair))
        for name, spec in (self.layout.tensors if self.layout else {}).items():
            out[f"like::{name}"] = np.empty(0, spec.dtype)
            for depth, level in enumerate(self._levels[name].arrays):
                out[f"sum{depth}::{name}"] = level.reshape(spec.shape)
        return out

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Rebuild what `to_arrays` wrote.

        Raises:
            ValueError: A part is missing, misshapen or not finite.
        """
        likes = untagged("like", arrays)
        needed = ["clients", "weight", *(f"sum0::{name}" for name in likes)]
        for name in needed:
            if name not in arrays:
                raise ValueError(f"not a partial sum: {name!r} is missing")
        specs = {n: Spec(arrays[f"sum0::{n}"].shape, like.dtype) for n, like in likes.items()}
        out = cls(Layout(specs) if specs else None)
        for name, spec in specs.items():
            depth = 0
            while (level := arrays.get(f"sum{depth}::{name}")) is not None:
                if level.shape != spec.shape or level.dtype != np.float64:
                    raise ValueError(f"not a partial sum: level {depth} of {name!r} is misshapen")
                if not (np.abs(level) <= _LARGEST).all():
                    raise ValueError(f"not a partial sum: level {depth} of {name!r} is not finite")
                out._levels[name].deposit(level.reshape(-1).copy())
                depth += 1
        out.clients = set(arrays["clients"].tolist())
        out.weight = _whole(arrays["weight"])
        if len(out.clients) != arrays["clients"].size or out.weight < 0:
            raise ValueError("not a partial sum: a client twice, or a weight below zero")
        for tag in sorted({name.rsplit("::", 1)[0] for name in arrays if name[:8] == "metric::"}):
            out._metrics.sums[tag[8:]] = _metric_pair(untagged(tag, arrays))
        return out

    def _require_whole(self) -> None:
        if self._broken:
            raise SumBroken("an earlier update broke off half added; start the sum anew")

    def _open(self, layout: Layout) -> None:
        self.layout = layout
        for name, spec in layout.tensors.items():
            if name not in self._levels:
                self._levels[name] = Levels(spec.size)


def weighted(source: Source, name: str, start: int, stop: int, weight: float) -> _Doubles:
    """``fl64(weight * values)`` of one run of elements: the terms that every sum is made of."""
    term = source.read(name, start, stop).astype(np.float64)
    term *= weight
    return term


def mean_of(sums: _Doubles, weight: float, dtype: np.dtype[Any]) -> Array:
    """From exact sums, each rounded once to float64, to the mean in ``dtype``.

    Every way of summing in this package ends here, which is why they agree to the bit: the result
    is ``dtype(fl64(sums / weight))``, nondecreasing in ``sums``, with -0 written as 0.
    """
    out = rounded(sums / weight, dtype)
    out += dtype.type(0)
    return out


def _parts(value: Fraction) -> _Doubles:
    """A fraction that is a sum of floats, as such floats."""
    out: list[float] = []
    while value:
        out.append(float(value))
        value -= Fraction(out[-1])
    return np.array(out, np.float64)


def _whole(parts: Array) -> Fraction:
    if parts.dtype != np.float64 or not np.isfinite(parts).all():
        raise ValueError("not a partial sum: a weight is not finite")
    return sum((Fraction(part) for part in parts.ravel().tolist()), Fraction(0))


def _metric_arrays(pair: tuple[Fraction, Fraction] | None) -> Arrays:
    return (
        {"nan": np.empty(0)}
        if pair is None
        else {"sum": _parts(pair[0]), "weight": _parts(pair[1])}
    )


def _metric_pair(arrays: Arrays) -> tuple[Fraction, Fraction] | None:
    if "sum" not in arrays or "weight" not in arrays:
        return None
    return _whole(arrays["sum"]), _whole(arrays["weight"])
