# SPDX-License-Identifier: Apache-2.0
"""Which topic a text is about: softmax regression on hashed words, no vocabulary to agree on.

    fedml data fetch reuters-r8
    fedml simulate examples/text/run.yaml       # or `federate`, with four machines

Reaches 96.8 % of the test texts of Reuters R8 (seeds 1 to 3: 96.6 to 96.9), as with all texts in
one place, `--sweep clients.count=1`: 96.9 %. With `--sweep algorithm=fedavg` it is 90.0 %: each
client has topics of its own, which SCAFFOLD corrects. Half of the texts are of one topic.

20 Newsgroups, `--sweep texts=20news`: 70.2 %, in one place 74.0 %, a guess is right in 5 %.
"""

import numpy as np

from fedml import data as sets
from fedml.data import partition
from fedml.data.text import bag_of_words
from fedml.federate.local_sgd import Evaluation, LocalSGD

BUCKETS = 4096


def model(config):
    topics = len(sets.load(config["texts"]).classes)
    return {"w": np.zeros((BUCKETS, topics), np.float32), "b": np.zeros(topics, np.float32)}


def data(client, config):
    texts = sets.load(config["texts"]).train
    parts = partition.divide(texts, "dirichlet", client.count, alpha=config["alpha"])
    return arrays(texts.take(parts[client.index]))


def central(config):
    return arrays(sets.load(config["texts"]).test)


def arrays(texts):
    return {"x": bag_of_words(texts.x, BUCKETS), "y": texts.y}


train = LocalSGD()  # lr, momentum and epochs are those of `config`
evaluate = Evaluation()
