# SPDX-License-Identifier: Apache-2.0
"""What an update must look like, and the check that it does before anything is added.

An update comes as arrays in memory or as a safetensors file. Either way it passes `admit` first:
the same names, shapes and types as expected, no NaN, no infinity, nothing so large that a sum
could overflow. The error names the client and the tensor; a refused update leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fedml.federate.arrays import Array, Arrays
from fedml.federate.tensor_file import BadTensorFile, TensorFile

CHUNK = 32768  # elements a step: four clients' rows in float64 fill a 1 MiB L2 cache
_HEAVIEST = 2.0**200
COARSEST = 700  # the unit of zero: above that of every other term
_LARGEST = 2.0**480  # neither weighted sums nor sums of squares come near overflow


class BadUpdate(ValueError):
    """An update that must not be added; it is the client's fault.

    Attributes:
        client: Whose it was.
        tensor: Which tensor is wrong, None when the update as a whole is.
        what: The text without the client, for where he is named anyway.
    """

    def __init__(self, client: int, tensor: str | None, why: str) -> None:
        where = f"client {client}" if tensor is None else f"client {client}, tensor {tensor!r}"
        super().__init__(f"{where}: {why}")
        self.client = client
        self.tensor = tensor
        self.what = why if tensor is None else f"tensor {tensor!r} {why}"


class SumBroken(RuntimeError):
    """An update that had been accepted could not be read again; the sum must be started anew."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and element type of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors that an update must hold, no more and no fewer.

    Attributes:
        tensors: By name; floats of 2, 4 or 8 bytes and integers. Their order is the result's.
    """

    tensors: Mapping[str, Spec]

    def __post_init__(self) -> None:
        for name, spec in self.tensors.items():
            if spec.dtype.kind not in "fiu" or spec.dtype.itemsize > 8:
                raise ValueError(f"tensor {name!r}: values of type {spec.dtype} have no mean")

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Layout:
        """The layout that these arrays have."""
        return cls({name: Spec(a.shape, a.dtype) for name, a in arrays.items()})

    def tagged(self, tag: str) -> Layout:
        """The layout of ``arrays.tagged(tag, ...)``."""
        return Layout({f"{tag}::{name}": spec for name, spec in self.tensors.items()})

    def __or__(self, other: Layout) -> Layout:
        """Both together."""
        return Layout({**self.tensors, **other.tensors})

    def chunks(self, step: int = CHUNK) -> Iterator[tuple[str, int, int]]:
        """Every (name, start, stop) that covers the tensors, in order."""
        for name, spec in self.tensors.items():
            for start in range(0, spec.size, step):
                yield name, start, min(start + step, spec.size)

    def check(self, client: int, held: Mapping[str, Spec]) -> None:
        """Raise BadUpdate unless ``held`` is this layout."""
        for name, spec in self.tensors.items():
            if name not in held:
                raise BadUpdate(client, name, "is missing")
            if held[name].shape != spec.shape:
                raise BadUpdate(
                    client, name, f"has shape {held[name].shape}, expected {spec.shape}"
                )
            if held[name].dtype != spec.dtype:
                raise BadUpdate(client, name, f"has type {held[name].dtype}, expected {spec.dtype}")
        for name in held:
            if name not in self.tensors:
                raise BadUpdate(client, name, "is not expected")


class Source(Protocol):
    """Where an update's values are read from."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """What it holds."""
        ...

    def read(self, name: str, start: int, stop: int) -> Array:
        """Elements ``start:stop`` of one flattened tensor, shape ``(stop - start,)``; read-only."""
        ...

    def take(self, name: str, indices: npt.NDArray[np.intp]) -> Array:
        """Single elements of one flattened tensor; ``indices`` ascend."""
        ...

    def close(self) -> None:
        """Let go of the file, if there is one; the next read opens it again."""
        ...


Given: TypeAlias = Arrays | str | Path | Source


class InMemory:
    """Arrays as a source. They are referred to, not copied: leave them alone until the result."""

    __slots__ = ("_flat", "specs")

    def __init__(self, arrays: Arrays) -> None:
        self.specs = {name: Spec(a.shape, a.dtype) for name, a in arrays.items()}
        # A copy only where the array is not contiguous.
        self._flat = {name: np.ascontiguousarray(a).reshape(-1) for name, a in arrays.items()}

    def read(self, name: str, start: int, stop: int) -> Array:
        """A view."""
        return self._flat[name][start:stop]

    def take(self, name: str, indices: npt.NDArray[np.intp]) -> Array:
        """A new array."""
        taken: Array = self._flat[name][indices]
        return taken

    def close(self) -> None:
        """Nothing to let go of."""


class OnDisk:
    """A safetensors file as a source; it must stay as it is until the result."""

    __slots__ = ("_file", "_path", "specs")

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._file: TensorFile | None = TensorFile(path)
        self.specs = {name: Spec(e.shape, e.dtype) for name, e in self._file.entries.items()}

    def read(self, name: str, start: int, stop: int) -> Array:
        """A new array."""
        if self._file is None:
            self._file = TensorFile(self._path)
        return self._file.read(name, start, stop)

    def take(self, name: str, indices: npt.NDArray[np.intp]) -> Array:
        """A new array; a block of the file is read whole where enough of it is asked for."""
        blocks = np.split(indices, np.flatnonzero(np.diff(indices // CHUNK)) + 1)
        parts: list[Array] = []
        for block in blocks:
            if len(block) > 8:
                low, high = int(block[0]), int(block[-1]) + 1
                parts.append(self.read(name, low, high)[block - low])
            else:
                parts.extend(self.read(name, i, i + 1) for i in block.tolist())
        return np.concatenate(parts)

    def close(self) -> None:
        """Close the file until it is read again, so that thousands do not hold a descriptor."""
        if self._file is not None:
            self._file.close()
            self._file = None


def admit(
    client: int, given: Given, weight: float, layout: Layout | None, *, values: bool = True
) -> Source:
    """Check one update and give back where to read it from.

    Args:
        client: Whose it is, for the error.
        given: Arrays, the path of a safetensors file, or any other source.
        weight: How much it counts, in [0, 2**200].
        layout: What it must hold; None accepts any layout whose values have a mean.
        values: Also read every value and refuse NaN, infinities and overflowing sizes.

    Raises:
        BadUpdate: With the client, the tensor and what is wrong.
    """
    if not 0 <= weight <= _HEAVIEST:
        raise BadUpdate(client, None, f"its weight must be in [0, 2**200], not {weight}")
    try:
        source: Source
        if isinstance(given, dict):
            source = InMemory(given)
        else:
            source = OnDisk(given) if isinstance(given, str | Path) else given
    except (BadTensorFile, OSError) as error:
        raise BadUpdate(client, None, f"its update cannot be read: {error}") from error
    try:
        if layout is None:
            try:
                layout = Layout(source.specs)
            except ValueError as error:
                raise BadUpdate(client, None, str(error)) from error
        layout.check(client, source.specs)
        if values:
            with quiet():
                for name, start, stop in layout.chunks():
                    require_finite(client, name, source.read(name, start, stop))
    except BaseException:
        source.close()
        raise
    return source


def quiet() -> np.errstate:
    """A context in which squares may overflow without a warning: enter it once, not per chunk."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


def require_finite(client: int, name: str, values: Array) -> None:
    """Raise BadUpdate for NaN, an infinity, or a value that would overflow; call it `quiet`."""
    if values.dtype.kind != "f" or math.isfinite(_square_sum(values)):
        return  # finite squares: finite values, and far below the limit
    largest = float(np.max(np.abs(values.astype(np.float64, copy=False))))
    if math.isnan(largest):
        raise BadUpdate(client, name, "holds NaN; training diverged or the data holds NaN")
    if math.isinf(largest):
        raise BadUpdate(client, name, "holds an infinity; training diverged")
    if largest > _LARGEST:
        raise BadUpdate(client, name, f"holds {largest:g}, too large to sum")


def magnitude(values: Array) -> float:
    """An upper bound of ``max |values|``, loose by up to the root of the size; call it `quiet`."""
    # One part in a hundred covers the rounding of a float32 dot product of `CHUNK` terms; the
    # constant covers values whose squares underflow.
    bound = 1.01 * math.sqrt(_square_sum(values)) + 2.0**-62
    if not math.isfinite(bound):
        bound = float(np.max(np.abs(values.astype(np.float64, copy=False))))
    return bound


def grid(values: Array) -> tuple[int, float]:
    """How fine and how large values are: multiples of ``2**unit``, none larger than ``most``.

    Tighter than `magnitude`, and four times as slow.

    Args:
        values: float16 or float32.

    Returns:
        ``unit`` and ``most``; `COARSEST` and 0.0 where all are zero, ``most`` infinite where one
        is NaN or an infinity.
    """
    bits = values.astype(np.float32, copy=False).view(np.uint32) << 1  # without the sign
    largest = int(bits.max(initial=0))
    if largest == 0:
        return COARSEST, 0.0
    bits -= 1  # zeros become the largest of all
    smallest = int(bits.min()) + 1
    # IEEE 754 binary32: 8 bits of exponent, 23 of fraction; exponents 0 and 1 share their unit.
    most = math.inf if largest >> 24 == 255 else math.ldexp(1.0, (largest >> 24) - 126)
    return max(smallest >> 24, 1) - 150, most


def fineness(weight: float) -> int:
    """The largest ``unit`` for which a weight is a multiple of ``2**unit``; `COARSEST` for 0."""
    if weight == 0.0:
        return COARSEST
    above, below = float(weight).as_integer_ratio()
    return (above & -above).bit_length() - below.bit_length()


def _square_sum(values: Array) -> float:
    if values.dtype != np.float32:
        values = values.astype(np.float64, copy=False)
    return float(np.dot(values, values))  # an overflow is infinity: callers silence its warning
