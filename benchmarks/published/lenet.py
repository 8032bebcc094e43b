# SPDX-License-Identifier: Apache-2.0
"""LeNet on Fashion-MNIST among ten clients, as Flower's baseline niid_bench trains it.

fedml simulate benchmarks/published/lenet_iid.yaml
fedml simulate benchmarks/published/lenet_dirichlet.yaml

Li et al. 2022, "Federated Learning on Non-IID Data Silos" (arXiv 2102.02079); settings, pixels in
0..1 and all, are those of the baseline. Its seeds vary the network and the order of the examples,
never the split; so do those here. The Dirichlet split is the baseline's own, row for row.
"""

import functools

from fedml import data as sets
from fedml.data import partition
from fedml.federate.local_sgd import Evaluation, LocalSGD
from fedml.model.lenet import LeNet

SPLIT = 42  # the baseline's dataset_seed


@functools.cache  # read once a process, not once a client
def clothes():
    return sets.load("fashion-mnist")


@functools.cache
def parts(method, clients):
    return partition.divide(clothes().train, method, clients, alpha=0.5, seed=SPLIT)


def model(config):
    return LeNet()  # its weights are drawn from the run's seed


def data(client, config):
    return clothes().train.take(parts(config["split"], client.count)[client.index])


def central(config):
    return clothes().test


train = LocalSGD()  # lr, batch_size, epochs, momentum and weight_decay are those of `config`
evaluate = Evaluation()
