# SPDX-License-Identifier: Apache-2.0
"""What the agent says when something cannot go on, and with which exit code.

AgentError                1   something else
├── NotLoggedIn           3   no identity in this home: `fedml-agent login KEY` first
├── KeyRefused            4   the login key is wrong, used up, expired, or of another broker
├── BrokerUnreachable     5   nobody answers there, or the network says no
├── BrokerRefused         6   the broker answered no; its own words are in the text
├── AlreadyRunning        7   another agent works on this home
└── HomeUnusable          8   the disk is full, or the files cannot be read
"""


class AgentError(Exception):
    """Base of everything the agent raises on purpose.

    Attributes:
        hint: The next step, where there is one.
    """

    exit_code = 1

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class NotLoggedIn(AgentError):
    """There is no identity in this home."""

    exit_code = 3


class KeyRefused(AgentError):
    """The login key cannot be used."""

    exit_code = 4


class BrokerUnreachable(AgentError):
    """The broker does not answer."""

    exit_code = 5


class BrokerRefused(AgentError):
    """The broker answered no.

    Attributes:
        status: The HTTP status.
    """

    exit_code = 6

    def __init__(self, status: int, text: str, hint: str = "") -> None:
        super().__init__(text, hint)
        self.status = status

    @property
    def is_final(self) -> bool:
        """Whether the same again, later, would be refused too: a full disk passes."""
        return self.status not in (408, 429, 502, 503, 504, 507)


class AlreadyRunning(AgentError):
    """Another agent holds this home's lock."""

    exit_code = 7


class HomeUnusable(AgentError):
    """The home's disk or files cannot be used."""

    exit_code = 8
