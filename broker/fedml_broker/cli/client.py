# SPDX-License-Identifier: Apache-2.0
"""The admin's connection to the running broker of this home, and options of many commands."""

import json
import os
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import urllib3
from urllib3.exceptions import HTTPError

from fedml_protocol.errors import BadKey
from fedml_protocol.keys import Scope, parse_login_key

_UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}

F = TypeVar("F", bound=Callable[..., Any])


class CommandFailed(Exception):
    """The command cannot be done; the text is for the person who typed it."""

    def __init__(self, text: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(text)
        self.hint = hint
        self.exit_code = exit_code


def find_home(given: str | None) -> Path:
    """`--home`, or FEDML_HOME, or ~/.fedml; the broker's part of it."""
    root = Path(given or os.environ.get("FEDML_HOME") or "~/.fedml").expanduser().absolute()
    return root / "broker"


def home_option(function: F) -> F:
    """`--home DIR`, handed over as the broker's directory."""
    return click.option(
        "--home",
        metavar="DIR",
        envvar="FEDML_HOME",
        callback=lambda _, __, value: find_home(value),
        help="Where the broker keeps its state (FEDML_HOME; ~/.fedml).",
    )(function)


def json_option(function: F) -> F:
    """`--json`, handed over as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(
        function
    )


class Client:
    """Asks the broker as the admin whose token lies in its home."""

    def __init__(self, home: Path) -> None:
        self._file = token = home / "admin.key"
        try:
            key = parse_login_key(token.read_text(), Scope.USER)
        except FileNotFoundError as error:
            raise CommandFailed(
                f"there is no broker in {home}", "`fedml-broker up`, or name its --home", 5
            ) from error
        except (OSError, BadKey) as error:
            raise CommandFailed(f"cannot read {token}: {error}") from error
        context = ssl.create_default_context(cafile=str(home / "identity" / "ca.pem"))
        self._url = key.url
        self._pool = urllib3.PoolManager(ssl_context=context, retries=False, timeout=30)
        self._headers = {"Authorization": f"Bearer {key.secret.hex()}"}

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One question and its answer.

        Raises:
            CommandFailed: No answer, or an error for an answer.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            response = self._pool.request(
                method, self._url + path, body=data, headers=self._headers
            )
        except (HTTPError, OSError) as error:
            raise CommandFailed(
                f"the broker does not answer at {self._url}", "is `fedml-broker up` running?", 5
            ) from error
        found = json.loads(response.data)
        if response.status >= 400:
            text = found["title"] + (f": {found['detail']}" if found.get("detail") else "")
            hint = found.get("hint", "")
            if response.status == 401:
                text = f"the token in {self._file} is good no more"
                hint = "start the broker again: it then makes another"
            raise CommandFailed(text, hint, 6)
        return found


def parse_labels(given: Sequence[str]) -> dict[str, str]:
    """`--label NAME=VALUE`, repeated."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--label")
        found[name] = value
    return found


def parse_age(text: str, option: str) -> float:
    """Seconds in ``30d``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text.strip())
    if match is None:
        raise CommandFailed(f"{option} takes 12h, 30d or 8w, not {text!r}", exit_code=2)
    return float(match[1]) * _UNITS[match[2]]
