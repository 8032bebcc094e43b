# SPDX-License-Identifier: Apache-2.0
"""Images and tables: known facts about the published data."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedml import data
from fedml.data.errors import DamagedData
from fedml.data.health import arff
from fedml.data.images import idx

Load = Callable[[str], data.Dataset[Any]]


def test_fashion_mnist_is_the_published_one(real: Load) -> None:
    fashion = real("fashion-mnist")

    assert fashion.train.x.shape == (60_000, 1, 28, 28)
    assert np.bincount(fashion.train.y).tolist() == [6000] * 10
    assert np.bincount(fashion.test.y).tolist() == [1000] * 10
    # Mean and deviation that everybody normalises with.
    assert fashion.train.x.mean(dtype=np.float64) == pytest.approx(0.2860, abs=1e-4)
    assert fashion.train.x.std(dtype=np.float64) == pytest.approx(0.3530, abs=1e-4)
    assert fashion.classes[fashion.train.y[0]] == "Ankle boot"


@pytest.mark.parametrize(("name", "side"), [("mnist-5k", 28), ("digits", 8)])
def test_digits_are_grey_images_with_even_classes(name: str, side: int, real: Load) -> None:
    digits = real(name)

    assert digits.train.x.shape[1:] == (1, side, side)
    assert digits.train.x.min() == 0
    assert digits.train.x.max() == 1
    counts = np.bincount(digits.test.y)
    assert counts.max() - counts.min() <= 2
    # The nearest class mean tells most digits: images and labels belong together.
    means = np.stack([digits.train.x[digits.train.y == k].mean(axis=0).ravel() for k in range(10)])
    flat = digits.test.x.reshape(len(digits.test), -1)
    nearest = ((flat[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == digits.test.y).mean() > 0.75


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">HBBI", 0, 0x0D, 1, 1) + b"\0\0\0\0",  # floats
        struct.pack(">HBBII", 0, 0x08, 2, 2, 3) + b"\0" * 5,  # one byte short
        struct.pack(">HBBI", 1, 0x08, 1, 1) + b"\0",
    ],
)
def test_an_idx_file_that_contradicts_itself_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedData):
        idx(content)


def test_breast_cancer_is_the_published_one(real: Load) -> None:
    tumours = real("breast-cancer")
    y = np.concatenate([tumours.train.y, tumours.test.y])

    assert tumours.classes == ("malignant", "benign")
    assert np.bincount(y).tolist() == [212, 357]
    assert tumours.features[0] == "mean radius"
    assert tumours.features[29] == "worst fractal dimension"
    worst_area = tumours.train.x[:, tumours.features.index("worst area")]
    assert worst_area[tumours.train.y == 0].mean() > worst_area[tumours.train.y == 1].mean() + 1


@pytest.mark.parametrize("name", ["breast-cancer", "diabetes", "gbsg2", "whas500", "flchain"])
def test_fixed_centres_and_scales_fit_the_published_tables(name: str, real: Load) -> None:
    train = real(name).train.x
    numbers = [column for column in train.T if len(np.unique(column)) > 2]

    for column in numbers:
        assert abs(column.mean()) < 0.35
        assert 0.7 < column.std() < 1.4


def test_body_mass_goes_with_the_progression_of_diabetes(real: Load) -> None:
    diabetes = real("diabetes")
    bmi = diabetes.train.x[:, diabetes.features.index("bmi")]

    assert diabetes.train.y.min() >= 25
    assert diabetes.train.y.max() <= 346
    assert np.corrcoef(bmi, diabetes.train.y)[0, 1] == pytest.approx(0.586, abs=0.05)


@pytest.mark.parametrize(
    ("name", "people", "events"),
    [("gbsg2", 686, 299), ("whas500", 500, 215), ("flchain", 7874, 2169)],
)
def test_survival_sets_have_the_published_events(
    name: str, people: int, events: int, real: Load
) -> None:
    loaded = real(name)
    y = np.concatenate([loaded.train.y, loaded.test.y])

    assert len(y) == people
    assert y[:, 0].sum() == events
    assert (y[:, 1] >= 0).all()


def test_the_cause_of_death_is_no_feature(real: Load) -> None:
    assert not any("chapter" in feature for feature in real("flchain").features)


def test_arff_quotes_case_and_comments() -> None:
    text = (
        "% note\n@RELATION x\n@Attribute a numeric\n@attribute b {'p q',r}\n@DATA\n1,'p q'\n?,r\n"
    )
    assert arff(text) == [{"a": "1", "b": "p q"}, {"a": "?", "b": "r"}]
    with pytest.raises(DamagedData, match="without @data"):
        arff("@relation x\n")
