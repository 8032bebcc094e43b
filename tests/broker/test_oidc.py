# SPDX-License-Identifier: Apache-2.0
"""Signing in with a provider: who comes in, as whom, and everything that must not get through."""

import asyncio
import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from joserfc.jwk import RSAKey

from fedml import session
from fedml.client import Client
from fedml_broker import audit
from fedml_broker.accounts import Accounts, User
from fedml_broker.audit import SignInRefused
from fedml_broker.oidc import Grant, Provider, SignIns, parse_grants
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import sign_ins, users
from fedml_protocol.keys import Scope, parse_login_key
from tests.fakes.oidc_provider import OidcProvider
from tests.place import Place

URL = "https://broker.example:8443"
EVERYBODY = (Grant(group="*", role="viewer"),)


@pytest.fixture
async def provider() -> AsyncIterator[OidcProvider]:
    async with OidcProvider() as provider:
        yield provider


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    yield store
    await asyncio.to_thread(store.close)


class Clock:
    """Moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Door:
    """The sign-ins of a broker, and a browser in front of them."""

    def __init__(self, provider: OidcProvider, store: Store, **changes: Any) -> None:
        settings = Provider(
            issuer=provider.issuer,
            client_id=provider.client_id,
            secret=provider.secret,
            **{"grants": EVERYBODY, **changes},
        )
        self.clock = Clock()
        self.provider = provider
        self.accounts = Accounts(store, url=URL, ca_sha256=b"c" * 32)
        self.sign_ins = SignIns(settings, store, self.accounts, url=URL, clock=self.clock)

    async def come(self, **claims: Any) -> User:
        """Somebody signs in; the user whose key he gets."""
        self.provider.claims = {"sub": "1", "preferred_username": "lee", **claims}
        where, browser = await self.sign_ins.start()
        user = await self.sign_ins.finish(self.provider.approve(where), browser)
        key = await self.sign_ins.key(user)
        known = self.accounts.authenticate(parse_login_key(key, Scope.USER).secret)
        assert known == user
        return user


@pytest.fixture
def door(provider: OidcProvider, store: Store) -> Door:
    return Door(provider, store)


async def test_a_person_is_made_a_user_once_and_is_the_same_from_then_on(
    door: Door, store: Store
) -> None:
    assert await door.come() == User("lee", "default", "viewer")
    # Names change at a provider; subjects do not.
    assert await door.come(preferred_username="lee-smith") == User("lee", "default", "viewer")
    assert len(await store.read(lambda tx: tx.execute(sa.select(sign_ins)).all())) == 1
    found = await store.read(lambda tx: audit.entries(tx, tenant="default"))
    actions = [entry["action"] for entry in found]
    assert actions.count("user.create") == 1
    assert actions.count("user.sign-in") == 2


async def test_groups_give_the_role_and_the_tenant_and_take_them_back(
    provider: OidcProvider, store: Store
) -> None:
    grants = parse_grants(["staff=viewer@acme", "ml=member@acme", "root=admin"])
    door = Door(provider, store, grants=grants)
    assert await door.come(groups=["ml", "staff"]) == User("lee", "acme", "member")
    assert await door.come(groups="staff") == User("lee", "acme", "viewer")
    for groups in (["root"], [], None, {"staff": 1}):  # of another tenant is of no use here
        with pytest.raises(SignInRefused, match="no role here"):
            await door.come(groups=groups)


async def test_a_name_that_is_taken_is_not_given_away(door: Door, store: Store) -> None:
    await door.accounts.create_user("admin", "admin", by="cli")
    await door.come()
    for name, subject in (("admin", "1-not"), ("lee", "2"), ("Lee@elsewhere.example", "3")):
        with pytest.raises(SignInRefused, match="another user's"):
            await door.come(preferred_username=name, sub=subject)
    assert len(await store.read(lambda tx: tx.execute(sa.select(users)).all())) == 2


async def test_where_only_known_users_may_come_others_are_refused_and_the_name_counts_once(
    provider: OidcProvider, store: Store
) -> None:
    door = Door(provider, store, known_only=True, grants=())
    with pytest.raises(SignInRefused, match="not a user here"):
        await door.come()
    await door.accounts.create_user("lee", "member", by="cli")
    assert await door.come() == User("lee", "default", "member")
    with pytest.raises(SignInRefused, match="another user's"):
        await door.come(sub="2")


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another-client"},
        {"aud": ["fedml", "another-client"]},  # without azp
        {"aud": ["fedml", "another-client"], "azp": "another-client"},
        {"azp": "another-client"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"exp": int(time.time()) - 3600},
        {"exp": None},
        {"iat": int(time.time()) + 3600},
        {"nbf": int(time.time()) + 3600},
        {"sub": None},
        {"sub": ""},
        {"sub": ["1"]},
        {"preferred_username": None},
        {"preferred_username": "§§§"},
    ],
    ids=str,
)
async def test_an_id_token_that_is_not_for_this_sign_in_is_refused(
    door: Door, store: Store, change: dict[str, Any]
) -> None:
    door.provider.change = change
    with pytest.raises(SignInRefused) as refused:
        await door.come()
    assert refused.value.status == 401
    assert await store.read(lambda tx: tx.execute(sa.select(users)).all()) == []


async def test_a_clock_that_is_a_little_off_refuses_nobody(door: Door) -> None:
    now = int(time.time())
    door.provider.change = {"exp": now - 30, "iat": now + 30}
    assert (await door.come()).name == "lee"


def _by_hand(algorithm: str, claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """A token such as a library would refuse to make."""

    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    header = {"alg": algorithm, "kid": "k1"}
    data = b".".join(part(json.dumps(value).encode()) for value in (header, claims))
    return (data + b"." + part(sign(data))).decode()


@pytest.mark.parametrize("how", ["none", "symmetric", "foreign", "foreign kid"])
async def test_a_token_that_the_provider_has_not_signed_is_refused(
    door: Door, store: Store, how: str
) -> None:
    provider = door.provider
    match how:
        case "none":
            provider.sign = lambda claims: _by_hand("none", claims, lambda data: b"")
        case "symmetric":  # signed with what everybody knows, the public key
            public = provider.key.as_pem(private=False)
            provider.sign = lambda claims: _by_hand(
                "HS256", claims, lambda data: hmac.digest(public, data, "sha256")
            )
        case "foreign":
            provider.sign = provider.sign_as(RSAKey.generate_key(2048, {"kid": "k1"}))
        case "foreign kid":
            provider.sign = provider.sign_as(RSAKey.generate_key(2048, {"kid": "k2"}))
    with pytest.raises(SignInRefused) as refused:
        await door.come()
    assert refused.value.status == 401
    assert await store.read(lambda tx: tx.execute(sa.select(users)).all()) == []


async def test_keys_are_asked_for_once_and_again_when_a_new_one_appears(door: Door) -> None:
    await door.come()
    await door.come()
    assert door.provider.keys_asked == 1
    door.provider.key = RSAKey.generate_key(2048, {"kid": "k2"})
    door.provider.sign = door.provider.sign_as(door.provider.key)
    with pytest.raises(SignInRefused):  # not at every token with a made-up key
        await door.come()
    assert door.provider.keys_asked == 1
    door.clock.now += 60
    assert (await door.come()).name == "lee"
    assert door.provider.keys_asked == 2


async def test_a_sign_in_is_good_once_in_the_browser_that_began_it_and_for_a_while(
    door: Door,
) -> None:
    where, browser = await door.sign_ins.start()
    query = door.provider.approve(where)
    await door.sign_ins.finish(query, browser)
    with pytest.raises(SignInRefused, match="is not known"):
        await door.sign_ins.finish(query, browser)  # replayed

    where, _ = await door.sign_ins.start()
    with pytest.raises(SignInRefused, match="begun elsewhere"):
        await door.sign_ins.finish(door.provider.approve(where), browser)

    where, browser = await door.sign_ins.start()
    door.clock.now += 3600
    with pytest.raises(SignInRefused, match="is not known"):
        await door.sign_ins.finish(door.provider.approve(where), browser)

    where, browser = await door.sign_ins.start()
    query = {**door.provider.approve(where), "iss": "https://evil.example"}
    with pytest.raises(SignInRefused, match="another provider"):
        await door.sign_ins.finish(query, browser)

    where, browser = await door.sign_ins.start()
    state = door.provider.approve(where)["state"]
    with pytest.raises(SignInRefused, match="the person said no"):
        await door.sign_ins.finish(
            {"state": state, "error": "access_denied", "error_description": "the person said no"},
            browser,
        )


async def test_a_wrong_secret_and_a_provider_that_is_away_are_told_apart(
    provider: OidcProvider, store: Store
) -> None:
    door = Door(provider, store)
    door.sign_ins.provider = replace(door.sign_ins.provider, secret="wrong")
    with pytest.raises(SignInRefused, match="invalid_grant"):
        await door.come()
    away = Door(provider, store)
    away.sign_ins.provider = replace(away.sign_ins.provider, issuer="http://127.0.0.1:9")
    with pytest.raises(Problem, match="cannot be used") as problem:
        await away.sign_ins.start()
    assert problem.value.status == 502


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"issuer": "http://id.example.org"}, "https://"),
        ({"client_id": ""}, "client id"),
        ({"grants": ()}, "nobody is granted"),
        ({"grants": (Grant(group="a", role="king"),)}, "'king' is none of"),
        ({"grants": (Grant(group="a", role="viewer", tenant="A/B"),)}, "tenant must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    good = {"issuer": "https://id.example.org", "client_id": "fedml", "grants": EVERYBODY}
    Provider(**good)
    with pytest.raises(ValueError, match=said):
        Provider(**{**good, **changes})
    with pytest.raises(ValueError, match="is not GROUP=ROLE"):
        parse_grants(["staff"])


async def test_a_browser_signs_in_at_a_real_broker_and_the_key_works(
    provider: OidcProvider, tmp_path: Path
) -> None:
    file = tmp_path / "secret.txt"
    file.write_text(provider.secret + "\n")
    more = [f"--oidc-issuer={provider.issuer}", "--oidc-client-id=fedml"]
    more += [f"--oidc-client-secret-file={file}", "--oidc-grant=*=member"]
    place = Place(tmp_path, more=more)
    await asyncio.to_thread(place.__enter__)
    try:
        url = place.client.url
        context = session.load(tmp_path / "me").context()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as browser:
            start = await browser.get(url + "/v1/oidc/start", allow_redirects=False)
            assert start.status == 302
            query = provider.approve(start.headers["Location"])
            done = await browser.get(url + "/v1/oidc/callback", params=query)
            page = await done.text()
            assert done.status == 200, page
            assert "Signed in as lee" in page
            key = page.partition("fedml login ")[2].partition("<")[0]
            again = await browser.get(url + "/v1/oidc/callback", params=query)
            assert again.status == 400
            # The dashboard wants no key, but to be signed in.
            async with browser.get(url + "/v1/oidc") as told:
                assert (await told.json())["provider"] == provider.issuer.partition("//")[2]
            start = await browser.get(url + "/v1/oidc/start?to=dashboard", allow_redirects=False)
            query = provider.approve(start.headers["Location"])
            done = await browser.get(url + "/v1/oidc/callback", params=query, allow_redirects=False)
            assert (done.status, done.headers["Location"]) == (302, "/")
            cookie = done.cookies["__Host-fedml"]
            assert (cookie["secure"], cookie["httponly"], cookie["samesite"]) == (
                True,
                True,
                "Strict",
            )
            assert int(cookie["max-age"]) == 12 * 3600
            async with browser.get(url + "/v1/session") as mine:
                assert (await mine.json())["name"] == "lee"
        lee = await asyncio.to_thread(session.login, tmp_path / "lee", key)
        who = await asyncio.to_thread(Client(lee).call, "GET", "/v1/whoami")
        assert who.pop("expires_at") == pytest.approx(time.time() + 12 * 3600, abs=60)
        assert who == {"name": "lee", "tenant": "default", "role": "member"}
    finally:
        await asyncio.to_thread(place.__exit__)
