# SPDX-License-Identifier: Apache-2.0
"""Fewer bytes in an update: the largest entries only, or eight bits an entry.

Both turn the arrays of an update into other arrays, its *payload*, that any transport carries and
that say by their names how they are to be read::

    raw::w                  as it is: integers and tensors of fewer than 64 entries
    index::w, value::w      the entries kept, ascending flat indices; all others are 0
    code::w, scale::w       signed bytes, and one float32 for every 1,024 of them

`Packed` reads a payload as if it were the full update, chunk by chunk, so a fold over compressed
updates never holds a full one. Compress a delta, never a whole model (`Algorithm.deltas`), and
after clipping; noise belongs after summing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedml.federate.algorithm import BadParameter, Update
from fedml.federate.arrays import Array, Arrays
from fedml.federate.layout import Layout, Spec

_SMALL = 64
_BUCKET = 1024
_TOP = 127
_TAGS = ("raw", "code", "scale", "index", "value")


@dataclass(frozen=True, slots=True)
class TopK:
    """Keep the entries of largest magnitude, and remember the rest for the next round.

    Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018. With ``e`` the memory
    (0 at first) and ``D`` the delta::

        send top_k(e + D),   e <- e + D - top_k(e + D)

    so nothing is lost, only delayed; the sum of what was sent and the memory is the sum of the
    deltas.

    Attributes:
        fraction: Share of each tensor's entries that is kept, in (0, 1]; at least one is.
    """

    fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise BadParameter(f"topk: fraction must be in (0, 1], got {self.fraction!r}")

    def compress(self, update: Update, memory: Arrays | None = None) -> tuple[Update, Arrays]:
        """The update with its payload in place of its arrays, and the memory for next time.

        Args:
            update: What the algorithm's client sends.
            memory: What the last call returned, None the first time; the client keeps it.
        """
        payload: Arrays = {}
        kept: Arrays = {}
        for name, array in update.arrays.items():
            if _is_small(array):
                payload[f"raw::{name}"] = array
                continue
            whole = array.reshape(-1)
            if memory is not None and name in memory:
                whole = whole + memory[name].reshape(-1)
            k = math.ceil(self.fraction * whole.size)
            chosen = np.argpartition(np.abs(whole), whole.size - k)[whole.size - k :]
            chosen.sort()
            payload[f"index::{name}"] = chosen.astype(np.int64 if whole.size >> 31 else np.int32)
            payload[f"value::{name}"] = whole[chosen]
            rest = whole.copy()
            rest[chosen] = 0
            kept[name] = rest.reshape(array.shape)
        return dataclasses.replace(update, arrays=payload), kept


@dataclass(frozen=True, slots=True)
class Int8:
    """Round each entry to one of 255 levels, at random and without bias.

    Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
    Quantization and Encoding", NeurIPS 2017, with buckets scaled by their largest entry: with
    ``s = max |x| / 127`` of a bucket of 1,024 and ``u`` uniform in [0, 1)::

        code = floor(x / s + u),   E[s * code] = x,   Var[s * code] <= s^2 / 4
    """

    def compress(self, update: Update, rng: np.random.Generator) -> Update:
        """The update with its payload in place of its arrays; a quarter of float32's bytes."""
        payload: Arrays = {}
        # By name: a model that was read from a file has another order than one that was made.
        for name, array in sorted(update.arrays.items()):
            if _is_small(array):
                payload[f"raw::{name}"] = array
                continue
            buckets = -(-array.size // _BUCKET)
            values = np.zeros((buckets, _BUCKET))
            values.reshape(-1)[: array.size] = array.reshape(-1)
            exact = np.abs(values).max(axis=1) / _TOP
            scale = exact.astype(np.float32)
            # Rounded up, so that no entry lies beyond the top level.
            scale = np.where(scale < exact, np.nextafter(scale, np.float32(np.inf)), scale)
            divisor = np.where(scale > 0, scale, 1).astype(np.float64)
            values /= divisor[:, None]
            values += rng.random(values.shape)
            codes = np.floor(values, out=values).astype(np.int8)
            payload[f"code::{name}"] = codes.reshape(-1)[: array.size]
            payload[f"scale::{name}"] = scale.astype(np.float32)
        return dataclasses.replace(update, arrays=payload)


class Packed:
    """A payload, read as the update that it stands for (`layout.Source`)."""

    __slots__ = ("_payload", "specs")

    def __init__(self, payload: Arrays, layout: Layout) -> None:
        """Check the payload against what the full update must look like.

        Raises:
            ValueError: A tensor is missing, doubled or unknown, or its parts do not fit.
        """
        self._payload = payload
        self.specs: Mapping[str, Spec] = layout.tensors
        known: set[str] = set()
        for name, spec in layout.tensors.items():
            known |= _parts_of(name, spec, payload)
        for part in payload:
            if part not in known:
                raise ValueError(f"payload part {part!r} is not expected")

    def read(self, name: str, start: int, stop: int) -> Array:
        """Elements ``start:stop`` of one tensor, decoded."""
        payload, spec = self._payload, self.specs[name]
        if f"raw::{name}" in payload:
            return payload[f"raw::{name}"].reshape(-1)[start:stop]
        if f"code::{name}" in payload:
            codes = payload[f"code::{name}"][start:stop].astype(np.float64)
            places = np.arange(start, stop) // _BUCKET
            codes *= payload[f"scale::{name}"][places]
            return codes.astype(spec.dtype)
        out = np.zeros(stop - start, spec.dtype)
        index = payload[f"index::{name}"]
        low, high = np.searchsorted(index, [start, stop])
        out[index[low:high] - start] = payload[f"value::{name}"][low:high]
        return out

    def take(self, name: str, indices: npt.NDArray[np.intp]) -> Array:
        """Single elements, decoded."""
        low = int(indices[0])
        return self.read(name, low, int(indices[-1]) + 1)[indices - low]

    def close(self) -> None:
        """Nothing to let go of."""

    def expand(self) -> Arrays:
        """The full arrays."""
        return {n: self.read(n, 0, s.size).reshape(s.shape).copy() for n, s in self.specs.items()}


def _is_small(array: Array) -> bool:
    return array.dtype.kind != "f" or array.size < _SMALL


def _parts_of(name: str, spec: Spec, payload: Arrays) -> set[str]:
    """The names of the parts that hold one tensor, checked."""
    found = {tag: payload[f"{tag}::{name}"] for tag in _TAGS if f"{tag}::{name}" in payload}
    kind = frozenset(found)
    if kind == {"raw"}:
        raw = found["raw"]
        good = raw.shape == spec.shape and raw.dtype == spec.dtype
    elif kind == {"code", "scale"}:
        code, scale = found["code"], found["scale"]
        good = code.shape == (spec.size,) and code.dtype == np.int8
        good = good and scale.shape == (-(-spec.size // _BUCKET),) and scale.dtype == np.float32
    elif kind == {"index", "value"}:
        index, value = found["index"], found["value"]
        good = index.ndim == 1 and index.dtype.kind == "i" and value.shape == index.shape
        good = good and value.dtype == spec.dtype and bool((np.diff(index) > 0).all())
        good = good and (not index.size or (index[0] >= 0 and index[-1] < spec.size))
    else:
        raise ValueError(f"tensor {name!r} comes as {sorted(kind) or 'nothing'} in the payload")
    if not good:
        raise ValueError(f"tensor {name!r}: its payload ({', '.join(sorted(kind))}) does not fit")
    return {f"{tag}::{name}" for tag in kind}
