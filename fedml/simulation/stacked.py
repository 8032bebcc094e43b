# SPDX-License-Identifier: Apache-2.0
"""Clients side by side: one batched computation trains a whole chunk of them (torch.func.vmap).

Worth it where a model is so small that the calls cost more than the mathematics, and on
accelerators. Clients of a chunk may have different numbers of examples: what a client lacks in a
step is masked out, and a client that has no batch left stands still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from fedml.federate.arrays import Array
from fedml.federate.local_sgd import Loss, Steps, examples_of
from fedml.federate.torch_sgd import tensors
from fedml.simulation.accelerator import Kept, free_bytes
from fedml.simulation.engine import Diverged, Rng

_CACHE = 1 << 20  # bytes of weights, gradients and scratch that one chunk may take: an L2 cache
_MOST = 64
_MOST_BESIDE = 512  # on an accelerator; examples need room too, and if it is too little, see `free`


class Stacked:
    """See `engine.Engine`."""

    def __init__(self, module: nn.Module, steps: Steps, loss: Loss, device: str = "cpu") -> None:
        module.to(device).train()
        self._device = torch.device(device)
        # MPS has no float64: there, a chunk is added up in float32, and chunks on the CPU.
        self._wide = torch.float32 if device == "mps" else torch.float64
        home = "cpu" if device == "mps" else device
        self._module, self._steps, self._loss = module, steps, loss
        self._buffers = dict(module.named_buffers())
        self._names = [name for name, _ in module.named_parameters()]
        self._start = {n: torch.empty_like(p.detach()) for n, p in module.named_parameters()}
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        beside = device != "cpu"
        most, room = (_MOST_BESIDE, free_bytes(device) / 8) if beside else (_MOST, _CACHE)
        self.chunk = int(max(1, min(most, room / max(3 * size, 1))))
        self._sum = {
            n: torch.zeros_like(t, dtype=torch.float64, device=home) for n, t in self._start.items()
        }
        self._step = vmap(grad_and_value(self._cost), in_dims=(0, 0, 0, 0))
        self._kept = Kept(device)

    def begin(self, model: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        for name, start in self._start.items():
            start.copy_(torch.from_numpy(model[name]))
            self._sum[name].zero_()
        for name, buffer in self._buffers.items():
            if name in model:
                buffer.copy_(torch.from_numpy(model[name]))

    def train(
        self, clients: Sequence[int], data: Sequence[Any], rngs: Sequence[Rng]
    ) -> list[dict[str, float]]:
        """See `engine.Engine`."""
        steps = self._steps
        pairs = [self._pair(client, one) for client, one in zip(clients, data, strict=True)]
        sizes = [len(x) for x, _ in pairs]
        longest = max(sizes)
        orders = []
        for size, rng in zip(sizes, rngs, strict=True):
            generator: Any = None
            if steps.shuffle:
                generator = rng()
                generator.integers(2**31)  # the draw that `Application.train` seeds with
            orders.append(list(steps.orders(size, generator)))
        xs, ys = _padded([x for x, _ in pairs], longest), _padded([y for _, y in pairs], longest)
        weights = {
            name: start.expand(len(clients), *start.shape).clone()
            for name, start in self._start.items()
        }
        velocity: dict[str, Tensor] = {}
        count = torch.tensor(sizes, device=self._device)
        cost = torch.zeros(len(clients), dtype=self._wide, device=self._device)
        ragged = min(sizes) < longest
        for epoch in range(steps.epochs):
            x, y = xs, ys
            if steps.shuffle:
                rows = torch.stack([_rows(each[epoch], longest) for each in orders])
                rows = rows.to(self._device)
                every = torch.arange(len(clients), device=self._device)[:, None]
                x, y = xs[every, rows], ys[every, rows]
            for start in range(0, longest, steps.batch_size):
                stop = min(start + steps.batch_size, longest)
                column = torch.arange(start, stop, device=self._device)
                here = (count[:, None] > column).to(self._dtype)
                gradient, value = self._step(weights, x[:, start:stop], y[:, start:stop], here)
                cost += value.to(self._wide) * here.sum(1)
                active = here[:, 0] if ragged else None
                self._walk(weights, gradient, velocity, active)
        deltas = {name: value - self._start[name] for name, value in weights.items()}
        if not all(bool(torch.isfinite(d).all()) for d in deltas.values()):
            raise Diverged
        examples = count.to(self._wide)
        # All of them first: where memory runs out, nothing may have been added.
        parts = {
            name: torch.tensordot(examples, delta.to(self._wide), dims=1)
            for name, delta in deltas.items()
        }
        for name, part in parts.items():
            self._sum[name] += part.to(self._sum[name].device)
        passes = np.maximum(np.array(sizes) * steps.epochs, 1)
        return [
            {"examples": float(n), "steps": float(steps.count(n)), "lr": steps.lr, "loss": loss}
            for n, loss in zip(sizes, (cost.cpu().numpy() / passes).tolist(), strict=True)
        ]

    def finish(self, total: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        for name, part in total.items():
            # Buffers that no client changes: their difference is zero.
            part[...] = self._sum[name].cpu().numpy() if name in self._sum else 0

    def forget(self, clients: Sequence[int]) -> None:
        """See `engine.Engine`."""
        self._kept.forget(clients)

    def free(self) -> bool:
        """See `engine.Engine`."""
        return self._kept.free()

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self._start.values())).dtype

    def _pair(self, client: int, data: Any) -> tuple[Tensor, Tensor]:
        return self._kept.get(client, lambda: tensors(*examples_of(data), self._module, self._loss))

    def _walk(
        self,
        weights: dict[str, Tensor],
        gradient: Mapping[str, Tensor],
        velocity: dict[str, Tensor],
        active: Tensor | None,
    ) -> None:
        """One step of every client that has a batch."""
        steps = self._steps
        for name, weight in weights.items():
            step = gradient[name]
            if steps.weight_decay:
                step = step + steps.weight_decay * weight
            moving = None if active is None else active.reshape(-1, *[1] * (weight.dim() - 1))
            if steps.momentum:
                held = velocity.get(name)
                step = step if held is None else steps.momentum * held + step
                if moving is not None and held is not None:
                    step = torch.where(moving > 0, step, held)
                velocity[name] = step
            if moving is not None:
                step = step * moving
            weight.sub_(step, alpha=steps.lr)

    def _cost(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, here: Tensor) -> Tensor:
        """The mean loss of one client's batch over the examples that are there."""
        z = functional_call(self._module, {**weights, **self._buffers}, (x,))
        if self._loss == "cross_entropy":
            each = functional.cross_entropy(z, y, reduction="none")
        elif self._loss == "logistic":
            each = functional.binary_cross_entropy_with_logits(
                z, y.reshape(z.shape), reduction="none"
            )
        else:
            each = functional.mse_loss(z, y.reshape(z.shape), reduction="none")
        each = each.reshape(len(x), -1).mean(1)
        return (each * here).sum() / here.sum().clamp(min=1)


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    out = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
    for row, part in enumerate(parts):
        out[row, : len(part)] = part
    return out


def _rows(order: Any, length: int) -> Tensor:
    rows = torch.zeros(length, dtype=torch.int64)
    rows[: len(order)] = torch.from_numpy(order)
    return rows
