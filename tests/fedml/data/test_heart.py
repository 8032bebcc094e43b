# SPDX-License-Identifier: Apache-2.0
"""The four hospitals: counted as UCI counts them, encoded without each other, worth federating."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedml import data
from fedml.data.columns import Number
from fedml.data.dataset import Array
from fedml.data.errors import DamagedData
from fedml.data.heart import COLUMNS, FEATURES, features

Load = Callable[[str], data.Dataset[Any]]

HEADER = "age,sex,cp,trestbps,chol,fbs,restecg,thalch,exang,oldpeak,slope,ca,thal"
VALUES = (
    "63,Male,typical angina,145,233,TRUE,lv hypertrophy,150,FALSE,2.3,downsloping,0,fixed defect"
)
PATIENT = dict(zip(HEADER.split(","), VALUES.split(","), strict=True))


def test_each_hospital_has_the_patients_that_uci_counts(real: Load) -> None:
    heart = real("heart")
    counted = {
        name: len(heart.of_client(name).train) + len(heart.of_client(name).test)
        for name in heart.clients
    }
    assert counted == {"Cleveland": 303, "Hungary": 294, "Switzerland": 123, "VA Long Beach": 200}


def test_each_hospital_has_the_sick_that_uci_counts_in_both_parts(real: Load) -> None:
    heart = real("heart")
    for name, sick in (
        *(("Cleveland", 139), ("Hungary", 106)),
        *(("Switzerland", 115), ("VA Long Beach", 149)),
    ):
        own = heart.of_client(name)
        assert own.train.y.sum() + own.test.y.sum() == sick
        assert 0 < own.test.y.mean() < 1
        assert abs(own.train.y.mean() - own.test.y.mean()) < 0.02


def test_a_patient_is_encoded_by_the_written_constants() -> None:
    (row,) = features([PATIENT])
    value = dict(zip(FEATURES, row.tolist(), strict=True))

    assert value["age"] == pytest.approx((63 - 55) / 10)
    assert value["chol"] == pytest.approx((233 - 240) / 50)
    assert value["sex=Male"] == value["thal=fixed defect"] == 1
    assert value["thal=missing"] == value["chol missing"] == 0
    assert row.shape == (35,)


def test_a_cholesterol_of_zero_is_a_missing_one(real: Load) -> None:
    swiss = real("heart").of_client("Switzerland").train
    assert (swiss.x[:, FEATURES.index("chol missing")] == 1).all()
    assert (swiss.x[:, FEATURES.index("chol")] == 0).all()
    assert np.array_equal(features([PATIENT | {"chol": "0"}]), features([PATIENT | {"chol": ""}]))


def test_the_centres_fit_the_patients(real: Load) -> None:
    heart = real("heart")
    for column, kind in COLUMNS.items():
        if isinstance(kind, Number):
            values = heart.train.x[:, FEATURES.index(column)]
            assert abs(values.mean()) < 0.5
            assert 0.3 < values.std() < 1.5


def test_a_category_from_elsewhere_is_refused() -> None:
    with pytest.raises(DamagedData, match="cp cannot be 'severe'"):
        features([PATIENT | {"cp": "severe"}])


def logistic(x: Array, y: Array, rounds: int = 300) -> Array:
    """Plain gradient descent with a little weight decay; the last weight is the bias."""
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        error = 1 / (1 + np.exp(-x @ weights)) - y
        weights -= 0.3 * (x.T @ error / len(y) + 1e-3 * weights)
    return weights


def accuracy(weights: Array, x: Array, y: Array) -> float:
    return float(((x @ weights[:-1] + weights[-1] > 0) == y).mean())


def test_all_hospitals_together_predict_better_than_any_alone(real: Load) -> None:
    heart = real("heart")
    together = accuracy(logistic(heart.train.x, heart.train.y), heart.test.x, heart.test.y)
    alone = []
    for name in heart.clients:
        own = heart.of_client(name).train
        alone.append(accuracy(logistic(own.x, own.y), heart.test.x, heart.test.y))

    assert together > 0.80
    assert max(alone) < together
