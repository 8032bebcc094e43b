# SPDX-License-Identifier: Apache-2.0
"""Training steps as CUDA graphs: recorded once for each shape of a batch, then replayed.

A step of a small model is some fifty kernels of a few microseconds, and to start one takes the
processor as long as that. A graph starts them all at once.

A replay runs kernels, not Python: a module that decides something anew in each step (by Python's
own generator, by a counter) would have decided once for all. And a recording that fails leaves
torch (2.11, and pytorch/pytorch#190348) with memory that the process never gives back. So only
modules made of the classes below are recorded, of which both are known: it was done on a GPU, or
they are one kernel after another like those. torch's own draws (dropout) are new in each replay.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_WARM = 2  # steps of a shape before it is recorded: libraries choose and allocate in the first ones
_MOST = 8  # shapes: clients of many sizes end with batches of many sizes
_SPARE = 256 << 20  # bytes for libraries, beside twice what a step takes
_RECORDED = (
    *(nn.Sequential, nn.Flatten, nn.Identity, nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.Dropout),
    *(nn.ReLU, nn.Tanh, nn.Sigmoid),
)
_OURS = ("fedml.model.linear", "fedml.model.cnn", "fedml.model.lenet", "fedml.model.mlp")


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]


def can_record(module: nn.Module, device: str) -> bool:
    """Whether steps of this module may be replayed there."""
    # Exactly these: what is derived from one may do anything.
    known = all(type(m) in _RECORDED or type(m).__module__ in _OURS for m in module.modules())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return device.startswith("cuda") and known and not hooked


def _is_fit(step: Callable[[], None]) -> bool:
    """Take a step; whether a graph could: there is memory enough, and it never waits for the GPU.

    Not found out by recording it, see above.
    """
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    silent = _is_silent(step)
    need = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()  # as recording does
    return silent and torch.cuda.mem_get_info()[0] > 2 * need + _SPARE


def _is_silent(step: Callable[[], None]) -> bool:
    """Take a step; whether nothing in it asks the GPU for an answer, which no graph can."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # What else is warned of was warned of by the steps before this one.
    return not any("called a synchronizing" in str(one.message) for one in said)


class Graphs:
    """A step that is called with a batch, and changes everything else in place."""

    def __init__(self, step: Callable[..., None], *, record: bool) -> None:
        """Record nothing yet.

        Args:
            step: Takes tensors. What it changes must be the same tensors each time.
            record: Otherwise the step is merely called.
        """
        self._step = step
        self._record_any = record
        self._met: Counter[tuple[torch.Size, ...]] = Counter()
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Take the step."""
        key = tuple(tensor.shape for tensor in inputs)
        recorded = self._recorded.get(key)
        if recorded is None:
            self._met[key] += 1
            open_ = self._record_any and len(self._recorded) < _MOST
            if not open_ or self._met[key] < _WARM:
                self._step(*inputs)
                return
            with torch.cuda.device(inputs[0].device):  # not all of torch asks the tensors for it
                if self._met[key] == _WARM:
                    self._record_any = _is_fit(lambda: self._step(*inputs))
                    return
                recorded = self._record(inputs)
            if recorded is None:
                self._step(*inputs)
                return
            self._recorded[key] = recorded
        for place, given in zip(recorded.inputs, inputs, strict=True):
            place.copy_(given)
        recorded.graph.replay()

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded | None:
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            places = tuple(torch.empty_like(tensor) for tensor in inputs)
            with torch.cuda.graph(graph):  # nothing is run, and nothing changes
                self._step(*places)
        except RuntimeError:
            # Too little memory, most likely: if it matters, the step itself will meet it.
            torch.cuda.set_stream(stream)
            self.free()
            return None
        return _Recorded(graph, places)

    def free(self) -> bool:
        """Memory has run out: record no more. Whether there was anything to let go of."""
        anything = bool(self._recorded)
        self._recorded.clear()
        self._record_any = False
        return anything
