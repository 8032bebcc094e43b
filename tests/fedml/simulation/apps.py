# SPDX-License-Identifier: Apache-2.0
"""User files for the tests; each is a whole one, as a person would write it."""

from __future__ import annotations

from pathlib import Path

# torch, a train function of the user's own that takes a correction, unequal clients.
OWN_TRAIN = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional

def model(config):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.standard_normal((9 + 4 * client.index, 6)).astype(np.float32)
    return {"x": x, "y": (x[:, :3] + 0.2 * client.index).argmax(1)}

def train(model, data, config, rng, correction=None):
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    model.train()
    start = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    steps = 0
    total = 0.0
    for rows in np.array_split(rng.permutation(len(x)), 3):
        model.zero_grad()
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        total += loss.item()
        gradient = {n: p.grad.numpy() for n, p in model.named_parameters()}
        if correction is not None:
            at = {n: p.detach().numpy() for n, p in model.named_parameters()}
            gradient = correction.direction(gradient, at, start)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= config["lr"] * torch.from_numpy(gradient[name])
        steps += 1
    said = {"examples": len(x), "steps": steps, "lr": config["lr"], "momentum": 0}
    return said | {"loss": total / steps}

def evaluate(model, data, config):
    model.eval()
    with torch.no_grad():
        z = model(torch.from_numpy(data["x"]))
    return {"accuracy": (z.argmax(1).numpy() == data["y"]).mean(), "examples": len(data["y"])}

def central(config):
    rng = np.random.default_rng(1000)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    return {"x": x, "y": x[:, :3].argmax(1)}
"""

# Softmax regression in NumPy, the built-in training.
LINEAR = """
import numpy as np
from fedml.federate.local_sgd import Evaluation, LocalSGD

def model(config):
    rng = np.random.default_rng(5)
    w = rng.standard_normal((6, 3)).astype(np.float32)
    return {"w": w, "b": np.zeros(3, np.float32)}

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.standard_normal((9 + 4 * client.index, 6)).astype(np.float32)
    return x, (x[:, :3] + 0.2 * client.index).argmax(1)

train = LocalSGD(batch_size=5, epochs=2)
evaluate = Evaluation()

def central(config):
    rng = np.random.default_rng(1000)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    return x, x[:, :3].argmax(1)
"""

# A small convolutional network, the built-in training.
IMAGES = """
import numpy as np
from torch import nn
from fedml.federate.local_sgd import Evaluation, LocalSGD

def model(config):
    norm = nn.BatchNorm2d(4) if config.get("batch_norm") else nn.GroupNorm(2, 4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    )

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.standard_normal((10 + 3 * client.index, 2, 8, 8)).astype(np.float32)
    return {"x": x, "y": x[:, 0, :3, :3].mean(2).argmax(1)}

train = LocalSGD(batch_size=4, epochs=2)
evaluate = Evaluation()
"""

# Softmax regression on real hand-written digits, which lie beside the file.
DIGITS = """
from pathlib import Path
import numpy as np
from fedml.data import partition
from fedml.data.dataset import Examples
from fedml.federate.local_sgd import Evaluation, LocalSGD

with np.load(Path(__file__).parent / "digits.npz") as file:
    FILE = dict(file)
WHOLE = Examples(x=FILE["x"], y=FILE["y"])

def model(config):
    return {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}

def data(client, config):
    parts = partition.divide(WHOLE, "dirichlet", client.count, alpha=1.0, seed=0)
    return WHOLE.take(parts[client.index])

train = LocalSGD(lr=0.5, batch_size=16, epochs=2)
evaluate = Evaluation()

def central(config):
    return FILE["test_x"], FILE["test_y"]
"""


def write(folder: Path, text: str) -> Path:
    """The file, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "app.py"
    path.write_text(text)
    return path
