# SPDX-License-Identifier: Apache-2.0
"""Smartwatch recordings of shoulder exercises: ten subjects, who are its natural clients.

Burns et al. 2018, arXiv 1802.01489: seven exercises, both arms, accelerometer and gyroscope at 50
Hz. Of each subject's fourteen recordings, four are the test part (`by_digest` within the
subject).
"""

import io
import pickle
from typing import Any

import numpy as np

from fedml.data.dataset import Dataset, Series, by_digest
from fedml.data.errors import DamagedData
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

RATE_HZ = 50.0
TEST_SHARE = 2 / 7

# Every name that the recording's pickle refers to. Nothing else is ever looked up or called.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"): ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"): ("numpy", "ndarray"),
    ("numpy", "dtype"): ("numpy", "dtype"),
    ("_codecs", "encode"): ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """NumPy wrote this file as a pickle; only the names that arrays need are let through."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DamagedData(f"the recording asks for {module}.{name}, which no array needs")
        return super().find_class(*_ALLOWED[module, name])


def unpickle_arrays(content: bytes) -> Any:
    """Read an object ``.npy`` file that holds nothing but containers, numbers, text and arrays.

    Raises:
        DamagedData: It refers to anything else.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise DamagedData(f"not an .npy file of version 1.0 but {version}")
    np.lib.format.read_array_header_1_0(stream)
    return _ArraysOnly(stream).load().item()


def read(files: Files) -> Dataset[Series]:
    """Parse ``watch_dataset.npy``."""
    content = unpickle_arrays(files["recordings"])
    subject = np.asarray(content["subject"], np.int64) - 1
    exercise = np.asarray(content["y"], np.int64)
    everything = Series(
        x=tuple(np.asarray(recording, np.float32) for recording in content["X"]),
        y=exercise,
        rate_hz=RATE_HZ,
        client=subject,
    )
    keys = [str(row) for row in range(len(exercise))]
    train, test = by_digest(keys, subject.tolist(), TEST_SHARE)
    return Dataset(
        name="watch",
        train=everything.take(train),
        test=everything.take(test),
        classes=tuple(content["y_labels"]),
        features=tuple(content["X_labels"]),
        clients=tuple(f"subject {number}" for number in range(1, 11)),
    )


PROVIDERS = (
    Provider(
        name="watch",
        title="Smartwatch recordings of seven shoulder exercises by ten subjects",
        licence="BSD 3-Clause (seglearn, which published the recordings)",
        source="Burns et al. 2018, arXiv 1802.01489; in seglearn 1.2.5",
        size="100 + 40 recordings",
        download_mb=11.3,
        files={
            "recordings": PythonFile(
                package="seglearn",
                version="1.2.5",
                member="seglearn/data/watch_dataset.npy",
                sha256="eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537",
            )
        },
        read=read,
    ),
)
