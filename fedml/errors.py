# SPDX-License-Identifier: Apache-2.0
"""Everything `fedml` raises on purpose.

FedMLError            1
├── ConfigError       2   the job or run file is wrong; the person can fix it
├── NotLoggedIn       3   no token in this home
├── BrokerUnreachable 5   nobody answers there
├── BrokerRefused     6   the broker answered no; its own words are in the text
├── RunFailed         7   the run itself ended badly
└── DataUnavailable   8   a data set is unknown, not here, damaged, or cannot be fetched

Each class carries its exit code and, where there is one, the next step.
"""


class FedMLError(Exception):
    """Base of everything the library raises on purpose.

    Attributes:
        hint: The next step, where there is one.
    """

    exit_code = 1

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint
        if hint:  # for a script that does not catch it; the commands print it themselves
            self.add_note(f"try: {hint}")


class ConfigError(FedMLError):
    """A file of the user's is wrong; the text names the file, the line and the key."""

    exit_code = 2


class NotLoggedIn(FedMLError):
    """No token is stored in this home."""

    exit_code = 3


class BrokerUnreachable(FedMLError):
    """The broker does not answer."""

    exit_code = 5


class BrokerRefused(FedMLError):
    """The broker answered no."""

    exit_code = 6


class RunFailed(FedMLError):
    """The run ended badly; the text is its cause."""

    exit_code = 7


class DataUnavailable(FedMLError):
    """A data set cannot be had; the text says why."""

    exit_code = 8
