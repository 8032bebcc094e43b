# SPDX-License-Identifier: Apache-2.0
"""Patients in tables: tumours, diabetes, and three sets in which the question is how long.

Centres and scales are averages and deviations of the published tables, rounded and
fixed here, so that a client never needs another's statistics (see `columns`). A survival target
is ``(N, 2)`` float32: 1 if the event was seen and 0 if the patient was lost to follow-up before
it, then the days until either.
"""

import csv
import gzip
import io
import re
from collections.abc import Sequence

import numpy as np

from fedml.data.columns import Category, Columns, Number, Row, encode, feature_names
from fedml.data.dataset import Array, Dataset, Examples, by_digest
from fedml.data.errors import DamagedData
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

TEST_SHARE = 0.2
_DATA_LINE = re.compile(r"(?im)^@data\s*$")

# Ten measures of cell nuclei, each as (mean, standard error, worst): centre and scale.
_NUCLEI: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "radius": ((14, 3.5), (0.41, 0.28), (16, 4.8)),
    "texture": ((19, 4.3), (1.2, 0.55), (26, 6.1)),
    "perimeter": ((92, 24), (2.9, 2.0), (110, 34)),
    "area": ((650, 350), (40, 45), (880, 570)),
    "smoothness": ((0.096, 0.014), (0.007, 0.003), (0.13, 0.023)),
    "compactness": ((0.10, 0.053), (0.025, 0.018), (0.25, 0.16)),
    "concavity": ((0.089, 0.080), (0.032, 0.030), (0.27, 0.21)),
    "concave points": ((0.049, 0.039), (0.012, 0.0062), (0.11, 0.066)),
    "symmetry": ((0.18, 0.027), (0.021, 0.0083), (0.29, 0.062)),
    "fractal dimension": ((0.063, 0.0071), (0.0038, 0.0026), (0.084, 0.018)),
}
BREAST_CANCER: Columns = {
    f"{statistic} {measure}": Number(*_NUCLEI[measure][which])
    for which, statistic in enumerate(("mean", "error", "worst"))
    for measure in _NUCLEI
}
DIABETES: Columns = {
    "age": Number(49, 13),
    "sex": Category(("1", "2")),
    "bmi": Number(26, 4.4),
    "blood pressure": Number(95, 14),
    "total cholesterol": Number(190, 35),
    "ldl": Number(120, 30),
    "hdl": Number(50, 13),
    "cholesterol/hdl": Number(4.1, 1.3),
    "log triglycerides": Number(4.6, 0.52),
    "glucose": Number(91, 11),
}
GBSG2: Columns = {
    "horTh": Category(("no", "yes")),  # hormone therapy
    "age": Number(53, 10),
    "menostat": Category(("Pre", "Post")),
    "tsize": Number(29, 14),  # mm
    "tgrade": Category(("I", "II", "III")),
    "pnodes": Number(5, 5.5),
    "progrec": Number(110, 200),  # fmol
    "estrec": Number(96, 150),  # fmol
}
WHAS500: Columns = {
    "age": Number(70, 14),
    "gender": Category(("0", "1")),
    "hr": Number(87, 24),
    "sysbp": Number(140, 32),
    "diasbp": Number(78, 22),
    "bmi": Number(27, 5.4),
    **{name: Category(("0", "1")) for name in ("cvd", "afb", "sho", "chf", "av3")},
    "miord": Category(("0", "1")),
    "mitype": Category(("0", "1")),
    "los": Number(6.1, 4.7),  # days in hospital
}
FLCHAIN: Columns = {
    "age": Number(64, 10),
    "sex": Category(("F", "M")),
    "sample.yr": Number(1997, 1.8),
    "kappa": Number(1.4, 0.9),
    "lambda": Number(1.7, 1.0),
    "flc.grp": Number(5.5, 2.9),
    "creatinine": Number(1.1, 0.42, may_miss=True),
    "mgus": Category(("no", "yes")),
    # Not `chapter`, the cause of death: only the dead have one.
}


def _divided(
    name: str, columns: Columns, rows: Sequence[Row], y: Array, *, missing: str = ""
) -> Dataset[Examples]:
    everybody = Examples(x=encode(columns, rows, missing=missing), y=y)
    # Survival: censored and observed patients are divided alike. A plain number: one group.
    labels = y[:, 0] if y.ndim == 2 else y if y.dtype == np.int64 else np.zeros(len(y))
    keys = [str(row) for row in range(len(y))]
    train, test = by_digest(keys, labels.tolist(), TEST_SHARE)
    return Dataset(
        name=name,
        train=everybody.take(train),
        test=everybody.take(test),
        features=feature_names(columns),
    )


def read_breast_cancer(files: Files) -> Dataset[Examples]:
    """569 needle biopsies; 0 is malignant, as in the file's own header."""
    header, *lines = csv.reader(io.StringIO(files["biopsies"].decode("ascii")))
    rows = [dict(zip(BREAST_CANCER, line, strict=False)) for line in lines]
    y = np.asarray([int(line[-1]) for line in lines], np.int64)
    plain = _divided("breast-cancer", BREAST_CANCER, rows, y)
    return Dataset(
        name=plain.name,
        train=plain.train,
        test=plain.test,
        classes=(header[2], header[3]),
        features=plain.features,
    )


def read_diabetes(files: Files) -> Dataset[Examples]:
    """442 patients; the target is the progression of the disease after a year, 25 to 346."""
    lines = gzip.decompress(files["patients"]).decode("ascii").splitlines()
    rows = [
        # 1.0 and 1 both occur for the sex, by release.
        dict(zip(DIABETES, (f"{float(value):g}" for value in line.split()), strict=True))
        for line in lines
    ]
    y = np.loadtxt(gzip.decompress(files["progression"]).decode("ascii").splitlines())
    return _divided("diabetes", DIABETES, rows, y.astype(np.float32))


def arff(text: str) -> list[dict[str, str]]:
    """Rows of an ARFF file as column -> text, quotes removed; "?" is its word for missing.

    Raises:
        DamagedData: There is no ``@data`` line.
    """
    head, marker, body = _DATA_LINE.sub("\0", text, count=1).partition("\0")
    if not marker:
        raise DamagedData("an ARFF file without @data")
    names = re.findall(r"(?im)^@attribute\s+(\S+)", head)
    lines = csv.reader(io.StringIO(body.strip()), quotechar="'")
    return [dict(zip(names, line, strict=True)) for line in lines]


def _survival(event: str, value: str, days: str, rows: Sequence[Row]) -> Array:
    """``(N, 2)`` float32: the event was seen, and after how many days."""
    return np.asarray([(row[event] == value, float(row[days])) for row in rows], np.float32)


def read_gbsg2(files: Files) -> Dataset[Examples]:
    """686 women after surgery for breast cancer; the event is recurrence or death."""
    rows = arff(files["patients"].decode("ascii"))
    return _divided("gbsg2", GBSG2, rows, _survival("cens", "1", "time", rows))


def read_whas500(files: Files) -> Dataset[Examples]:
    """500 patients of the Worcester Heart Attack Study; the event is death."""
    rows = arff(files["patients"].decode("ascii"))
    return _divided("whas500", WHAS500, rows, _survival("fstat", "1", "lenfol", rows))


def read_flchain(files: Files) -> Dataset[Examples]:
    """7,874 people over 50 whose free light chains were assayed; the event is death."""
    rows = arff(files["patients"].decode("ascii"))
    y = _survival("death", "dead", "futime", rows)
    return _divided("flchain", FLCHAIN, rows, y, missing="?")


def _sklearn(member: str, sha256: str) -> PythonFile:
    return PythonFile(
        package="scikit-learn",
        version="1.9.1",
        member=f"sklearn/datasets/data/{member}",
        sha256=sha256,
    )


def _sksurv(member: str, sha256: str) -> PythonFile:
    return PythonFile(
        package="scikit-survival",
        version="0.28.0",
        member=f"sksurv/datasets/data/{member}",
        sha256=sha256,
    )


PROVIDERS = (
    Provider(
        name="breast-cancer",
        title="Breast Cancer Wisconsin (diagnostic): 30 measures of cell nuclei, malignant or not",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        source="Wolberg, Mangasarian, Street 1995, doi 10.24432/C5DW2B; in scikit-learn",
        size="456 + 113 biopsies",
        download_mb=9.3,
        files={
            "biopsies": _sklearn(
                "breast_cancer.csv",
                "fed3eb72d0575ef6192293f5093c6e801b1476b577d0386bf4455504522172ed",
            )
        },
        read=read_breast_cancer,
    ),
    Provider(
        name="diabetes",
        title="Diabetes: progression after one year from ten measures",
        licence="none stated; published with the paper for reuse",
        source="Efron, Hastie, Johnstone, Tibshirani 2004, Least Angle Regression; in scikit-learn",
        size="354 + 88 patients",
        download_mb=9.3,
        files={
            "patients": _sklearn(
                "diabetes_data_raw.csv.gz",
                "7fc0ded571454b1982210d3bb43f0aca44eae01a0b8654a3b24022bdb6b38009",
            ),
            "progression": _sklearn(
                "diabetes_target.csv.gz",
                "8e53f65eb811df43c206f3534bb3af0e5fed213bc37ed6ba36310157d6023803",
            ),
        },
        read=read_diabetes,
    ),
    Provider(
        name="gbsg2",
        title="German Breast Cancer Study Group 2: recurrence-free survival",
        licence="none stated; distributed with GPL-3.0-or-later software",
        source="Schumacher et al. 1994, J. Clin. Oncol. 12; in scikit-survival 0.28.0",
        size="549 + 137 patients",
        download_mb=4.0,
        files={
            "patients": _sksurv(
                "GBSG2.arff", "8c1ba1df4d80216b58695d6bbc9f51284664ab37124e101d56df089851645b04"
            )
        },
        read=read_gbsg2,
    ),
    Provider(
        name="whas500",
        title="Worcester Heart Attack Study: survival after admission",
        licence="none stated; distributed with GPL-3.0-or-later software",
        source="Hosmer, Lemeshow, May 2008, Applied Survival Analysis; in scikit-survival 0.28.0",
        size="400 + 100 patients",
        download_mb=4.0,
        files={
            "patients": _sksurv(
                "whas500.arff", "f64040c91398875137822eca306a927208df6896808cd9764af7065722fa53d6"
            )
        },
        read=read_whas500,
    ),
    Provider(
        name="flchain",
        title="Serum free light chains: survival of 7,874 people over 50",
        licence="none stated; distributed with GPL-3.0-or-later software",
        source="Dispenzieri et al. 2012, Mayo Clin. Proc. 87; in scikit-survival 0.28.0",
        size="6,299 + 1,575 people",
        download_mb=4.0,
        files={
            "patients": _sksurv(
                "flchain.arff", "bf2600ec437dd19071f73bdad82de681780457d1141ec36ed551b0026e6e5773"
            )
        },
        read=read_flchain,
    ),
)
