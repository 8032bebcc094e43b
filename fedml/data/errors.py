# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with data, and what to do next.

DataError
├── UnknownDataset      no data set has this name; the nearest names are in the message
├── DatasetMissing      it is not on this machine; the hint is the command that brings it
├── FetchFailed         bringing it was asked for and did not work
├── DamagedData         the bytes are not the ones that this release was tested with
└── ImpossibleSplit     no partition can satisfy what was asked

`hint` is the next step, or empty where the message has said everything.
"""


class DataError(Exception):
    """Base of this tree."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.hint = hint


class UnknownDataset(DataError, LookupError):
    """The caller asked for a name that no provider has."""


class DatasetMissing(DataError, FileNotFoundError):
    """The data is not on this machine, and fetching was not asked for."""


class FetchFailed(DataError, OSError):
    """The package manager could not bring the file; its own last words are in the message."""


class DamagedData(DataError, ValueError):
    """A file's SHA-256 or its content is not what the provider expects."""


class ImpossibleSplit(DataError, ValueError):
    """The examples at hand cannot be divided as asked."""
