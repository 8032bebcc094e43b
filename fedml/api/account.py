# SPDX-License-Identifier: Apache-2.0
"""Who you are to which broker."""

import functools
from pathlib import Path

from fedml import session
from fedml.client import Client
from fedml.errors import FedMLError
from fedml.session import Session

Home = Path | str | None


def connect(api_key: str | None = None, *, home: Home = None) -> Client:
    """The broker of a user's key, or that which this home is logged in at.

    Inside a job that has no login, the broker of its run, which answers for that run alone.
    """
    return Client(_of_key(api_key) if api_key else session.load(home_of(home)))


def home_of(home: Home) -> Path:
    """The directory of a login."""
    return session.find_home(None if home is None else str(home))


def login(api_key: str, *, home: Home = None) -> str:
    """Keep a user's key (from `fedml-broker users token NAME`); the broker's address.

    Raises:
        BrokerRefused: It is not good any more, or another broker's; nothing is kept.
    """
    found = session.of_key(api_key)
    Client(found).call("GET", "/v1/whoami")
    session.keep(home_of(home), found)
    return found.url


def logout(*, home: Home = None) -> None:
    """Forget the login."""
    session.logout(home_of(home))


def whoami(*, home: Home = None) -> dict[str, str]:
    """Who you are to the broker: name, tenant, role."""
    found: dict[str, str] = connect(home=home).call("GET", "/v1/whoami")
    return found


def fedml_login(api_key: str | None = None, *, home: Home = None) -> tuple[int, str]:
    """Keep a user's key, once the broker knows whose it is; without one, see whether one is kept.

    Returns:
        ``(0, who you are)``, or ``(-1, why not)``.
    """
    try:
        found = session.of_key(api_key) if api_key else session.load(home_of(home))
        me = Client(found).call("GET", "/v1/whoami")
        if api_key:
            session.keep(home_of(home), found)
    except FedMLError as error:
        return -1, f"{error}; try: {error.hint}" if error.hint else str(error)
    return 0, f"{me['name']} at {found.url}"


@functools.cache
def _of_key(api_key: str) -> Session:
    return session.of_key(api_key)
