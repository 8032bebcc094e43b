# SPDX-License-Identifier: Apache-2.0
"""Clients side by side: one batched computation trains a whole chunk of them (torch.func.vmap).

Worth it where a model is so small that the calls cost more than the mathematics, and on
accelerators. Clients of a chunk may have different numbers of examples: what a client lacks in a
step is masked out, and a client that has no batch left stands still.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedml.federate.arrays import Array
from fedml.federate.local_sgd import Loss, Steps, examples_of
from fedml.federate.torch_sgd import tensors
from fedml.simulation.accelerator import Kept, free_bytes
from fedml.simulation.engine import Diverged, Rng
from fedml.simulation.graphs import Graphs, can_record

_CACHE = 1 << 20  # bytes of weights, gradients and scratch that one chunk may take: an L2 cache
_MOST = 64
_COMPANIES = 2  # numbers of clients at once for which memory is kept: a chunk, and the last one
_MOST_BESIDE = 512  # on an accelerator; examples need room too, and if it is too little, see `free`


class _Company:
    """Clients side by side: their weights, and one step of all of them, in place.

    Attributes:
        weights: By name, ``(clients, ...)``.
        cost: ``(clients,)``: each one's sum of losses.
        step: Takes inputs and targets of a batch, ``(clients, batch, ...)``, and which examples
            are there, ``(clients, batch)``.
    """

    def __init__(self, of: Stacked, count: int) -> None:
        self._of = of
        self.weights = {
            name: start.new_empty(count, *start.shape) for name, start in of.start.items()
        }
        moving = self.weights if of.steps.momentum else {}
        self._velocity = {name: torch.empty_like(weight) for name, weight in moving.items()}
        self.cost = torch.empty(count, dtype=of.wide, device=of.device)
        self.step = Graphs(self._step, record=of.record)

    def begin(self) -> None:
        """From the model, at rest."""
        for name, weight in self.weights.items():
            weight.copy_(self._of.start[name].expand_as(weight))
        for velocity in self._velocity.values():
            velocity.zero_()
        self.cost.zero_()

    def _step(self, x: Tensor, y: Tensor, here: Tensor) -> None:
        steps = self._of.steps
        gradient, value = self._of.gradient(self.weights, x, y, here)
        self.cost += value.to(self.cost.dtype) * here.sum(1)
        active = here[:, 0]  # a client that has no batch left stands still
        for name, weight in self.weights.items():
            step = gradient[name]
            if steps.weight_decay:
                step = step + steps.weight_decay * weight
            moving = active.reshape(-1, *[1] * (weight.dim() - 1))
            if steps.momentum:
                velocity = self._velocity[name]
                torch.where(moving > 0, steps.momentum * velocity + step, velocity, out=velocity)
                step = velocity
            weight.sub_(step * moving, alpha=steps.lr)


class Stacked:
    """See `engine.Engine`."""

    def __init__(self, module: nn.Module, steps: Steps, loss: Loss, device: str = "cpu") -> None:
        module.to(device).train()
        self.device = torch.device(device)
        # MPS has no float64: there, a chunk is added up in float32, and chunks on the CPU.
        self.wide = torch.float32 if device == "mps" else torch.float64
        home = "cpu" if device == "mps" else device
        self._module, self.steps, self._loss = module, steps, loss
        self._buffers = dict(module.named_buffers())
        self.record = can_record(module, device)
        self.start = {n: torch.empty_like(p.detach()) for n, p in module.named_parameters()}
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        beside = device != "cpu"
        most, room = (_MOST_BESIDE, free_bytes(device) / 8) if beside else (_MOST, _CACHE)
        self.chunk = int(max(1, min(most, room / max(3 * size, 1))))
        self._sum = {
            n: torch.zeros_like(t, dtype=torch.float64, device=home) for n, t in self.start.items()
        }
        self.gradient = vmap(grad_and_value(self._cost), in_dims=(0, 0, 0, 0))
        self._kept = Kept(device)
        self._companies: OrderedDict[int, _Company] = OrderedDict()

    def begin(self, model: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        for name, start in self.start.items():
            start.copy_(torch.from_numpy(model[name]))
            self._sum[name].zero_()
        for name, buffer in self._buffers.items():
            if name in model:
                buffer.copy_(torch.from_numpy(model[name]))

    def train(
        self, clients: Sequence[int], data: Sequence[Any], rngs: Sequence[Rng]
    ) -> list[dict[str, float]]:
        """See `engine.Engine`."""
        steps = self.steps
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
        company = self._company(len(clients))
        company.begin()
        count = torch.tensor(sizes, device=self.device)
        column = torch.arange(longest, device=self.device)
        here = (count[:, None] > column).to(self._dtype)
        for epoch in range(steps.epochs):
            x, y = xs, ys
            if steps.shuffle:
                rows = torch.stack([_rows(each[epoch], longest) for each in orders])
                rows = rows.to(self.device)
                every = torch.arange(len(clients), device=self.device)[:, None]
                x, y = xs[every, rows], ys[every, rows]
            for start in range(0, longest, steps.batch_size):
                stop = min(start + steps.batch_size, longest)
                company.step(x[:, start:stop], y[:, start:stop], here[:, start:stop])
        deltas = {name: value - self.start[name] for name, value in company.weights.items()}
        if not all(bool(torch.isfinite(d).all()) for d in deltas.values()):
            raise Diverged
        examples = count.to(self.wide)
        # All of them first: where memory runs out, nothing may have been added.
        parts = {
            name: torch.tensordot(examples, delta.to(self.wide), dims=1)
            for name, delta in deltas.items()
        }
        for name, part in parts.items():
            self._sum[name] += part.to(self._sum[name].device)
        passes = np.maximum(np.array(sizes) * steps.epochs, 1)
        return [
            steps.done(n, steps.epochs, loss)
            for n, loss in zip(sizes, (company.cost.cpu().numpy() / passes).tolist(), strict=True)
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
        self.record = False
        graphs = any(company.step.free() for company in self._companies.values())
        self._companies.clear()
        examples = self._kept.free()
        return graphs or examples

    def _company(self, count: int) -> _Company:
        found = self._companies.pop(count, None)
        if found is None:
            while len(self._companies) >= _COMPANIES:
                self._companies.popitem(last=False)
            found = _Company(self, count)
        self._companies[count] = found
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.start.values())).dtype

    def _pair(self, client: int, data: Any) -> tuple[Tensor, Tensor]:
        return self._kept.get(client, lambda: tensors(*examples_of(data), self._module, self._loss))

    def _cost(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, here: Tensor) -> Tensor:
        """The mean loss of one client's batch over the examples that are there."""
        # The fused attentions cannot be batched over weights; torch would go client by client.
        with sdpa_kernel(SDPBackend.MATH):
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
