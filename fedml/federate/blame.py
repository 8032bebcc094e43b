# SPDX-License-Identifier: Apache-2.0
"""Whose an error is, and how much of its traceback is his to read.

A user's file may raise anything. What it raises is shown from the first line of his own code on:
the calls of ours that led there tell him nothing.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

import fedml
from fedml.federate.algorithm import (
    BadParameter,
    NobodyLearned,
    UnknownAlgorithm,
    UnsupportedByTraining,
)
from fedml.federate.application import ApplicationError
from fedml.federate.layout import BadUpdate
from fedml.federate.local_sgd import BadData
from fedml.protect.privacy import NotPrivate
from fedml.protect.rules import TooFewClients

_OURS = str(Path(fedml.__file__).parent)
_MOST = 8000


def says_all(error: BaseException) -> bool:
    """Whether its text is enough: code of ours raised it on purpose."""
    from fedml.data.errors import DataError  # of use here only, and its package is large

    return isinstance(
        error,
        ApplicationError
        | BadData
        | BadParameter
        | BadUpdate
        | DataError
        | NobodyLearned
        | NotPrivate
        | TooFewClients
        | UnknownAlgorithm
        | UnsupportedByTraining,
    )


def trace(error: BaseException) -> str:
    """The traceback from the user's code on; all of it where none of his is in it."""
    there = error.__traceback__
    while there is not None and _is_ours(there):
        there = there.tb_next
    if there is None and not isinstance(error, SyntaxError):  # that one says itself where it is
        there = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, there))[-_MOST:]


def in_users_code(error: BaseException) -> bool:
    """Whether a line of the user's is among those that led to it."""
    there = error.__traceback__
    while there is not None and _is_ours(there):
        there = there.tb_next
    return there is not None or isinstance(error, SyntaxError)


def _is_ours(there: TracebackType) -> bool:
    file = there.tb_frame.f_code.co_filename
    return file.startswith((_OURS, "<frozen importlib"))
