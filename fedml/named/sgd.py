# SPDX-License-Identifier: Apache-2.0
"""A data set and a model by name, trained with plain SGD; see `fedml.named`."""

from fedml.federate.local_sgd import Evaluation, LocalSGD
from fedml.named import central, data, model

__all__ = ["central", "data", "evaluate", "model", "train"]

train = LocalSGD(loss="cross_entropy")
evaluate = Evaluation(loss="cross_entropy")
