# SPDX-License-Identifier: Apache-2.0
"""Matrix factorisation of film ratings: what a person likes never leaves the person's machine.

    fedml data fetch movielens-100k
    fedml simulate examples/movielens/run.yaml  # or `federate`, with four machines

The traits of films are the model. A person's taste is worked out anew from them and the person's
own ratings, by ridge regression, wherever it is needed (Singhal et al. 2021, Federated
Reconstruction). A client is a quarter of the 943 people; with `--sweep clients.count=40` smaller.

Predicts each person's latest fifth of ratings within 0.974 stars, root mean square (seeds 1 to 3:
0.971 to 0.977); in one place, `--sweep clients.count=1`, 0.982; each film's mean, 1.07.
"""

import numpy as np

from fedml import data as sets
from fedml.data import partition

FILMS = 1682
# A film or a person with few ratings stays near the average.
CAUTION, RIDGE, SHRINK = 5, 20.0, 0.05


def model(config):
    traits = np.random.normal(0, 0.3, (FILMS, config["width"]))
    return {"traits": traits, "liked": np.full(FILMS, 3.5)}


def data(client, config):
    ratings = sets.load("movielens-100k")
    mine = partition.natural(ratings.train, client.count)[client.index]
    people = np.unique(ratings.train.user[mine])
    return {
        "train": ratings.train.take(mine),
        "test": ratings.test.take(np.flatnonzero(np.isin(ratings.test.user, people))),
    }


def train(model, data, config, rng):
    seen = data["train"]
    tastes = tastes_of(seen, model)
    error = predict(model, tastes, seen) - seen.y
    often = np.bincount(seen.item, minlength=FILMS) + CAUTION
    slope = np.zeros_like(model["traits"])
    np.add.at(slope, seen.item, error[:, None] * tastes[seen.user, :-1])
    model["traits"] -= slope / often[:, None] + SHRINK * model["traits"]
    model["liked"] -= np.bincount(seen.item, error, FILMS) / often
    return {"examples": len(seen), "rmse": rmse(error)}


def evaluate(model, data, config):
    later = data["test"]
    error = predict(model, tastes_of(data["train"], model), later) - later.y
    return {"examples": len(later), "rmse": rmse(error)}


def tastes_of(seen, model):
    """Each person's weights of the traits, and how far their ratings are above the films' usual."""
    traits = np.column_stack([model["traits"][seen.item], np.ones(len(seen))])
    products = np.tile(RIDGE * np.eye(traits.shape[1]), (seen.users, 1, 1))
    np.add.at(products, seen.user, traits[:, :, None] * traits[:, None, :])
    targets = np.zeros((seen.users, traits.shape[1], 1))
    np.add.at(targets[..., 0], seen.user, traits * (seen.y - model["liked"][seen.item])[:, None])
    return np.linalg.solve(products, targets)[..., 0]


def predict(model, tastes, asked):
    taste, traits = tastes[asked.user], model["traits"][asked.item]
    return model["liked"][asked.item] + (taste[:, :-1] * traits).sum(1) + taste[:, -1]


def rmse(error):
    return np.sqrt(np.mean(error**2))
