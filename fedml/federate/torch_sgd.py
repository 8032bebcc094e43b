# SPDX-License-Identifier: Apache-2.0
"""SGD on a torch module: gradients by autograd, the step fused over all parameters.

The same steps as `torch.optim.SGD` takes; without an optimiser object, ``zero_grad`` and a
gradient kept on every parameter, which for small models cost as much as the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.federate.algorithm import Correction
from fedml.federate.arrays import Array, Arrays, is_learned
from fedml.federate.local_sgd import BadData, Loss, Steps

# What torch's fused operations take.
Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

_WHOLE = 1024  # examples in one pass where the whole data is gone through


def loss_function(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch, a mean over its examples."""
    if callable(loss):
        return loss
    if loss == "cross_entropy":
        return functional.cross_entropy
    if loss == "logistic":
        return _logistic
    return _squared


def tensors(x: Array, y: Array, module: nn.Module, loss: Loss) -> tuple[Tensor, Tensor]:
    """A client's examples as the module takes them, and where it is.

    On the CPU memory is shared where types already fit.

    Raises:
        BadData: The targets cannot be what the loss needs.
    """
    inputs, targets = _fitting(x, y, module, loss)
    device = place(module)
    return inputs.to(device), targets.to(device)


def place(module: nn.Module) -> torch.device:
    """The device that a module is on."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


class Stepper:
    """Takes SGD steps on a module's parameters in place."""

    def __init__(self, module: nn.Module, loss: Loss, *, channels_last: bool = False) -> None:
        self.module = module
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        # Detached: written to without autograd looking, and without a no_grad block.
        self.values = [p.detach() for p in self.parameters]
        self._loss = loss_function(loss)
        self._kind = place(module).type
        self._channels_last = channels_last

    def train(
        self,
        x: Tensor,
        y: Tensor,
        steps: Steps,
        rng: np.random.Generator,
        correction: Correction | None = None,
    ) -> dict[str, float]:
        """All epochs of one client; its numbers."""
        change = self._change(correction, bf16=steps.bf16)
        velocity = self.at_rest() if steps.momentum else None
        total = self.nothing()

        def step(xb: Tensor, yb: Tensor) -> None:
            self.step(xb, yb, steps, velocity, total, change)

        return self.walk(x, y, steps, rng, step, total)

    def walk(
        self,
        x: Tensor,
        y: Tensor,
        steps: Steps,
        rng: np.random.Generator,
        step: Callable[[Tensor, Tensor], None],
        total: Tensor,
    ) -> dict[str, float]:
        """The same with a step, and the sum of losses that it adds to, from outside."""
        n, epochs = len(x), 0
        for order in steps.orders(n, rng):
            epochs += 1
            xs, ys = x, y
            if order is not None:
                rows = torch.from_numpy(order).to(x.device)
                xs, ys = x[rows], y[rows]
            for start in range(0, n, steps.batch_size):
                xb, yb = xs[start : start + steps.batch_size], ys[start : start + steps.batch_size]
                if self._channels_last and xb.dim() == 4:
                    xb = xb.contiguous(memory_format=torch.channels_last)
                step(xb, yb)
        return steps.done(n, epochs, float(total) / (n * epochs) if n else 0.0)

    def step(
        self,
        xb: Tensor,
        yb: Tensor,
        steps: Steps,
        velocity: list[Tensor] | None,
        total: Tensor,
        change: Any = None,
    ) -> None:
        """One step on a batch, all of it in place, velocity and total too."""
        with self._products(bf16=steps.bf16):
            loss = self._loss(self.module(xb), yb)
        step: Tensors = torch.autograd.grad(loss, self.parameters)
        if change is not None:
            step = change(step, xb, yb)
        if steps.weight_decay:
            step = torch._foreach_add(step, self.values, alpha=steps.weight_decay)
        if velocity is not None:
            torch._foreach_mul_(velocity, steps.momentum)
            torch._foreach_add_(velocity, step)
            step = velocity
        torch._foreach_add_(self.values, step, alpha=-steps.lr)
        total.add_(loss.detach(), alpha=len(xb))

    def at_rest(self) -> list[Tensor]:
        """The velocity of a client that has not taken a step."""
        return [torch.zeros_like(value) for value in self.values]

    def nothing(self) -> Tensor:
        """A sum of losses, empty. MPS has no float64."""
        wide = torch.float32 if self._kind == "mps" else torch.float64
        return torch.zeros((), dtype=wide, device=place(self.module))

    def gradient(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], float]:
        """Mean gradient and loss over all examples."""
        total = [torch.zeros_like(v) for v in self.values]
        cost = 0.0
        for start in range(0, len(x), _WHOLE):
            xb, yb = x[start : start + _WHOLE], y[start : start + _WHOLE]
            loss = self._loss(self.module(xb), yb)
            share = len(xb) / len(x)
            torch._foreach_add_(total, torch.autograd.grad(loss, self.parameters), alpha=share)
            cost += float(loss.detach()) * share
        return total, cost

    def _products(self, *, bf16: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self._kind, torch.bfloat16) if bf16 else nullcontext()

    def _change(self, correction: Correction | None, *, bf16: bool) -> Any:
        """`Correction.direction` in torch, on lists in the order of the parameters."""
        if correction is None:
            return None
        start = [v.clone() for v in self.values]
        anchor = start if correction.anchor is None else self._listed(correction.anchor)
        shift = None if correction.shift is None else self._listed(correction.shift)
        momentum = None if correction.momentum is None else self._listed(correction.momentum)
        at_anchor = None
        if correction.anchor_gradient:
            at_anchor = {
                name: value.clone().requires_grad_()
                for name, value in zip(self.names, anchor, strict=True)
            }

        def change(gradient: Tensors, xb: Tensor, yb: Tensor) -> Tensors:
            step: Tensors = gradient
            if at_anchor is not None:
                with self._products(bf16=bf16):
                    outputs = torch.func.functional_call(self.module, at_anchor, (xb,))
                    loss = self._loss(outputs, yb)
                there = torch.autograd.grad(loss, list(at_anchor.values()))
                step = torch._foreach_sub(step, there)
            if correction.pull:
                away = torch._foreach_sub(self.values, anchor)
                step = torch._foreach_add(step, away, alpha=correction.pull)
            if shift is not None:
                step = torch._foreach_add(step, shift)
            if momentum is not None:
                step = torch._foreach_mul(step, 1 - correction.beta)
                step = torch._foreach_add(step, momentum, alpha=correction.beta)
            return step

        return change

    def _listed(self, arrays: Arrays) -> list[Tensor]:
        listed = []
        for name, value in zip(self.names, self.values, strict=True):
            # Zeros where a correction says nothing of a parameter.
            given = torch.zeros_like(value)
            if name in arrays:
                given.copy_(torch.tensor(arrays[name]))
            listed.append(given)
        return listed


def train(
    module: nn.Module,
    x: Array,
    y: Array,
    steps: Steps,
    loss: Loss,
    rng: np.random.Generator,
    correction: Correction | None = None,
) -> dict[str, float]:
    """Train a module in place; see `LocalSGD`."""
    module.train()
    stepper = Stepper(module, loss)
    return stepper.train(*tensors(x, y, module, loss), steps, rng, correction)


def gradient(module: nn.Module, x: Array, y: Array, loss: Loss) -> tuple[Arrays, float]:
    """The gradient over all examples under the names of what is learned; see `LocalSGD`."""
    module.train()
    stepper = Stepper(module, loss)
    # A forward pass in training mode moves running statistics, which a gradient must not.
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found, cost = stepper.gradient(*tensors(x, y, module, loss))
    for name, buffer in module.named_buffers():
        buffer.copy_(kept[name])
    return named(module, stepper, found), cost


def named(module: nn.Module, stepper: Stepper, gradient: Sequence[Tensor]) -> Arrays:
    """Gradients under the names of everything that is learned, zeros for what is frozen."""
    by_name = dict(zip(stepper.names, gradient, strict=True))
    out: Arrays = {}
    for name, value in module.state_dict().items():
        array = value.detach().cpu().numpy()
        if is_learned(name, array.dtype):
            out[name] = by_name[name].cpu().numpy() if name in by_name else np.zeros_like(array)
    return out


def evaluate(
    module: nn.Module, x: Array, y: Array, loss: Loss, batch_size: int
) -> dict[str, float]:
    """Loss and, for classes, accuracy; see `Evaluation`."""
    module.eval()
    inputs, targets = _fitting(x, y, module, loss)
    device = place(module)  # batch by batch: the whole may not fit
    function = loss_function(loss)
    cost, right = 0.0, 0.0
    classes = loss in ("cross_entropy", "logistic")
    with torch.inference_mode():
        for start in range(0, len(inputs), batch_size):
            yb = targets[start : start + batch_size].to(device)
            z = module(inputs[start : start + batch_size].to(device))
            cost += float(function(z, yb)) * len(yb)
            if loss == "cross_entropy":
                right += float((z.argmax(1) == yb).sum()) / max(yb[0].numel(), 1)
            elif loss == "logistic":
                right += float(((z > 0) == (yb.reshape(z.shape) > 0.5)).sum())
    found = {"examples": float(len(inputs)), "loss": cost / len(inputs)}
    if classes:
        found["accuracy"] = right / len(inputs)
    return found


def _fitting(x: Array, y: Array, module: nn.Module, loss: Loss) -> tuple[Tensor, Tensor]:
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    inputs = _tensor(x)
    if inputs.dtype.is_floating_point or inputs.dtype == torch.uint8:
        inputs = inputs.to(dtype)
    targets = _tensor(y)
    if loss == "cross_entropy":
        if targets.dtype.is_floating_point:
            raise BadData(f"cross-entropy needs classes, y is {y.dtype}{y.shape}")
        targets = targets.long()
    elif not callable(loss):
        targets = targets.to(dtype)
    return inputs, targets


def _tensor(array: Array) -> Tensor:
    # torch warns about memory that it must not write to; a copy is what it asks for.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _logistic(z: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(z, y.reshape(z.shape))


def _squared(z: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(z, y.reshape(z.shape))
