# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST among a hundred clients, with the built-in training; simulated or on agents.

    apt install dataset-fashion-mnist
    fedml simulate examples/simulate/run.yaml

Softmax regression reaches 77.8 % of the test images in fifty rounds of ten clients.
"""

import functools

from fedml import data as sets
from fedml import model as models
from fedml.data import partition
from fedml.federate.local_sgd import Evaluation, LocalSGD


@functools.cache  # once a process, not once a client
def parts(clients, alpha):
    train = sets.load("fashion-mnist").train
    return partition.divide(train, "dirichlet", clients, alpha=alpha, seed=0)


def model(config):
    return models.create(config["model"], seed=0)


def data(client, config):
    rows = parts(client.count, config["alpha"])[client.index]
    return sets.load("fashion-mnist").train.take(rows)


def central(config):
    return sets.load("fashion-mnist").test


train = LocalSGD()  # lr, batch_size and epochs are those of `config`
evaluate = Evaluation()
