# SPDX-License-Identifier: Apache-2.0
"""Users, tokens and login keys in a real store: who comes in, how often, how long."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fedml_broker.accounts import (
    ROLES,
    Accounts,
    Enrolment,
    User,
    check_labels,
    forget_run_key,
    use_key,
)
from fedml_broker.audit import CLI, SignInRefused
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT, login_keys, tokens
from fedml_protocol.errors import BadKey
from fedml_protocol.keys import Scope, parse_login_key

URL = "https://broker.example:8443"
CA = hashlib.sha256(b"a CA").digest()
ANN = User("ann", "default", "admin")
# So short a life is over before anybody can use it.
_AN_INSTANT_DAYS = 1e-9


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    yield store
    await asyncio.to_thread(store.close)


@pytest.fixture
def accounts(store: Store) -> Accounts:
    return Accounts(store, url=URL, ca_sha256=CA)


def secret_of(key: str, scope: Scope = Scope.DEVICE) -> bytes:
    return parse_login_key(key, scope).secret


async def use(store: Store, key: str, *, again: bool = False) -> Enrolment:
    secret = secret_of(key)
    return await store.write(lambda tx: use_key(tx, secret, again=again))


# ---------------------------------------------------------------------- users


async def test_a_token_names_the_broker_and_its_user(accounts: Accounts) -> None:
    await accounts.create_user("ann", "admin", by=CLI)
    token = await accounts.create_token("ann", by=CLI)
    key = parse_login_key(token, Scope.USER)
    assert (key.url, key.ca_sha256) == (URL, CA)
    assert accounts.authenticate(key.secret) == ANN
    assert accounts.authenticate(b"x" * 24) is None
    with pytest.raises(BadKey):
        parse_login_key(token, Scope.DEVICE)  # no machine joins with it


async def test_a_token_ends_and_its_siblings_do_not(accounts: Accounts) -> None:
    await accounts.create_user("ann", "member", tenant="acme", by=CLI)
    short = await accounts.create_token("ann", days=_AN_INSTANT_DAYS, by=CLI)
    long = await accounts.create_token("ann", days=1, by=CLI)
    with pytest.raises(SignInRefused, match="has expired: it was ann's and good until 20"):
        accounts.authenticate(secret_of(short, Scope.USER))
    found = accounts.authenticate(secret_of(long, Scope.USER))
    assert found == User("ann", "acme", "member")
    users = await accounts.list_users("acme")
    assert [(u["name"], u["tokens"]) for u in users] == [("ann", 2)]
    assert await accounts.list_users("default") == []


async def test_no_secret_is_stored_nor_listed(accounts: Accounts, store: Store) -> None:
    await accounts.create_user("ann", "admin", by=CLI)
    secrets = [secret_of(await accounts.create_token("ann", by=CLI), Scope.USER)]
    _, key = await accounts.create_key(ANN, uses=1, days=1, labels={})
    secrets.append(secret_of(key))
    everything = await store.read(
        lambda tx: repr([tx.execute(sa.select(t)).all() for t in (tokens, login_keys)])
    )
    for secret in secrets:
        assert secret.hex() not in everything
        assert repr(secret) not in everything
        assert hashlib.sha256(secret).hexdigest() in everything
    assert "secret_sha256" not in (await accounts.list_keys("default"))[0]


@pytest.mark.parametrize(
    ("name", "role", "status"),
    [("Ann Smith", "admin", 422), ("", "admin", 422), ("ann", "root", 422), ("bob", "admin", 409)],
)
async def test_users_that_cannot_be(accounts: Accounts, name: str, role: str, status: int) -> None:
    await accounts.create_user("bob", "member", by=CLI)
    with pytest.raises(Problem) as told:
        await accounts.create_user(name, role, by=CLI)
    assert told.value.status == status
    assert [u["name"] for u in await accounts.list_users("default")] == ["bob"]


async def test_a_tenant_keeps_an_admin(accounts: Accounts) -> None:
    await accounts.create_user("ann", "admin", tenant="acme", by=CLI)
    await accounts.create_user("bob", "viewer", tenant="acme", by=CLI)
    await accounts.create_user("eve", "admin", by=CLI)  # of another tenant: she does not count
    with pytest.raises(Problem, match="needs an admin") as told:
        await accounts.set_role("ann", "member", by=CLI)
    assert told.value.status == 409
    await accounts.set_role("ann", "admin", by=CLI)
    await accounts.set_role("bob", "admin", by=CLI)
    await accounts.set_role("ann", "member", by=CLI)
    assert await accounts.admins("acme") == ["bob"]


@pytest.mark.parametrize(
    ("name", "of", "role", "status"),
    [
        ("nobody", None, "admin", 404),
        ("ann", "evil", "admin", 404),
        ("ann", None, "root", 422),
    ],
)
async def test_roles_that_cannot_be_given(
    accounts: Accounts, name: str, of: str | None, role: str, status: int
) -> None:
    await accounts.create_user("ann", "viewer", tenant="acme", by=CLI)
    with pytest.raises(Problem) as told:
        await accounts.set_role(name, role, by=CLI, of=of)
    assert told.value.status == status
    assert await accounts.admins("acme") == []


async def test_nobody_gets_a_token_who_is_not_there(accounts: Accounts) -> None:
    with pytest.raises(Problem) as told:
        await accounts.create_token("ann", by=CLI)
    assert told.value.status == 404
    assert "users create" in told.value.hint


async def test_a_key_fits_only_the_broker_as_it_is_now(accounts: Accounts, store: Store) -> None:
    await accounts.create_user("ann", "admin", by=CLI)
    token = await accounts.create_token("ann", by=CLI)
    assert await accounts.still_fits(token)
    assert not await accounts.still_fits(token[:-1])
    _, machines = await accounts.create_key(ANN, uses=1, days=1, labels={})
    assert not await accounts.still_fits(machines)
    assert not await Accounts(store, url=URL + "4", ca_sha256=CA).still_fits(token)
    assert not await Accounts(store, url=URL, ca_sha256=bytes(32)).still_fits(token)
    await accounts.revoke_tokens("ann", by="cli")
    assert not await accounts.still_fits(token)


async def test_the_key_of_a_run_is_nobodys_unless_jobs_are_asked_for(
    accounts: Accounts, store: Store
) -> None:
    await accounts.create_user("ann", "admin", by=CLI)
    ann = User("ann", DEFAULT_TENANT, "admin")
    key, keep = accounts.run_key(ann, "r-12345678")
    secret = secret_of(key, Scope.RUN)
    assert accounts.authenticate(secret, jobs=True) is None
    await store.write(keep)
    assert accounts.authenticate(secret) is None
    job = accounts.authenticate(secret, jobs=True)
    assert job == User("ann", DEFAULT_TENANT, "run", "r-12345678")
    assert not any(job.may(role) for role in ROLES)
    await store.write(lambda tx: forget_run_key(tx, "r-12345678"))
    assert accounts.authenticate(secret, jobs=True) is None


# ---------------------------------------------------------------------- login keys


async def test_a_key_grants_its_tenant_and_labels_as_often_as_it_says(
    accounts: Accounts, store: Store
) -> None:
    name, key = await accounts.create_key(
        User("ann", "acme", "admin"), uses=2, days=1, labels={"site": "lab"}
    )
    for _ in range(2):
        assert await use(store, key) == Enrolment("acme", {"site": "lab"}, name)
    with pytest.raises(Problem) as told:
        await use(store, key)
    assert told.value.status == 403
    assert "good for 2" in told.value.detail
    assert "keys create" in told.value.hint
    # A machine that joined with it before, and asks again, is no further use.
    assert await use(store, key, again=True) == Enrolment("acme", {"site": "lab"}, name)
    assert (await accounts.list_keys("acme"))[0]["used"] == 2


async def test_many_machines_at_once_do_not_overdraw_a_key(
    accounts: Accounts, store: Store
) -> None:
    _, key = await accounts.create_key(ANN, uses=3, days=1, labels={})
    asked = await asyncio.gather(*(use(store, key) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(answer, Enrolment) for answer in asked) == 3
    assert (await accounts.list_keys("default"))[0]["used"] == 3


async def test_a_key_without_limits_has_none(accounts: Accounts, store: Store) -> None:
    _, key = await accounts.create_key(ANN, uses=None, days=None, labels={})
    for _ in range(50):
        await use(store, key)


async def test_a_key_that_is_over_or_revoked_or_of_nobody_lets_nobody_in(
    accounts: Accounts, store: Store
) -> None:
    _, over = await accounts.create_key(ANN, uses=9, days=_AN_INSTANT_DAYS, labels={})
    name, revoked = await accounts.create_key(ANN, uses=9, days=1, labels={})
    await accounts.revoke_key("default", name, by="ann")
    for key, words in ((over, "has expired"), (revoked, "was revoked")):
        for again in (False, True):
            with pytest.raises(Problem, match=words) as told:
                await use(store, key, again=again)
            assert told.value.status == 403
    with pytest.raises(Problem) as told:
        await store.write(lambda tx: use_key(tx, b"guess", again=False))
    assert told.value.status == 401


async def test_keys_are_the_tenants_own_business(accounts: Accounts, store: Store) -> None:
    name, key = await accounts.create_key(ANN, uses=1, days=1, labels={})
    with pytest.raises(Problem) as told:
        await accounts.revoke_key("acme", name, by="ann")
    assert told.value.status == 404
    assert await accounts.list_keys("acme") == []
    await use(store, key)


@pytest.mark.parametrize(
    "wrong",
    [
        {"uses": 0},
        {"uses": -1},
        {"days": 0},
        {"days": -1},
        {"days": float("nan")},
        {"labels": {"Site": "lab"}},
        {"labels": {"site": "two words"}},
        {"labels": {"site": ""}},
        {"labels": {"site": "x" * 81}},
        {"labels": {"site": "\x1b[31m"}},
    ],
)
async def test_keys_that_cannot_be(accounts: Accounts, wrong: dict[str, Any]) -> None:
    with pytest.raises(Problem) as told:
        await accounts.create_key(ANN, **{"uses": 1, "days": 1, "labels": {}, **wrong})
    assert told.value.status == 422
    assert await accounts.list_keys("default") == []


def test_labels_may_be_words_in_any_script() -> None:
    check_labels({"site": "lab-7/Zürich", "gpu": "H100"})
