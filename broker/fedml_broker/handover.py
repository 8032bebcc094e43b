# SPDX-License-Identifier: Apache-2.0
"""A person who signed in with a browser gets his key into the terminal where he began.

    terminal ── listens on 127.0.0.1:PORT; opens the browser at /v1/oidc/start?port&challenge&state
    browser  ── provider … callback ──► http://127.0.0.1:PORT/?code&state&ca   (RFC 8252, 7.3)
    terminal ── POST /v1/oidc/key {code, verifier}, to the CA of that hash ──► the key

The key is never in a browser, its history or a page. The code is good once, for a minute, and only
for who knows the verifier of the challenge (RFC 7636, S256): another program that sees the code go
by has no use for it. The terminal believes the hash as it believes a page with a key: it came
through the browser, beside the state that nobody else knows.
"""

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from fedml_broker.accounts import User
from fedml_broker.audit import SignInRefused
from fedml_broker.problems import Problem

_CODE_S = 60.0
_MAX_CODES = 10_000
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_STATE = re.compile(r"[A-Za-z0-9_-]{16,128}")
_PORT = re.compile(r"[1-9][0-9]{3,4}")


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where somebody has begun to sign in: always this very machine of his."""

    port: int
    challenge: str
    state: str

    def url(self, **query: str) -> str:
        """Where the browser goes to tell it something."""
        return f"http://127.0.0.1:{self.port}/?" + urlencode({**query, "state": self.state})


def terminal(query: Mapping[str, str]) -> Terminal | None:
    """The terminal in the query of a start; None: a person without one.

    Raises:
        Problem: 422.
    """
    if "port" not in query:
        return None
    port, challenge, state = (query.get(name, "") for name in ("port", "challenge", "state"))
    good = _PORT.fullmatch(port) and _CHALLENGE.fullmatch(challenge) and _STATE.fullmatch(state)
    if not good or int(port) > 65535:
        raise Problem(422, "not a terminal", "port, challenge and state are those of `fedml login`")
    return Terminal(int(port), challenge, state)


class Handovers:
    """Codes that are out; in memory: a restart asks to begin again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._codes: dict[bytes, tuple[User, str, float]] = {}

    def code(self, user: User, where: Terminal) -> str:
        """For the terminal of somebody who has signed in."""
        now = self._clock()
        if len(self._codes) >= _MAX_CODES:
            self._codes = {c: given for c, given in self._codes.items() if given[2] > now}
        if len(self._codes) >= _MAX_CODES:
            raise Problem(503, "too many sign-ins at once", "try again in some minutes")
        code = secrets.token_urlsafe(32)
        self._codes[_sha256(code)] = (user, where.challenge, now + _CODE_S)
        return code

    def redeem(self, code: str, verifier: str) -> User:
        """Who has signed in; the code is used up, also by a wrong verifier.

        Raises:
            SignInRefused: 401.
        """
        found = self._codes.pop(_sha256(code), None)
        if found is not None and found[2] >= self._clock():
            challenge = base64.urlsafe_b64encode(_sha256(verifier)).decode().rstrip("=")
            if hmac.compare_digest(challenge, found[1]):
                return found[0]
        raise SignInRefused(
            401,
            "this sign-in is not known",
            "its code is over, was used already, or is another terminal's",
            "begin again: `fedml login --oidc`",
        )


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
