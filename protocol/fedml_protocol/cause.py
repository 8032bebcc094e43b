# SPDX-License-Identifier: Apache-2.0
"""Why something ended badly, and whose fault it was."""

from dataclasses import dataclass
from enum import IntEnum


class Fault(IntEnum):
    """Whose fault a bad end was."""

    TASK = 1
    MACHINE = 2
    POLICY = 3
    BROKER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why something ended badly, in words for a person.

    Attributes:
        hint: The next step, where there is one.
        traceback: The task's own, when its code raised.
    """

    fault: Fault
    message: str
    hint: str = ""
    traceback: str = ""
