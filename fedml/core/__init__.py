# SPDX-License-Identifier: Apache-2.0
"""What a FedML script derives from: how a client trains, how the server aggregates.

    class Mine(fedml.core.ClientTrainer): ...
    fedml.FedMLRunner(args, device, dataset, model, Mine(model, args)).run()

Model parameters are whatever the script makes of them: usually a `state_dict`, or arrays by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

__all__ = ["ClientTrainer", "ServerAggregator"]


class ClientTrainer(ABC):
    """Trains a model on one client's data after the other."""

    def __init__(self, model: Any, args: Any) -> None:
        self.model = model
        self.args = args
        self.id = 0
        self.local_train_dataset: Any = None
        self.local_test_dataset: Any = None
        self.local_sample_number = 0

    def set_id(self, trainer_id: int) -> None:
        """Whose data comes next."""
        self.id = trainer_id

    def is_main_process(self) -> bool:
        """Whether this process speaks for the client."""
        return True

    def update_dataset(
        self, local_train_dataset: Any, local_test_dataset: Any, local_sample_number: int
    ) -> None:
        """The data of the client that comes next."""
        self.local_train_dataset = local_train_dataset
        self.local_test_dataset = local_test_dataset
        self.local_sample_number = local_sample_number

    @abstractmethod
    def get_model_params(self) -> Any:
        """The model's parameters, by name."""

    @abstractmethod
    def set_model_params(self, model_parameters: Any) -> None:
        """Put parameters into the model."""

    def on_before_local_training(self, train_data: Any, device: Any, args: Any) -> None:  # noqa: B027 - a hook
        """Called with the global model set, before `train`."""

    @abstractmethod
    def train(self, train_data: Any, device: Any, args: Any) -> Any:
        """Train the model in place."""

    def on_after_local_training(self, train_data: Any, device: Any, args: Any) -> None:  # noqa: B027 - a hook
        """Called after `train`; what it does to the model is sent."""

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        """Numbers by name: `test_correct`, `test_loss`, `test_total`, and any others."""
        return None


class ServerAggregator(ABC):
    """Makes one model of many, and tests it."""

    def __init__(self, model: Any, args: Any) -> None:
        self.model = model
        self.args = args
        self.id = 0

    def set_id(self, aggregator_id: int) -> None:
        """Which aggregator it is."""
        self.id = aggregator_id

    def is_main_process(self) -> bool:
        """Whether this process speaks for the server."""
        return True

    @abstractmethod
    def get_model_params(self) -> Any:
        """The model's parameters, by name."""

    @abstractmethod
    def set_model_params(self, model_parameters: Any) -> None:
        """Put parameters into the model."""

    def on_before_aggregation(self, raw_client_model_or_grad_list: Any) -> Any:
        """Pairs of examples and parameters, in the order of clients; what is to be aggregated."""
        return raw_client_model_or_grad_list

    def aggregate(self, raw_client_model_or_grad_list: Any) -> Any:
        """One set of parameters: the mean, counted by examples."""
        return weighted_mean(raw_client_model_or_grad_list)

    def on_after_aggregation(self, aggregated_model_or_grad: Any) -> Any:
        """The next global model."""
        return aggregated_model_or_grad

    @abstractmethod
    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        """Numbers by name, of the global model."""

    def test_all(
        self, train_data_local_dict: Any, test_data_local_dict: Any, device: Any, args: Any
    ) -> Any:
        """Test on every client's data; `test` is left out where this returns something true."""
        return False

    def assess_contribution(self) -> None:  # noqa: B027 - a hook
        """Called after each round."""


def weighted_mean(updates: Sequence[tuple[float, Any]]) -> dict[str, Any]:
    """Parameters by name, tensors or arrays, averaged by their examples."""
    total = float(sum(count for count, _ in updates))
    mean: dict[str, Any] = {}
    for name, like in updates[0][1].items():
        value = sum(params[name] * (count / total) for count, params in updates)
        cast = getattr(value, "astype", None) or getattr(value, "to", None)
        mean[name] = cast(like.dtype) if cast is not None else value
    return mean
