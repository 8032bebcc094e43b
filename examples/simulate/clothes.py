# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST among many clients, with the built-in training; simulated or on agents.

fedml simulate examples/simulate/run.yaml
"""

import functools

from fedml import data as sets
from fedml import model as models
from fedml.data import partition
from fedml.federate.local_sgd import Evaluation, LocalSGD


@functools.cache  # read once a process, not once a client
def clothes():
    return sets.load("fashion-mnist")


@functools.cache
def parts(clients, alpha):
    return partition.divide(clothes().train, "dirichlet", clients, alpha=alpha, seed=0)


def model(config):
    return models.create(config["model"], seed=0)


def data(client, config):
    mine = clothes().train.take(parts(client.count, config["alpha"])[client.index])
    return {"x": images(mine.x), "y": mine.y}


def central(config):
    test = clothes().test
    return {"x": images(test.x), "y": test.y}


def images(x):
    """One channel."""
    return x.reshape(len(x), 1, 28, 28)


train = LocalSGD()  # lr, batch_size and epochs are those of `config`
evaluate = Evaluation()
