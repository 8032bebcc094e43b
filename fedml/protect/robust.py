# SPDX-License-Identifier: Apache-2.0
"""Combine a round by a rule that stands up to lying clients, instead of by the mean.

Such a rule needs all updates of a round, in the clear. It never holds them: updates are read in
chunks of coordinates from memory or from files, once or twice. Two kinds of rule cover them all:

* a *coordinate* rule looks at one coordinate of all clients at a time (median, trimmed mean);
* a *combination* rule gives each client a coefficient and adds up; all it looks at is the Gram
  matrix of the updates, n x n, since every distance and every iterate follows from it.

Before either, *mixing* may replace the updates by means of some of them, which is a matrix applied
to the rows, and to the Gram matrix from both sides. Nearest-neighbour mixing before a rule is the
best default known (Allouah et al. 2023)::

    fold = RobustFold(TrimmedMean(trim=2), mixing=[NearestNeighbours(byzantine=2)])

Clients count once each: an example count is as easily forged as an update.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fedml.federate.algorithm import BadParameter, Update
from fedml.federate.arrays import Array, Arrays, is_learned
from fedml.federate.exact_sum import mean_of
from fedml.federate.layout import BadUpdate, Given, Layout, Source, admit
from fedml.protect.rules import (
    Bucketing,
    CentredClipping,
    CombinationRule,
    CoordinateRule,
    Doubles,
    GeometricMedian,
    Krum,
    Matrix,
    Mean,
    Median,
    Mixing,
    NearestNeighbours,
    NormClipping,
    Origin,
    Rule,
    TooFewClients,
    TrimmedMean,
    medoid,
    require,
    squared_distances,
)

__all__ = [
    "Bucketing",
    "CentredClipping",
    "GeometricMedian",
    "Krum",
    "Mean",
    "Median",
    "NearestNeighbours",
    "NormClipping",
    "RobustFold",
    "TooFewClients",
    "TrimmedMean",
    "create",
    "parameter_names",
    "spelt",
]

_CELLS = 1 << 18  # updates times coordinates in one chunk: 1 MiB of float32

_Values: TypeAlias = Callable[[str, int, int], Matrix]


class RobustFold:
    """All updates of one round, combined by a rule; used like `aggregate.Fold`."""

    def __init__(
        self,
        rule: Rule,
        *,
        mixing: Sequence[Mixing] = (),
        layout: Layout | None = None,
        reference: Arrays | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        """Expect updates of ``layout``.

        Args:
            rule: What combines them.
            mixing: What is done before, in order.
            layout: What each must hold; None takes the first update's.
            reference: Where centred clipping starts, e.g. the last round's result; None is zero.
            rng: For bucketing; `cohort.server_generator(seed, round)`.
        """
        self.layout = layout
        self._rule = rule
        self._mixing = tuple(mixing)
        self._reference = reference
        self._rng = rng
        self._sources: dict[int, Source] = {}
        self._metrics: dict[str, list[float]] = {}

    @property
    def clients(self) -> list[int]:
        """Who was added, sorted; the order of rows and of coefficients."""
        return sorted(self._sources)

    def add(
        self,
        client: int,
        given: Given,
        weight: float = 1.0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Take one client's update, in any order; ``weight`` is checked and otherwise ignored.

        Raises:
            BadUpdate: It is malformed or was added before; nothing changed.
        """
        if client in self._sources:
            raise BadUpdate(client, None, "was counted before")
        source = admit(client, given, weight, self.layout)
        source.close()
        if self.layout is None:
            self.layout = Layout(source.specs)
        self._sources[client] = source
        for name, value in (metrics or {}).items():
            if math.isfinite(value):  # or one liar makes every median NaN
                self._metrics.setdefault(name, []).append(float(value))

    def result(self) -> Update:
        """What the rule makes of all that was added.

        Returns:
            An update whose weight is the number of clients, and each metric the median.

        Raises:
            ValueError: Nothing was added.
            TooFewClients: The rule cannot work with so few.
        """
        if self.layout is None or not self._sources:
            raise ValueError("no update to combine")
        require(self._rule, self._mixing, len(self._sources))
        rows = _Rows([self._sources[client] for client in self.clients], self.layout)
        try:
            arrays = self._combined(rows)
        finally:
            for source in self._sources.values():
                source.close()
        metrics = {name: float(np.median(values)) for name, values in self._metrics.items()}
        return Update(arrays=arrays, weight=float(len(self._sources)), metrics=metrics)

    def _combined(self, rows: _Rows) -> Arrays:
        rule = self._rule
        if isinstance(rule, CoordinateRule):
            mix = self._mix(rows.gram()) if self._mixing else None
            return rows.each_coordinate(rule, mix)
        return self._combination(rows, rule)

    def _combination(self, rows: _Rows, rule: CombinationRule) -> Arrays:
        reference: Arrays | None = None
        if rule.origin is Origin.REFERENCE:
            reference = self._reference or {}
            gram = rows.gram(reference)
        elif isinstance(rule, Krum):
            gram = rows.rough_gram()  # it only ranks
        else:
            gram = rows.gram()
        if self._mixing:
            mix = self._mix(gram)
            return rows.weighed(rule.coefficients(mix @ gram @ mix.T) @ mix, reference)
        return rows.weighed(rule.coefficients(gram), reference)

    def _mix(self, gram: Doubles) -> Doubles:
        total: Doubles = np.eye(len(gram))
        for step in self._mixing:
            if self._rng is None and isinstance(step, Bucketing):
                raise ValueError("bucketing is random: give RobustFold an rng")
            rng = self._rng or np.random.default_rng(0)
            total = step.weights(total @ gram @ total.T, rng) @ total
        return total


class _Rows:
    """The updates as the rows of one wide matrix that is never held."""

    def __init__(self, sources: Sequence[Source], layout: Layout) -> None:
        self._sources = sources
        self._layout = layout
        self._step = max(_CELLS // len(sources), 64)

    def gram(self, reference: Arrays | None = None) -> Doubles:
        """Gram matrix in float64 of the updates less the reference.

        Without a reference, as seen from zero; or from the update in their midst, where the
        distances between them would drown in their norms. Never from their mean, which one liar
        can put anywhere. Only what is learned counts: a batch counter says nothing about who lies.
        """
        out = self._product(
            np.float64, lambda name, start, stop: _part(reference, name, start, stop)
        )
        if reference is not None or not _drowned(out, 1e-9):
            return out
        midst = self._sources[medoid(squared_distances(out))]
        return self._product(np.float64, midst.read)

    def rough_gram(self) -> Doubles:
        """Gram matrix from float32 products; redone in float64 where distances would drown."""
        with np.errstate(over="ignore", invalid="ignore"):
            out = self._product(np.float32, lambda name, start, stop: None)
        if not np.isfinite(out).all() or _drowned(out, 1e-3):
            return self.gram()
        return out

    def _product(
        self, dtype: type[np.floating[Any]], origin: Callable[[str, int, int], Array | None]
    ) -> Doubles:
        out = np.zeros((len(self._sources),) * 2)
        for name, start, stop in self._learned():
            matrix = self._matrix(name, start, stop)
            if dtype is np.float64:
                matrix = matrix.astype(np.float64, copy=False)
            if (zero := origin(name, start, stop)) is not None:
                matrix = matrix - zero
            out += matrix @ matrix.T
        return out

    def each_coordinate(self, rule: CoordinateRule, mix: Doubles | None) -> Arrays:
        """Apply a coordinate rule, after mixing."""

        def values(name: str, start: int, stop: int) -> Matrix:
            matrix = self._matrix(name, start, stop)
            if mix is not None:
                matrix = mix.astype(matrix.dtype) @ matrix
            return rule.across(np.ascontiguousarray(matrix.T))

        return self._filled(values)

    def weighed(self, coefficients: Doubles, reference: Arrays | None) -> Arrays:
        """``reference + sum_i coefficient_i (update_i - reference)``; zero where there is none."""
        rest = 1 - float(coefficients.sum())
        used = np.flatnonzero(coefficients).tolist()

        def values(name: str, start: int, stop: int) -> Matrix:
            out = np.zeros(stop - start)
            for i in used:
                out += coefficients[i] * self._sources[i].read(name, start, stop).astype(np.float64)
            if reference is not None and name in reference:
                out += rest * reference[name].reshape(-1)[start:stop]
            return out

        return self._filled(values)

    def _filled(self, values: _Values) -> Arrays:
        arrays: Arrays = {}
        for name, spec in self._layout.tensors.items():
            flat = np.empty(spec.size, spec.dtype)
            for start in range(0, spec.size, self._step):
                stop = min(start + self._step, spec.size)
                part = values(name, start, stop).astype(np.float64, copy=False)
                flat[start:stop] = mean_of(part, 1.0, spec.dtype)
            arrays[name] = flat.reshape(spec.shape)
        return arrays

    def _learned(self) -> Sequence[tuple[str, int, int]]:
        tensors = self._layout.tensors
        return [
            (name, start, stop)
            for name, start, stop in self._layout.chunks(self._step)
            if is_learned(name, tensors[name].dtype)
        ]

    def _matrix(self, name: str, start: int, stop: int) -> Array:
        narrow = self._layout.tensors[name].dtype in (np.float16, np.float32)
        out = np.empty((len(self._sources), stop - start), np.float32 if narrow else np.float64)
        for row, source in zip(out, self._sources, strict=True):
            row[:] = source.read(name, start, stop)
        return out


def _part(reference: Arrays | None, name: str, start: int, stop: int) -> Array | None:
    if reference is None or name not in reference:
        return None
    return reference[name].reshape(-1)[start:stop]


def _drowned(gram: Doubles, share: float) -> bool:
    """Whether two updates are closer than ``share`` of their squared norms tells apart."""
    norms = np.diagonal(gram)
    apart = squared_distances(gram)
    np.fill_diagonal(apart, np.inf)
    return bool((apart < share * (norms[:, None] + norms)).any())


def create(name: str, parameters: Mapping[str, Any] | None = None) -> Rule:
    """A rule by name; FedML's values of ``defense_type`` and their parameters are understood.

    Raises:
        BadParameter: The name or a parameter is unknown; the error lists those that are.
    """
    rule, _ = _named(name)
    given = spelt(name, parameters or {})
    known = parameter_names(name)
    for key in given:
        if key not in known:
            raise BadParameter(
                f"{name}: unknown parameter {key!r}; known are {', '.join(known) or 'none'}"
            )
    for field in dataclasses.fields(rule):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise BadParameter(f"{name}: there is no `{field.name}`; it needs one")
    built: Rule = rule(**given)
    return built


def spelt(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a rule under our names instead of FedML's.

    Raises:
        BadParameter: No rule goes by this name.
    """
    _, spellings = _named(name)
    return {spellings.get(key, key): value for key, value in parameters.items()}


def parameter_names(name: str) -> tuple[str, ...]:
    """What a rule can be told.

    Raises:
        BadParameter: No rule goes by this name.
    """
    return tuple(field.name for field in dataclasses.fields(_named(name)[0]))


def _named(name: str) -> tuple[Any, Mapping[str, str]]:
    plain = name.lower().replace("-", "_")
    found = _RULES.get(_ALSO_CALLED.get(plain, plain))
    if found is None:
        raise BadParameter(f"no robust rule is called {name!r}; there are {', '.join(_RULES)}")
    return found


_RULES: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    "mean": (Mean, {}),
    "median": (Median, {}),
    "trimmed_mean": (TrimmedMean, {"trim_param_b": "trim", "beta": "trim"}),
    "krum": (Krum, {"byzantine_client_num": "byzantine", "krum_param_m": "keep"}),
    "geometric_median": (GeometricMedian, {}),
    "centred_clipping": (CentredClipping, {"tau": "radius"}),
    "norm_clipping": (NormClipping, {"norm_bound": "bound"}),
}
_ALSO_CALLED: Mapping[str, str] = {
    "wise_median": "median",
    "multikrum": "krum",
    "multi_krum": "krum",
    "geo_median": "geometric_median",
    "rfa": "geometric_median",
    "cclip": "centred_clipping",
    "centered_clipping": "centred_clipping",
    "norm_diff_clipping": "norm_clipping",
    "diff_clipping": "norm_clipping",
}
