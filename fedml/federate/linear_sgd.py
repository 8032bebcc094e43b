# SPDX-License-Identifier: Apache-2.0
"""SGD for linear, logistic, softmax and ridge regression with the gradient written out.

With ``z = x W + b``, a batch of B and targets ``t``::

    cross-entropy   dL/dz = (softmax(z) - onehot(t)) / B
    logistic        dL/dz = (sigmoid(z) - t) / B
    squared         dL/dz = 2 (z - t) / (B outputs)            (ridge with a weight decay)
    dL/dW = x^T dL/dz,   dL/db = sum dL/dz

The same steps as torch's autograd and SGD take, without either: the weights of a small model stay
in the processor's first cache while a client trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedml.federate.algorithm import Correction
from fedml.federate.arrays import Array, Arrays
from fedml.federate.local_sgd import BadData, Loss, Steps

_FEW_CLASSES = 64  # up to here a one-hot row is cheaper than fancy indexing

# Inputs (N, inputs), targets, classes where the loss has them.
Prepared: TypeAlias = tuple[Array, Array, npt.NDArray[np.intp] | None]
# From the gradient of weight (outputs, inputs) and bias to the step that the rate multiplies.
Change: TypeAlias = Callable[[Array, Array | None], tuple[Array, Array | None]]


class Linear:
    """One linear model's weights and the buffers to train them in.

    Attributes:
        weight: ``(outputs, inputs)``, a row for each output as torch has it; trained in place.
        bias: ``(outputs,)`` or None.
    """

    def __init__(self, weight: Array, bias: Array | None, loss: Loss) -> None:
        if callable(loss):
            raise BadData("a linear model without torch takes a loss by name, not a function")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = f"{weight.T.shape} and {None if bias is None else bias.shape}"
            raise BadData(f"a linear model has w (inputs, outputs) and b (outputs,), not {shapes}")
        if loss == "logistic" and weight.shape[0] != 1:
            raise BadData(f"logistic loss needs one output, the model has {weight.shape[0]}")
        self.weight, self.bias, self.loss = weight, bias, loss
        self._step_of_weight = np.empty_like(weight)
        self._rows = 0
        self._row_starts: dict[tuple[int, int], npt.NDArray[np.intp]] = {}
        self._grow(1)

    def prepare(self, x: Array, y: Array) -> Prepared:
        """Inputs as rows, targets as the loss takes them, and the true classes.

        Raises:
            BadData: They do not fit this model.
        """
        outputs, inputs = self.weight.shape
        rows = np.ascontiguousarray(
            x.reshape(len(x), math.prod(x.shape[1:])), dtype=self.weight.dtype
        )
        if len(x) and rows.shape[1] != inputs:
            raise BadData(f"an example has {rows.shape[1]} numbers, the model takes {inputs}")
        if self.loss != "cross_entropy":
            targets = y.reshape(len(y), math.prod(y.shape[1:])).astype(self.weight.dtype)
            if len(y) and targets.shape[1] != outputs:
                raise BadData(f"y has {targets.shape[1]} numbers a row, the model gives {outputs}")
            return rows, targets, None
        if y.ndim != 1 or (y.dtype.kind not in "iu" and not np.array_equal(y, y.astype(np.int64))):
            raise BadData(f"cross-entropy needs one class a row, y is {y.dtype}{y.shape}")
        classes = y.astype(np.intp)
        if len(classes) and not (classes.min() >= 0 and classes.max() < outputs):
            wrong = int(classes.max() if classes.min() >= 0 else classes.min())
            raise BadData(f"y holds class {wrong}, the model has classes 0 to {outputs - 1}")
        if outputs > _FEW_CLASSES:
            return rows, np.empty((0, 0), self.weight.dtype), classes
        return rows, np.eye(outputs, dtype=self.weight.dtype)[classes], classes

    def epoch(
        self, prepared: Prepared, steps: Steps, losses: Array, change: Change | None = None
    ) -> None:
        """One pass in the order given; what each example costs goes to ``losses``.

        Args:
            prepared: From `prepare`.
            steps: How to train.
            losses: Shape (N,), filled for `mean_loss`.
            change: Turns a gradient of weight and bias into the step to take; None takes it.
        """
        x, targets, classes = prepared
        rows = min(steps.batch_size, len(x))
        if self._rows < rows:
            self._grow(rows)
        if classes is not None:
            classes = self._rows_of(len(x), steps.batch_size) + classes
            if change is None and len(targets):
                self._softmax_epoch(x, targets, classes, steps, losses)
                return
        weight, bias, step = self.weight, self.bias, self._step_of_weight
        for start in range(0, len(x), steps.batch_size):
            stop = min(start + steps.batch_size, len(x))
            xb, z = x[start:stop], self._z[: stop - start]
            np.dot(xb, weight.T, out=z)
            if bias is not None:
                np.add(z, bias, out=z)
            t = targets[start:stop]
            where = None if classes is None else classes[start:stop]
            self._slope(z, t, where, losses[start:stop])
            z /= (stop - start) * (z.shape[1] / 2 if self.loss == "squared" else 1)
            np.dot(z.T, xb, out=step)
            w_step, b_step = step, None if bias is None else z.sum(0)
            if change is not None:
                w_step, b_step = change(w_step, b_step)
            weight -= steps.lr * w_step
            if bias is not None and b_step is not None:
                bias -= steps.lr * b_step

    def _softmax_epoch(
        self,
        x: Array,
        targets: Array,
        classes: npt.NDArray[np.intp],
        steps: Steps,
        losses: Array,
    ) -> None:
        """The same for softmax regression and plain SGD, down to what NumPy needs to be told.

        For a small model the calls cost more than the arithmetic: no temporary is made, and every
        name is a local one.
        """
        weight, bias, step = self.weight, self.bias, self._step_of_weight
        transposed, size, lr = weight.T, steps.batch_size, steps.lr
        dot, add, subtract, multiply, divide = np.dot, np.add, np.subtract, np.multiply, np.divide
        exp, take = np.exp, self._flat.take
        # By position, which is faster than by name, and more than NumPy's types know of.
        largest: Any = np.maximum.reduce
        total: Any = np.add.reduce
        all_z, all_columns, all_ones = self._z, self._column, self._ones
        bias_step = self._step_of_bias
        n = 0
        for start in range(0, len(x), size):
            stop = start + size
            xb = x[start:stop]
            if len(xb) != n:
                n = len(xb)
                z, column, ones = all_z[:n], all_columns[:n], all_ones[:n]
                z_transposed, scale = z.T, lr / n
            dot(xb, transposed, z)
            if bias is not None:
                add(z, bias, z)
            largest(z, 1, None, column, True)
            subtract(z, column, z)
            exp(z, z)
            total(z, 1, None, column, True)
            divide(z, column, z)
            take(classes[start:stop], None, losses[start:stop], "clip")
            subtract(z, targets[start:stop], z)
            multiply(z, scale, z)
            dot(z_transposed, xb, step)
            subtract(weight, step, weight)
            if bias is not None:
                dot(ones, z, bias_step)
                subtract(bias, bias_step, bias)

    def outputs(self, x: Array) -> Array:
        """``x W + b``."""
        z: Array = x @ self.weight.T
        return z if self.bias is None else z + self.bias

    def _slope(self, z: Array, t: Array, where: npt.NDArray[np.intp] | None, losses: Array) -> None:
        """From outputs to B times the loss's derivative, in place; what it costs to ``losses``."""
        if where is not None:
            z -= z.max(1, keepdims=True)
            np.exp(z, out=z)
            z /= z.sum(1, keepdims=True)
            self._flat.take(where, out=losses, mode="clip")
            self._flat[where] -= 1
        elif self.loss == "logistic":
            # log(1 + e^z) - t z, without overflow.
            losses[:] = (np.logaddexp(0, z) - t * z)[:, 0]
            z[:] = 0.5 * (1 + np.tanh(0.5 * z))
            z -= t
        else:
            z -= t
            losses[:] = np.square(z).mean(1)

    def mean_loss(self, losses: Array) -> float:
        """The mean of what `epoch` left in ``losses``, which is used up."""
        if self.loss == "cross_entropy":
            # Until here they are probabilities: one logarithm for all.
            np.log(losses, out=losses)
            return -float(np.add.reduce(losses)) / max(len(losses), 1)
        return float(np.add.reduce(losses)) / max(len(losses), 1)

    def _rows_of(self, n: int, batch: int) -> npt.NDArray[np.intp]:
        """Where in its batch's outputs, laid flat, the row of each example begins."""
        known = self._row_starts.get((n, batch))
        if known is None:
            self._row_starts.clear()  # clients of one size are common, of many they are not
            known = np.arange(n) % batch * self.weight.shape[0]
            self._row_starts[n, batch] = known
        return known

    def _grow(self, rows: int) -> None:
        outputs, dtype = self.weight.shape[0], self.weight.dtype
        self._rows = rows
        self._z = np.empty((rows, outputs), dtype)
        self._flat = self._z.reshape(-1)
        self._column = np.empty((rows, 1), dtype)
        self._ones = np.ones(rows, dtype)
        self._step_of_bias = np.empty(outputs, dtype)


def train(
    model: Arrays,
    x: Array,
    y: Array,
    steps: Steps,
    loss: Loss,
    rng: np.random.Generator,
    correction: Correction | None = None,
) -> dict[str, float]:
    """Train ``{"w", "b"}`` in place; see `LocalSGD`."""
    if steps.bf16:
        raise BadData("bf16 needs a torch model, as fedml.model.create('linear') is one")
    linear = _linear(model, loss)
    prepared = linear.prepare(x, y)
    # What diverges is found by whoever looks at the weights.
    with np.errstate(all="ignore"):
        found = run(linear, prepared, steps, rng, changed(linear, steps, correction))
    model["w"][...] = linear.weight.T
    return found


def run(
    linear: Linear,
    prepared: Prepared,
    steps: Steps,
    rng: np.random.Generator | None,
    change: Change | None = None,
) -> dict[str, float]:
    """All epochs of one client; its numbers. Without ``shuffle`` no generator is needed.

    NumPy's warnings are the caller's to switch off: once for many calls costs less.
    """
    n = len(prepared[0])
    losses = np.empty(n, linear.weight.dtype)
    total, epochs = 0.0, 0
    for order in steps.orders(n, rng):
        epochs += 1
        turn = prepared
        if order is not None:
            x, targets, classes = prepared
            turn = (
                x[order],
                targets[order] if len(targets) else targets,
                None if classes is None else classes[order],
            )
        linear.epoch(turn, steps, losses, change)
        total += linear.mean_loss(losses)
    return steps.done(n, epochs, total / epochs)


def changed(linear: Linear, steps: Steps, correction: Correction | None = None) -> Change | None:
    """What turns gradients into steps where there is momentum, decay or a correction; else None.

    Args:
        linear: The model about to be trained, at the weights that training starts from.
        steps: How it trains.
        correction: Of the algorithm, under the names ``w`` and ``b`` of a dict model.
    """
    if correction is None and not steps.momentum and not steps.weight_decay:
        return None
    if correction is not None and correction.anchor_gradient:
        raise BadData(
            "mime needs gradients at an anchor, which a dict model does not give: "
            "use fedml.model.create('linear'), or mimelite"
        )

    def now() -> Arrays:
        bias = {} if linear.bias is None else {"b": linear.bias}
        return {"w": linear.weight.T, **bias}

    start = {name: array.copy() for name, array in now().items()}
    velocity: dict[str, Array] = {}

    def change(w: Array, b: Array | None) -> tuple[Array, Array | None]:
        at = now()
        step: dict[str, Array] = {"w": w.T} if b is None else {"w": w.T, "b": b}
        if correction is not None:
            step = dict(correction.direction(step, at, start))
        for name, value in step.items():
            if steps.weight_decay:
                value = value + steps.weight_decay * at[name]
            if steps.momentum:
                value = steps.momentum * velocity.get(name, 0) + value
                velocity[name] = value
            step[name] = value
        return step["w"].T, step.get("b")

    return change


def gradient(model: Arrays, x: Array, y: Array, loss: Loss) -> tuple[Arrays, float]:
    """The gradient over all examples, and the loss; see `LocalSGD`."""
    linear = _linear({name: array.copy() for name, array in model.items()}, loss)
    if not len(x):
        return {name: np.zeros_like(array) for name, array in model.items()}, 0.0
    found: Arrays = {}

    def keep(w: Array, b: Array | None) -> tuple[Array, Array | None]:
        found["w"] = w.T.copy()
        if b is not None:
            found["b"] = b.copy()
        return w, b

    losses = np.empty(len(x), linear.weight.dtype)
    with np.errstate(all="ignore"):
        linear.epoch(linear.prepare(x, y), Steps(lr=1.0, batch_size=len(x)), losses, keep)
        cost = linear.mean_loss(losses)
    return {name: found[name] for name in model}, cost


def evaluate(model: Arrays, x: Array, y: Array, loss: Loss) -> dict[str, float]:
    """Loss and, for classes, accuracy; see `Evaluation`."""
    linear = _linear(model, loss)
    rows, targets, classes = linear.prepare(x, y)
    return measured(linear.outputs(rows), targets, classes, linear.loss)


def measured(
    z: Array, targets: Array, classes: npt.NDArray[np.intp] | None, loss: Loss
) -> dict[str, float]:
    """Loss and accuracy from outputs."""
    found = {"examples": float(len(z))}
    if loss == "cross_entropy" and classes is not None:
        shifted = z - z.max(1, keepdims=True)
        true = shifted[np.arange(len(z)), classes]
        found["loss"] = float((np.log(np.exp(shifted).sum(1)) - true).mean())
        found["accuracy"] = float((z.argmax(1) == classes).mean())
    elif loss == "logistic":
        found["loss"] = float((np.logaddexp(0, z) - targets * z).mean())
        found["accuracy"] = float(((z > 0) == (targets > 0.5)).mean())
    else:
        found["loss"] = float(np.square(z - targets).mean())
    return found


def _linear(model: Arrays, loss: Loss) -> Linear:
    """The weight is a copy, stored by outputs; the bias is the model's own."""
    return Linear(np.ascontiguousarray(model["w"].T), model.get("b"), loss)
