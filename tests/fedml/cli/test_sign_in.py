# SPDX-License-Identifier: Apache-2.0
"""`fedml login --oidc`: a real broker, a provider of the test's, and a browser."""

import asyncio
import contextlib
import os
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import urllib3

from fedml import session
from fedml.client import Client
from fedml.errors import BrokerRefused, ConfigError
from fedml.sign_in import _Listener, page, sign_in
from fedml_broker.accounts import User
from fedml_broker.audit import SignInRefused
from fedml_broker.handover import Handovers, Terminal, terminal
from fedml_broker.problems import Problem
from tests.fakes.oidc_provider import OidcProvider
from tests.place import Place, command


class Town:
    """A broker that knows a provider, and a person with a browser."""

    def __init__(self, place: Place, provider: OidcProvider) -> None:
        self.place = place
        self.provider = provider
        self.url = place.client.url
        ca = str(place.home / "broker" / "identity" / "ca.pem")
        self.browser = urllib3.PoolManager(ca_certs=ca, retries=False, timeout=20)

    def visit(self, url: str) -> urllib3.BaseHTTPResponse:
        """Sign in at the provider, and follow to where that leads."""
        begun = self.browser.request("GET", url, redirect=False)
        assert begun.status == 302, begun.data
        cookie = begun.headers["Set-Cookie"].partition(";")[0]
        query = self.provider.approve(begun.headers["Location"])
        back = f"{self.url}/v1/oidc/callback?{urlencode(query)}"
        return self.browser.request("GET", back, headers={"Cookie": cookie}, redirect=False)


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    (tmp_path / "place").mkdir()
    secret = tmp_path / "secret"
    secret.write_text(OidcProvider.secret)
    async with OidcProvider() as provider:
        more = (
            f"--oidc-issuer={provider.issuer}",
            "--oidc-client-id=fedml",
            f"--oidc-client-secret-file={secret}",
            "--oidc-grant=staff=member",
        )
        place = await asyncio.to_thread(Place(tmp_path / "place", more=more).__enter__)
        try:
            yield Town(place, provider)
        finally:
            await asyncio.to_thread(place.__exit__)


@contextlib.contextmanager
def _login(town: Town, home: Path, *words: str) -> Any:
    """The command, and the URL that it shows."""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    process = subprocess.Popen(
        command("fedml", "login", "--home", str(home), "--oidc", *words),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stderr is not None
    said = ""
    while not (shown := re.search(r"^  (https://\S+)$", said, re.M)):
        line = process.stderr.readline()
        assert line, said
        said += line
    with process:
        yield process, shown[1]


async def test_a_terminal_gets_its_key_and_no_page_shows_it(town: Town, tmp_path: Path) -> None:
    def person(*words: str) -> None:
        with _login(town, tmp_path / "home", *words) as (process, url):
            went = town.visit(url)
            assert went.status == 302
            back = went.headers["Location"]
            assert back.startswith("http://127.0.0.1:")
            told = {name: value for name, (value,) in parse_qs(urlsplit(back).query).items()}
            assert told.keys() == {"code", "state", "ca"}
            plain = urllib3.PoolManager(retries=False)
            wrong = plain.request("GET", back.replace(told["state"], "x" * 43))
            assert wrong.status == 400
            shown = plain.request("GET", back)
            assert (shown.status, b"Signed in" in shown.data) == (200, True)
            assert b"fedml1u" not in shown.data
            said = process.stderr.read()
            assert process.wait(20) == 0, said
            assert "as lee, member" in said
            # Seen by somebody, the code is of no use: it was used up, and the verifier never left.
            body = {"code": told["code"], "verifier": "v" * 64}
            with pytest.raises(BrokerRefused, match="sign-in is not known"):
                town.place.client.call("POST", "/v1/oidc/key", body)

    town.provider.claims = {"sub": "1", "preferred_username": "lee", "groups": ["staff"]}
    await asyncio.to_thread(person, town.url)
    kept = tmp_path / "home" / "user" / "session.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    lee = Client(session.load(tmp_path / "home"))
    who = await asyncio.to_thread(lee.call, "GET", "/v1/whoami")
    assert (who["name"], who["role"]) == ("lee", "member")
    await asyncio.to_thread(person)  # again, at the broker of the last login


async def test_who_has_no_role_is_told_so_in_the_terminal(town: Town, tmp_path: Path) -> None:
    def person() -> None:
        with _login(town, tmp_path / "home", town.url) as (process, url):
            back = town.visit(url).headers["Location"]
            shown = urllib3.PoolManager(retries=False).request("GET", back)
            assert (shown.status, b"Not signed in" in shown.data) == (400, True)
            said = process.stderr.read()
            assert process.wait(20) == 6
            assert "you have no role here" in said
            assert "try: ask an admin" in said

    await asyncio.to_thread(person)
    assert not (tmp_path / "home").exists()


async def test_without_a_browser_on_this_machine_a_key_is_typed(town: Town, tmp_path: Path) -> None:
    def person() -> None:
        with _login(town, tmp_path / "home", town.url, "--no-browser") as (process, url):
            assert url == page(town.url)
            text = town.visit(url).data.decode()
            key = text.partition("fedml login ")[2].partition("<")[0]
            _, said = process.communicate(f"fedml login {key}\n", 20)
            assert process.returncode == 0, said
            assert key not in said

    town.provider.claims = {"sub": "1", "preferred_username": "lee", "groups": ["staff"]}
    await asyncio.to_thread(person)


def test_an_address_that_is_none_is_refused() -> None:
    for url in ("http://broker:8443", "ftp://x", "https://"):
        with pytest.raises(ConfigError, match="no broker's address"):
            sign_in(url, print)
    assert page("broker:8443") == "https://broker:8443/v1/oidc/start"


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedml.sign_in._MINUTES", 0)
    with _Listener("state") as listener, pytest.raises(BrokerRefused, match="nobody has signed in"):
        listener.told()


# ---------------------------------------------------------------------- codes

LEE = User("lee", "default", "member")
# RFC 7636, appendix B.
VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
WHERE = Terminal(5000, "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM", "s" * 43)


def test_a_code_is_good_once_for_a_minute_and_for_who_knows_the_verifier() -> None:
    now = [0.0]
    handovers = Handovers(lambda: now[0])
    code = handovers.code(LEE, WHERE)
    assert handovers.redeem(code, VERIFIER) == LEE
    spoilt, old = handovers.code(LEE, WHERE), handovers.code(LEE, WHERE)
    with pytest.raises(SignInRefused):
        handovers.redeem(spoilt, VERIFIER + "x")
    now[0] = 61.0
    for over in (code, spoilt, old, "made up"):
        with pytest.raises(SignInRefused, match="not known"):
            handovers.redeem(over, VERIFIER)


@pytest.mark.parametrize(
    "change",
    [{"port": "80"}, {"port": "65536"}, {"port": "1234@evil.example"}, {"challenge": "x"},
     {"challenge": ""}, {"state": "short"}, {"state": "a b" * 10}],
    ids=str,
)  # fmt: skip
def test_a_browser_is_sent_to_this_machine_and_nowhere_else(change: dict[str, str]) -> None:
    query = {"port": "5000", "challenge": WHERE.challenge, "state": WHERE.state}
    assert terminal(query) == WHERE
    assert terminal({}) is None
    assert WHERE.url(code="x").startswith("http://127.0.0.1:5000/?code=x&state=")
    with pytest.raises(Problem, match="not a terminal"):
        terminal({**query, **change})
