# SPDX-License-Identifier: Apache-2.0
"""FedAdagrad, FedAdam, FedYogi: an adaptive server on top of FedAvg's clients.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization",
ICLR 2021, Algorithm 2. With ``Delta_t`` the mean of the clients' deltas, element by element::

    m_t = beta1 m_{t-1} + (1 - beta1) Delta_t
    v_t = v_{t-1} + Delta_t^2                                            FedAdagrad
    v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2)      FedYogi
    v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2                          FedAdam
    x_{t+1} = x_t + server_lr * m_t / (sqrt(v_t) + tau)

from ``m_{-1} = 0`` and ``v_{-1} = tau^2``; no bias correction, as in the paper.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Facts, Update, number
from fedml.federate.arrays import Array, Arrays, learned, tagged, untagged, zeros
from fedml.federate.fedavg import FedAvg, stepped


@dataclass(frozen=True, slots=True)
class _FedOpt(FedAvg, abc.ABC):
    """What the three share.

    Attributes:
        server_lr: The paper's eta, > 0.
        beta1: Memory of the direction, in [0, 1).
        tau: Degree of adaptivity, > 0: the smaller, the more alike all coordinates move.
    """

    SPELLINGS: ClassVar[dict[str, str]] = {"server_momentum": "beta1"}

    server_lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "beta1", self.beta1, at_least=0, below=1)
        number(self.name, "tau", self.tau, above=0)

    def start(self, model: Arrays) -> Arrays:
        """``m = 0`` and ``v = tau^2``, float64, for every learned array."""
        m = zeros(learned(model), np.float64)
        v = {name: np.full(array.shape, self.tau**2) for name, array in m.items()}
        return tagged("m", m) | tagged("v", v)

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """One step of the server's optimiser; statistics take the clients' mean."""
        delta = combined.arrays
        m, v, step = untagged("m", state), untagged("v", state), {}
        for name in m:
            d = delta[name].astype(np.float64)
            m[name] = self.beta1 * m[name] + (1 - self.beta1) * d
            v[name] = self.second_moment(v[name], d * d)
            step[name] = m[name] / (np.sqrt(v[name]) + self.tau)
        return stepped(model, step, delta, self.server_lr), tagged("m", m) | tagged("v", v)

    @abc.abstractmethod
    def second_moment(self, v: Array, squared: Array) -> Array:
        """``v_t`` from ``v_{t-1}`` and ``Delta_t^2``, float64 arrays of one shape."""


@dataclass(frozen=True, slots=True)
class FedAdagrad(_FedOpt):
    """Server Adagrad; the paper's experiments use it without momentum, as the default does."""

    name: ClassVar[str] = "fedadagrad"

    server_lr: float = 0.1
    beta1: float = 0.0

    def second_moment(self, v: Array, squared: Array) -> Array:
        """``v + Delta^2``."""
        return v + squared


@dataclass(frozen=True, slots=True)
class FedAdam(_FedOpt):
    """Server Adam.

    Attributes:
        beta2: Memory of the squares, in [0, 1).
    """

    name: ClassVar[str] = "fedadam"

    beta2: float = 0.99

    def __post_init__(self) -> None:
        _FedOpt.__post_init__(self)
        number(self.name, "beta2", self.beta2, at_least=0, below=1)

    def second_moment(self, v: Array, squared: Array) -> Array:
        """``beta2 v + (1 - beta2) Delta^2``."""
        return self.beta2 * v + (1 - self.beta2) * squared


@dataclass(frozen=True, slots=True)
class FedYogi(FedAdam):
    """Server Yogi: like Adam, but ``v`` changes by no more than a share of ``Delta^2``."""

    name: ClassVar[str] = "fedyogi"

    def second_moment(self, v: Array, squared: Array) -> Array:
        """``v - (1 - beta2) Delta^2 sign(v - Delta^2)``."""
        v_t: Array = v - (1 - self.beta2) * squared * np.sign(v - squared)
        return v_t
