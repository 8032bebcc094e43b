# SPDX-License-Identifier: Apache-2.0
"""Signing in with the broker's OpenID Connect provider, by a browser, for this terminal.

The browser comes back to a port that listens on this machine alone, with a code and the hash of the
broker's CA. The code is exchanged for the key over TLS with the CA of that hash: nothing but this
terminal ever has the key (`fedml_broker/handover.py` has the whole of it).
"""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

from fedml import session
from fedml.client import Client
from fedml.errors import BrokerRefused, ConfigError
from fedml.session import Session

_MINUTES = 10
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<body style="font: 16px/1.5 system-ui; max-width: 44rem; margin: 4rem auto; padding: 0 1rem">
<h1>{title}</h1><p>Close this page, and go back to your terminal.</p></body></html>
"""


def page(url: str) -> str:
    """Where a browser, on any machine, gets a key to be typed."""
    return f"{_checked(url)}/v1/oidc/start"


def sign_in(url: str, show: Callable[[str], None]) -> Session:
    """Wait for a person who signs in with a browser on this machine.

    Args:
        url: The broker's.
        show: Opens a URL in his browser, or shows it to him.

    Raises:
        ConfigError: No broker's URL.
        BrokerRefused: He has no place there, or was not there in ten minutes.
        BrokerUnreachable: The broker does not answer.
    """
    url = _checked(url)
    verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe(32)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest())
    with _Listener(state) as listener:
        asked = {
            "port": listener.server_address[1],
            "challenge": challenge.decode().rstrip("="),
            "state": state,
        }
        show(f"{url}/v1/oidc/start?{urlencode(asked)}")
        told = listener.told()
    if "error" in told:
        raise BrokerRefused(told["error"], told.get("hint", ""))
    pinned = session.pinned(url, told.get("ca", ""))
    body = {"code": told.get("code", ""), "verifier": verifier}
    return session.of_key(Client(pinned).call("POST", "/v1/oidc/key", body)["key"])


def _checked(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if parts.scheme != "https" or not parts.hostname:
        raise ConfigError(f"{url!r} is no broker's address", "--oidc https://BROKER:8443")
    return f"https://{parts.netloc}"


class _Listener(HTTPServer):
    """Hears one answer, the one with our state; whatever else knocks is sent away."""

    def __init__(self, state: str) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.state = state
        self.answer: dict[str, str] | None = None

    def told(self) -> dict[str, str]:
        """The query that the browser brought."""
        ends_at = time.monotonic() + 60 * _MINUTES
        while self.answer is None:
            self.timeout = ends_at - time.monotonic()
            if self.timeout <= 0:
                raise BrokerRefused(f"nobody has signed in for {_MINUTES} minutes", "begin again")
            self.handle_request()
        return self.answer


class _Asked(BaseHTTPRequestHandler):
    server: _Listener
    timeout = (
        2.0  # a browser may open a connection that it does not use, and we serve one at a time
    )

    def do_GET(self) -> None:
        query = dict(parse_qsl(urlsplit(self.path).query))
        ours = hmac.compare_digest(query.get("state", "").encode(), self.server.state.encode())
        if ours:
            self.server.answer = query
        good = ours and "error" not in query
        title = "Signed in" if good else "Not signed in"
        body = _PAGE.format(title=title).encode()
        self.send_response(200 if good else 400)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """The terminal is for the person."""
