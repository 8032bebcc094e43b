# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on named arrays: what every algorithm file writes its equations with.

Everything is pure: arguments are never written to. Sums are taken in float64 and rounded once to
the dtype of the first argument, so a float32 model stays float32 and an integer buffer (a batch
counter) stays integer.

Several sets of arrays travel as one by *tagging*: ``tagged("control", c)`` renames ``w`` to
``control::w``, and ``untagged("control", both)`` takes that set out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = dict[str, Array]

_MARK = "::"


def require_same(what: str, given: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Raise ValueError, naming the tensor, unless both hold equal names and shapes."""
    for name in expected:
        if name not in given:
            raise ValueError(f"{what}: tensor {name!r} is missing")
        if given[name].shape != expected[name].shape:
            raise ValueError(
                f"{what}: tensor {name!r} has shape {given[name].shape}, "
                f"expected {expected[name].shape}"
            )
    for name in given:
        if name not in expected:
            raise ValueError(f"{what}: tensor {name!r} is not one of the model's")


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """``values`` (float64) in ``dtype``; integers are rounded to the nearest, ties to even."""
    if dtype.kind in "iu":
        values = np.rint(values)
    # Arithmetic on arrays without dimensions gives NumPy scalars, which no file format takes.
    return np.asarray(values.astype(dtype, copy=False))


def moved(model: Arrays, step: Mapping[str, Array], scale: float = 1.0) -> Arrays:
    """``model + scale * step``, name by name, in the model's dtypes."""
    if scale == 1.0:
        return {name: _exactly(np.add, array, step[name]) for name, array in model.items()}
    return {
        name: rounded(array.astype(np.float64) + scale * step[name].astype(np.float64), array.dtype)
        for name, array in model.items()
    }


def difference(later: Mapping[str, Array], earlier: Arrays) -> Arrays:
    """``later - earlier``, in the dtypes of ``earlier``; a client's delta ``w_i - w``."""
    return {
        name: _exactly(np.subtract, later[name], array, array.dtype)
        for name, array in earlier.items()
    }


def _exactly(
    operation: np.ufunc, left: Array, right: Array, dtype: np.dtype[Any] | None = None
) -> Array:
    """A sum or difference taken in float64 and rounded once to ``dtype``, else the left one's.

    Between floats of one type the operation on that type gives the same bits, at a tenth of the
    time: float64 has more than twice their digits, so rounding twice changes nothing (Figueroa,
    "When is double rounding innocuous?", SIGNUM Newsletter 30(3), 1995).
    """
    dtype = dtype or left.dtype
    if left.dtype == right.dtype == dtype and dtype.kind == "f":
        return np.asarray(operation(left, right))
    return rounded(operation(left.astype(np.float64), right.astype(np.float64)), dtype)


def scaled(arrays: Mapping[str, Array], factor: float) -> Arrays:
    """``factor * arrays``, in the dtypes of ``arrays``."""
    return {name: rounded(factor * a.astype(np.float64), a.dtype) for name, a in arrays.items()}


def zeros(arrays: Mapping[str, Array], dtype: npt.DTypeLike | None = None) -> Arrays:
    """Zeros of the same names and shapes, in ``dtype`` if one is given."""
    return {name: np.zeros_like(array, dtype=dtype) for name, array in arrays.items()}


def is_learned(name: str, dtype: np.dtype[Any]) -> bool:
    """Whether training moves the tensor.

    The others are statistics: integers, and the running mean and variance of batch normalisation
    as torch names them. A server optimiser must not extrapolate those (a variance may turn
    negative); every algorithm here gives them the clients' mean.
    """
    return dtype.kind == "f" and not name.endswith(("running_mean", "running_var"))


def learned(arrays: Mapping[str, Array]) -> Arrays:
    """Those arrays that training moves (`is_learned`), in order."""
    return {name: array for name, array in arrays.items() if is_learned(name, array.dtype)}


def squared_norm(arrays: Mapping[str, Array]) -> float:
    """The squared Euclidean norm over all arrays together, in float64."""
    total = 0.0
    for array in arrays.values():
        flat = array.astype(np.float64).ravel()
        total += float(flat @ flat)
    return total


def tagged(tag: str, arrays: Mapping[str, Array]) -> Arrays:
    """The same arrays under ``tag::name``."""
    return {f"{tag}{_MARK}{name}": np.asarray(array) for name, array in arrays.items()}


def untagged(tag: str, arrays: Mapping[str, Array]) -> Arrays:
    """The arrays that ``tagged(tag, ...)`` put in, under their own names again."""
    start = tag + _MARK
    return {name[len(start) :]: a for name, a in arrays.items() if name.startswith(start)}


def without_tags(arrays: Mapping[str, Array], tags: Iterable[str]) -> Arrays:
    """The arrays that carry none of ``tags``."""
    starts = tuple(tag + _MARK for tag in tags)
    return {name: array for name, array in arrays.items() if not name.startswith(starts)}
