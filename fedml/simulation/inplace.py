# SPDX-License-Identifier: Apache-2.0
"""One torch model per process: weights are put back in place, steps fused, clients added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedml.federate.application import seed_everything
from fedml.federate.arrays import Array
from fedml.federate.local_sgd import Loss, Steps, examples_of
from fedml.federate.torch_sgd import Stepper, tensors
from fedml.simulation.accelerator import Kept
from fedml.simulation.engine import Diverged, Rng
from fedml.simulation.graphs import Graphs, can_record

_BLOCK = 8  # clients: their sum in float32 is good to some parts in ten million


class InPlace:
    """See `engine.Engine`."""

    chunk = 1

    def __init__(self, module: nn.Module, steps: Steps, loss: Loss, device: str = "cpu") -> None:
        self._steps, self._loss = steps, loss
        module.to(device)
        images = device != "mps" and any(p.dim() == 4 for p in module.parameters())
        if images:
            # Convolutions on the CPU are a third faster when channels lie innermost; CUDA has
            # them so, too.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.train()
        self._module = module
        self._stepper = Stepper(module, loss, channels_last=images)
        state = {n: t for n, t in module.state_dict(keep_vars=True).items() if torch.is_tensor(t)}
        self._names = list(state)
        self._tensors = [t.detach() for t in state.values()]
        self._start = [torch.empty_like(t) for t in self._tensors]
        self._floats = [i for i, t in enumerate(self._tensors) if t.is_floating_point()]
        # Some clients are added up in the model's own type, then all of that in float64.
        self._part = [torch.zeros_like(t, dtype=_wide(t)) for t in self._tensors]
        # MPS has no float64.
        home = "cpu" if device == "mps" else device
        self._sum = [torch.zeros_like(t, dtype=torch.float64, device=home) for t in self._tensors]
        self._in_part = 0
        self._kept = Kept(device)
        self._velocity = self._stepper.at_rest() if steps.momentum else None
        self._total = self._stepper.nothing()
        # A loss of the user's own may do what a module of his may do.
        record = can_record(module, device) and not callable(loss)
        self._step = Graphs(self._take, record=record)

    def begin(self, model: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        for name, start in zip(self._names, self._start, strict=True):
            start.copy_(torch.from_numpy(model[name]))
        for total in (*self._sum, *self._part):
            total.zero_()
        self._in_part = 0

    def train(
        self, clients: Sequence[int], data: Sequence[Any], rngs: Sequence[Rng]
    ) -> list[dict[str, float]]:
        """See `engine.Engine`."""
        client = clients[0]
        prepared = self._kept.get(
            client, lambda: tensors(*examples_of(data[0]), self._module, self._loss)
        )
        torch._foreach_copy_(self._tensors, self._start)
        rng = rngs[0]()
        # The draw that `Application.train` seeds everything with.
        seed_everything(int(rng.integers(2**31)))
        self._total.zero_()
        if self._velocity is not None:
            torch._foreach_zero_(self._velocity)
        found = self._stepper.walk(*prepared, self._steps, rng, self._step, self._total)
        floats = [self._tensors[i] for i in self._floats]
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(floats))).all()):
            raise Diverged
        # The difference first: it is small, and float32 holds it well.
        torch._foreach_sub_(self._tensors, self._start)
        torch._foreach_add_(self._part, self._tensors, alpha=int(found["examples"]))
        self._in_part += 1
        if self._in_part == _BLOCK:
            self._flush()
        return [found]

    def finish(self, total: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        self._flush()
        for name, part in zip(self._names, self._sum, strict=True):
            total[name][...] = part.cpu().numpy()

    def _take(self, xb: torch.Tensor, yb: torch.Tensor) -> None:
        self._stepper.step(xb, yb, self._steps, self._velocity, self._total)

    def _flush(self) -> None:
        for total, part in zip(self._sum, self._part, strict=True):
            total.add_(part.to(total.device))
            part.zero_()
        self._in_part = 0

    def forget(self, clients: Sequence[int]) -> None:
        """See `engine.Engine`."""
        self._kept.forget(clients)

    def free(self) -> bool:
        """See `engine.Engine`."""
        graphs, examples = self._step.free(), self._kept.free()
        return graphs or examples


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Float32 where a model is in half precision: a sum of clients would not be one."""
    half = tensor.is_floating_point() and tensor.element_size() < 4
    return torch.float32 if half else tensor.dtype
