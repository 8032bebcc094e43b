# SPDX-License-Identifier: Apache-2.0
"""A data set and a model by name, trained with one of torch's optimisers; see `fedml.named`.

`client_optimizer` names it. Nesterov's momentum, `clip_grad_norm` and
`gradient_accumulation_steps` are for here too: plain SGD knows none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedml.federate.algorithm import Correction
from fedml.federate.local_sgd import Evaluation, examples_of
from fedml.federate.torch_sgd import tensors
from fedml.named import central, data, model

__all__ = ["central", "data", "evaluate", "model", "train"]

evaluate = Evaluation(loss="cross_entropy")


def train(
    model: nn.Module,
    data: Any,
    config: Mapping[str, Any],
    rng: np.random.Generator,
    correction: Correction | None = None,
) -> dict[str, float]:
    """Some epochs; a new optimiser each time, as FedML has it.

    Only SGD reports its learning rate: algorithms that divide by it (SCAFFOLD, FedNova) must not
    take another optimiser's for one.
    """
    x, y = tensors(*examples_of(data), model, "cross_entropy")
    size, epochs = int(config.get("batch_size", 32)), int(config.get("epochs", 1))
    each = int(config.get("gradient_accumulation_steps", 1))
    clip = config.get("clip_grad_norm")
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    start = {n: p.detach().numpy().copy() for n, p in learned} if correction is not None else {}
    optimizer = make([p for _, p in learned], config)
    model.train()
    total, steps = 0.0, 0
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x)))
        batches = torch.tensor_split(order, list(range(size, len(x), size)))
        for number, rows in enumerate(batches, 1):
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            torch.autograd.backward(loss / each)
            total += float(loss.detach()) * len(rows)
            if number % each and number < len(batches):
                continue
            if correction is not None:
                _correct(learned, correction, start)
            if clip:
                nn.utils.clip_grad_norm_([p for _, p in learned], float(clip))
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    found = {"examples": len(x), "steps": steps, "loss": total / max(1, epochs * len(x))}
    return found | ({"lr": config["lr"]} if config["client_optimizer"] == "sgd" else {})


def make(parameters: Iterable[nn.Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser that a configuration asks for; Adam with AMSGrad, as FedML has it."""
    parameters = list(parameters)
    lr, decay = float(config["lr"]), float(config.get("weight_decay", 0.0))
    momentum = float(config.get("momentum", 0.0))
    match config["client_optimizer"]:
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, amsgrad=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=lr, weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, weight_decay=decay, momentum=momentum)
    nesterov = bool(config.get("nesterov")) and momentum > 0
    return torch.optim.SGD(
        parameters, lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov
    )


def _correct(
    learned: list[tuple[str, nn.Parameter]],
    correction: Correction,
    start: Mapping[str, Any],
) -> None:
    """What the algorithm adds to the gradient, written over it."""
    gradient = {n: p.grad.numpy() for n, p in learned if p.grad is not None}
    at = {n: p.detach().numpy() for n, p in learned}
    changed = correction.direction(gradient, at, dict(start))
    for name, parameter in learned:
        if name in changed:
            parameter.grad = torch.from_numpy(np.ascontiguousarray(changed[name]))
