# SPDX-License-Identifier: Apache-2.0
"""The workloads of `simulation.py` in other simulators; run by it, each in its own environment.

    PEER_PYTHON simulation_peers.py pfl|fedml|flower W1|W2 ROUNDS     (in the folder with the data)

Each is given the same data, batch size, rate and number of clients a round, one thread a process,
plain SGD over batches in stored order, and no evaluation where that can be switched off. Nothing
of this project is imported here: FedML's package has the same name.
"""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HOME"] = str(Path.cwd())  # FedML leaves files in the home directory as it is imported

import sys

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from simulation import COHORT, WORK, Clock
from torch import nn
from torch.nn.functional import cross_entropy


def network(name):
    torch.manual_seed(7)
    if name == "W1":
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        for p in net.parameters():
            nn.init.zeros_(p)
        return net
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


class Data:
    def __init__(self, name):
        self._x = np.load(f"{name}_x.npy", mmap_mode="r")
        self._y = np.load(f"{name}_y.npy", mmap_mode="r")

    def of(self, client):
        return torch.from_numpy(np.array(self._x[client])), torch.from_numpy(
            np.array(self._y[client])
        )


def pfl(name, rounds, clock):
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    w, data = WORK[name], Data(name)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(name)

        def forward(self, x):
            return self.net(x)

        def loss(self, x, y, eval=False):  # noqa: A002 - pfl's own spelling
            self.train()
            return cross_entropy(self(x), y)

        @torch.no_grad()
        def metrics(self, x, y, eval=True):  # noqa: A002
            return {"loss": Weighted(cross_entropy(self(x), y, reduction="sum").item(), len(y))}

    class Tick(TrainingProcessCallback):
        done = 0

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            self.done += 1
            clock.tick(self.done == rounds, self.done > rounds // 3)
            return False, Metrics()

    net = Net()
    model = PyTorchModel(
        model=net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )
    rng = np.random.default_rng(0)
    order = iter(
        [k for _ in range(rounds + 1) for k in rng.choice(w["clients"], COHORT, replace=False)]
    )

    def user(client):
        x, y = data.of(client)
        return Dataset(raw_data=[x, y], user_id=str(client))

    everybody = FederatedDataset(make_dataset_fn=user, user_sampler=lambda: next(order))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=everybody, val_data=everybody),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=w["lr"], local_batch_size=w["batch"]
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Tick()],
    )


def fedml(name, rounds, clock):
    """The simulator of backend "sp"; the ends of its rounds are read from its log."""
    import logging
    import tempfile

    import fedml as theirs

    w, data = WORK[name], Data(name)
    text = f"""
common_args: {{training_type: simulation, random_seed: 0, config_version: local}}
data_args: {{dataset: synthetic, data_cache_dir: /tmp, partition_method: custom}}
model_args: {{model: custom}}
train_args: {{federated_optimizer: FedAvg, client_id_list: "[]",
  client_num_in_total: {w["clients"]},
  client_num_per_round: {COHORT}, comm_round: {rounds}, epochs: 1, batch_size: {w["batch"]},
  client_optimizer: sgd, learning_rate: {w["lr"]}, weight_decay: 0.0}}
validation_args: {{frequency_of_the_test: 1000000}}
device_args: {{using_gpu: false, gpu_id: 0}}
comm_args: {{backend: sp}}
tracking_args: {{enable_wandb: false, enable_tracking: false, using_mlops: false}}
"""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        file.write(text)
    sys.argv = [sys.argv[0], "--cf", file.name]
    args = theirs.init()
    done = 0

    class Tick(logging.Filter):
        def filter(self, record):
            nonlocal done
            said = record.getMessage()
            begins = "Communication round : " in said and not said.endswith(" : 0")
            if begins or f"local_test_on_all_clients : {rounds - 1}" in said:
                done += 1
                clock.tick(done == rounds, done > rounds // 3)
            return True

    logging.getLogger().addFilter(Tick())
    logging.getLogger().setLevel(logging.INFO)
    train, sizes = {}, {}
    for client in range(w["clients"]):
        x, y = data.of(client)
        starts = range(0, len(x), w["batch"])
        train[client] = [(x[i : i + w["batch"]], y[i : i + w["batch"]]) for i in starts]
        sizes[client] = len(x)
    # It tests all clients after the first and the last round; only one has anything to test.
    test = dict.fromkeys(train) | {0: train[0]}
    total = sum(sizes.values())
    dataset = [total, w["each"], None, None, sizes, train, test, 10]
    device = theirs.device.get_device(args)
    theirs.FedMLRunner(args, device, dataset, network(name)).run()


def flower(name, rounds, clock):
    """Its simulation on Ray, one core an actor."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.common import Message
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    w, folder = WORK[name], str(Path.cwd())
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message, context):
        os.chdir(folder)
        torch.set_num_threads(1)
        net = network(name)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = Data(name).of(int(context.node_config["partition-id"]))
        optimiser = torch.optim.SGD(net.parameters(), lr=w["lr"])
        for start in range(0, len(x), w["batch"]):
            optimiser.zero_grad()
            rows = slice(start, start + w["batch"])
            cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
        arrays = ArrayRecord(net.state_dict())
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(RecordDict(content), reply_to=message)

    class Ticking(FedAvg):
        def aggregate_train(self, server_round, replies):
            found = super().aggregate_train(server_round, replies)
            clock.tick(server_round == rounds, server_round > rounds // 3)
            return found

    @server_app.main()
    def main(grid, context):
        strategy = Ticking(
            fraction_train=COHORT / w["clients"],
            fraction_evaluate=0.0,
            min_train_nodes=COHORT,
            min_available_nodes=w["clients"],
        )
        arrays = ArrayRecord(network(name).state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=w["clients"],
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    peer, work, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    ticks = Clock()
    {"pfl": pfl, "fedml": fedml, "flower": flower}[peer](work, count, ticks)
    ticks.report(count)
