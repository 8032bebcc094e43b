# SPDX-License-Identifier: Apache-2.0
"""The audit: what is done leaves one entry, and whoever changes an entry is found."""

import asyncio
import contextlib
import hashlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection

from fedml_agent.login import _csr
from fedml_broker import audit, runs
from fedml_broker.accounts import Accounts, User
from fedml_broker.app import Broker, Settings
from fedml_broker.audit import CLI, GENESIS, Broken, Head, Refusals, SignInRefused, note
from fedml_broker.fleet import Machine
from fedml_broker.launch import LaunchRequest
from fedml_broker.match import Capacity
from fedml_broker.mqtt.endpoint import Endpoint
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT
from fedml_broker.tables import audit as table
from fedml_protocol.keys import Scope, parse_login_key
from fedml_protocol.tasks import TaskState
from fedml_protocol.topics import Address
from tests.broker.mqtt.certificates import Authority, Pair
from tests.broker.mqtt.peer import Peer

ANN = User("ann", "acme", "admin")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    yield store
    await asyncio.to_thread(store.close)


async def _fill(store: Store, count: int = 5) -> None:
    for n in range(count):
        await store.write(
            lambda tx, n=n: note(tx, "acme", "user/ann", "run.stop", f"r-{n}", why="ärger", n=n)
        )


async def _all(store: Store, **wanted: Any) -> list[dict[str, Any]]:
    found = await store.read(lambda tx: audit.entries(tx, limit=10_000, **wanted))
    return found[::-1]


async def _said(store: Store, **wanted: Any) -> list[tuple[str, str, str]]:
    return [(e["actor"], e["action"], e["object"]) for e in await _all(store, **wanted)]


# ---------------------------------------------------------------------- the chain


async def test_anybody_can_compute_the_chain_from_what_is_listed(store: Store) -> None:
    await _fill(store)
    last = GENESIS
    for n, entry in enumerate(await _all(store), 1):
        told = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        last = hashlib.sha256(last.encode() + text.encode()).hexdigest()
        assert (entry["n"], told) == (n, last)
    assert await store.read(audit.verify) == Head(5, last)
    assert await store.read(audit.head) == Head(5, last)


async def test_an_empty_chain_holds(store: Store) -> None:
    assert await store.read(audit.verify) == Head(0, GENESIS)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("column", [c.name for c in table.c])
async def test_whatever_is_changed_in_an_entry_is_found(store: Store, column: str, n: int) -> None:
    await _fill(store)
    wrong = {
        "n": 50 + n,
        "at_ms": 1,
        "details": '{"n":7,"why":"ärger"}',
        "hash": "0" * 63 + "1",
    }.get(column, "other")
    change = table.update().where(table.c.n == n).values({column: wrong})
    await store.write(lambda tx: tx.execute(change))
    with pytest.raises(Broken) as found:
        await store.read(audit.verify)
    assert found.value.n == n


@pytest.mark.parametrize(
    "details", ["", "{", '{"n":2,"why":"ärger"} ', '{"n":9,"n":2,"why":"ärger"}', "null"]
)
async def test_details_in_another_form_are_found(store: Store, details: str) -> None:
    await _fill(store)
    await store.write(
        lambda tx: tx.execute(table.update().where(table.c.n == 3).values(details=details))
    )
    with pytest.raises(Broken) as found:
        await store.read(audit.verify)
    assert found.value.n == 3


@pytest.mark.parametrize("n", [1, 2, 4])
async def test_a_missing_entry_is_found_though_the_rest_moves_up(store: Store, n: int) -> None:
    await _fill(store)

    def take_out(tx: Connection) -> None:
        tx.execute(table.delete().where(table.c.n == n))

    def move_up(tx: Connection) -> None:
        for later in range(n + 1, 6):
            tx.execute(table.update().where(table.c.n == later).values(n=later - 1))

    for step in (take_out, move_up):
        await store.write(step)
        with pytest.raises(Broken) as found:
            await store.read(audit.verify)
        assert found.value.n == n


async def test_entries_that_change_places_are_found(store: Store) -> None:
    await _fill(store)

    def swap(tx: Connection) -> None:
        for old, new in ((2, 90), (4, 2), (90, 4)):
            tx.execute(table.update().where(table.c.n == old).values(n=new))

    await store.write(swap)
    with pytest.raises(Broken) as found:
        await store.read(audit.verify)
    assert found.value.n == 2


async def test_who_computes_the_hash_of_what_he_changed_is_found_at_the_next_entry(
    store: Store,
) -> None:
    await _fill(store)
    entries = await _all(store)
    entry = {**entries[2], "actor": "user/bob"}
    del entry["hash"]
    text = entries[1]["hash"] + audit.canonical(entry)
    forged = {"actor": "user/bob", "hash": hashlib.sha256(text.encode()).hexdigest()}
    await store.write(lambda tx: tx.execute(table.update().where(table.c.n == 3).values(forged)))
    with pytest.raises(Broken) as found:
        await store.read(audit.verify)
    assert found.value.n == 4


async def test_what_fails_leaves_no_entry_and_its_neighbours_do(store: Store) -> None:
    def fails(tx: Connection) -> None:
        note(tx, "acme", CLI, "user.create", "bob")
        raise RuntimeError

    asked = [
        store.write(lambda tx: note(tx, "acme", CLI, "user.create", "ann")),
        store.write(fails),
        store.write(lambda tx: note(tx, "acme", CLI, "user.create", "carol")),
    ]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(a) for a in answers] == [type(None), RuntimeError, type(None)]
    assert [e["object"] for e in await _all(store)] == ["ann", "carol"]
    assert (await store.read(audit.verify)).n == 2


async def test_a_command_may_write_while_the_broker_does(store: Store, tmp_path: Path) -> None:
    def beside() -> None:
        other = sa.create_engine(f"sqlite:///{tmp_path / 'broker.db'}")
        sa.event.listen(other, "begin", lambda tx: tx.exec_driver_sql("BEGIN IMMEDIATE"))
        sa.event.listen(other, "connect", lambda db, _: setattr(db, "isolation_level", None))
        for _ in range(60):
            with other.begin() as tx:
                note(tx, "default", CLI, "backup.create", "b")
        other.dispose()

    command = asyncio.create_task(asyncio.to_thread(beside))
    for n in range(60):
        await store.write(lambda tx, n=n: note(tx, "acme", "user/ann", "run.stop", str(n)))
    await command
    assert (await store.read(audit.verify)).n == 120


async def test_long_and_strange_texts_are_cut_and_do_no_harm(store: Store) -> None:
    strange = '\x00\n\t"\\/\x7f\u2028😀\ud800'
    labels = {f"l{n}": "x" * 80 for n in range(100)}
    await store.write(lambda tx: note(tx, "acme", CLI, "a.b", strange, text="y" * 10_000))
    await store.write(lambda tx: note(tx, "acme", CLI, "a.b", "x" * 999, labels=labels))
    first, second = await _all(store)
    assert first["object"] == strange.replace("\ud800", "?")
    assert first["details"]["text"] == "y" * 200
    assert len(second["object"]) == 200
    assert len(json.dumps(second["details"])) < 6000
    assert (await store.read(audit.verify)).n == 2


@pytest.mark.timeout(40)
async def test_a_hundred_thousand_entries_are_verified_in_seconds(store: Store) -> None:
    rows, last = [], GENESIS
    for n in range(1, 100_001):
        row = {
            "n": n,
            "at_ms": 1_700_000_000_000 + n,
            "tenant": "acme",
            "actor": "user/ann",
            "action": "run.submit",
            "object": f"r-{n:010}",
            "details": {"kind": "launch", "name": "job", "package": None},
        }
        last = hashlib.sha256((last + audit.canonical(row)).encode()).hexdigest()
        rows.append({**row, "details": audit.canonical(row["details"]), "hash": last})
    await store.write(lambda tx: tx.execute(table.insert(), rows))
    assert await store.read(audit.verify) == Head(100_000, last)


async def test_entries_are_found_by_who_what_and_when(store: Store) -> None:
    for actor, action in (
        ("user/ann", "run.stop"),
        ("user/bob", "run.submit"),
        ("user/ann", "runs.other"),
        ("user/ann", "run.submit"),
    ):
        await store.write(lambda tx, a=actor, b=action: note(tx, "acme", a, b, "x"))
    assert len(await _all(store, actor="user/ann")) == 3
    assert [e["n"] for e in await _all(store, action="run")] == [1, 2, 4]
    assert [e["n"] for e in await _all(store, action="run.submit", actor="user/ann")] == [4]
    assert await _all(store, action="run%") == []
    assert [e["n"] for e in await _all(store, before=3)] == [1, 2]
    assert await _all(store, tenant="evil") == []
    at = (await _all(store))[0]["at_ms"] / 1000
    assert len(await _all(store, since=at - 1)) == 4
    assert await _all(store, since=at + 3600) == []


# ---------------------------------------------------------------------- refused sign-ins


async def test_a_flood_of_refused_sign_ins_is_counted_not_written(store: Store) -> None:
    now = [1000.0]
    refusals = Refusals(store, clock=lambda: now[0])
    refused = SignInRefused(403, "this login key was revoked", tenant="acme", thing="k-1")
    await refusals.note(refused, "10.0.0.7")
    for n in range(499):
        await refusals.note(refused, f"10.1.0.{n}")
    written = await _all(store)
    assert len(written) == 20
    assert {(e["tenant"], e["actor"], e["object"]) for e in written} == {("acme", "nobody", "k-1")}
    assert written[0]["details"] == {"why": "this login key was revoked", "from": "10.0.0.7"}
    await refusals.flush()
    assert len(await _all(store)) == 20
    now[0] += 60
    await refusals.flush()
    now[0] += 60
    await refusals.flush()  # nothing is left to be told
    assert [e["details"].get("not_written_before") for e in await _all(store)] == [None] * 20 + [
        480
    ]


async def test_a_machine_that_is_refused_again_and_again_is_noted_once_an_hour(
    store: Store,
) -> None:
    now = [1000.0]
    refusals = Refusals(store, clock=lambda: now[0])
    revoked = SignInRefused(403, "revoked", tenant="acme", thing="d-1")
    for minute in range(90):
        await refusals.note(revoked, "10.0.0.7")
        if not minute:
            await refusals.note(revoked, "10.0.0.8")  # somebody else has its key
        now[0] += 60
        await refusals.flush()
    first, elsewhere, after_an_hour, again = await _all(store)
    assert first["details"] == again["details"] == {"why": "revoked", "from": "10.0.0.7"}
    assert elsewhere["details"] == {"why": "revoked", "from": "10.0.0.8"}
    assert after_an_hour["details"] == {"why": "revoked", "from": "10.0.0.7", "times": 59}


async def test_a_store_that_cannot_write_changes_no_answer(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tx: Connection) -> None:
        tx.exec_driver_sql("PRAGMA query_only=ON")

    await store.write(full)
    await Refusals(store).note(SignInRefused(401, "unknown or expired token"), "10.0.0.7")
    assert "not noted" in caplog.text


# ---------------------------------------------------------------------- who leaves entries


async def test_what_is_done_with_users_tokens_and_keys(store: Store) -> None:
    accounts = Accounts(store, url="https://b:1", ca_sha256=bytes(32))
    await accounts.create_user("ann", "admin", "acme", by=CLI)
    with pytest.raises(Problem):
        await accounts.create_user("ann", "admin", "acme", by=CLI)
    await accounts.create_token("ann", 1, by=CLI)
    key, _ = await accounts.create_key(ANN, uses=2, days=1, labels={"site": "north"})
    for _ in range(2):  # the second one changes nothing
        await accounts.revoke_key("acme", key, by="ann")
    assert await _said(store) == [
        (CLI, "user.create", "ann"),
        (CLI, "token.create", "ann"),
        ("user/ann", "key.create", key),
        ("user/ann", "key.revoke", key),
    ]
    assert {e["tenant"] for e in await _all(store)} == {"acme"}
    assert (await _all(store))[2]["details"]["labels"] == {"site": "north"}


async def test_what_is_done_with_runs(store: Store) -> None:
    def create(tx: Connection, run: str = "r-12345678") -> None:
        runs.create(tx, ANN, run=run, kind="launch", name="job", spec={}, package=None)

    await store.write(create)
    with pytest.raises(runs.SubmittedBefore):
        await store.write(create)
    for _ in range(2):
        await store.write(lambda tx: runs.stop_asked(tx, "r-12345678", "bob"))
        await store.write(lambda tx: runs.end(tx, "r-12345678", TaskState.STOPPED))
    for _ in range(2):
        await store.write(lambda tx: runs.remove(tx, "r-12345678", "ann"))
    assert await _said(store, tenant="acme") == [
        ("user/ann", "run.submit", "r-12345678"),
        ("user/bob", "run.stop", "r-12345678"),
        ("broker", "run.end", "r-12345678"),
        ("user/ann", "run.remove", "r-12345678"),
    ]


# ---------------------------------------------------------------------- a whole broker


async def test_a_new_ca_and_new_signing_keys_are_noted_once(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, https_port=0, mqtt_port=0, disk_reserve_bytes=0)
    async with Broker.running(settings) as broker:
        first, second = broker.identity.verify_keys_raw
        ca = broker.identity.ca_sha256.hex()
    async with Broker.running(settings) as broker:
        broker.identity.rotate_signing_key()
        _, third = broker.identity.verify_keys_raw
    async with Broker.running(settings) as broker:
        assert await _said(broker.store) == [
            ("broker", "ca.new", ca),
            ("broker", "signing-key.new", first),
            ("broker", "signing-key.new", second),
            ("broker", "signing-key.new", third),
        ]


async def test_machines_that_mqtt_does_not_let_in_are_noted(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "broker", https_port=0, mqtt_port=0, disk_reserve_bytes=0)
    async with Broker.running(settings) as broker:
        assert isinstance(broker.post, Endpoint)

        def context(files: Pair | None) -> ssl.SSLContext:
            trusting = ssl.create_default_context(cafile=broker.identity.ca_file)
            if files is not None:
                trusting.load_cert_chain(files.certificate, files.key)
            return trusting

        ours = _device_files(broker, tmp_path, "acme/d/ghost")  # removed, or a forgotten backup
        ghost = await Peer.open(broker.post.port, context(ours))
        await ghost.connect("acme.d.ghost")
        assert ghost.connack.reason_code == 0x87
        await ghost.close()
        for files in (Authority(tmp_path).issue("acme/d/ghost"), None):
            stranger = await Peer.open(broker.post.port, context(files))
            with contextlib.suppress(OSError):
                await stranger.ended()
        await broker.refusals._waiting.join()

        found = await _all(broker.store, action="sign-in.refused")

    assert [(e["tenant"], e["object"]) for e in found] == [
        ("acme", "ghost"),
        (DEFAULT_TENANT, ""),
        (DEFAULT_TENANT, ""),
    ]
    assert {(e["actor"], e["details"]["from"]) for e in found} == {("nobody", "127.0.0.1")}
    assert [e["details"]["why"] for e in found] == [
        "this device is not known here: revoked, or removed",
        "its certificate was not accepted: unable to get local issuer certificate",
        "it came without a certificate",
    ]


def _device_files(broker: Broker, folder: Path, name: str) -> Pair:
    key = Ed25519PrivateKey.generate()
    files = Pair(folder / "device.pem", folder / "device.key")
    files.certificate.write_bytes(broker.identity.issue(_csr(key).encode(), name))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(*pem, serialization.NoEncryption()))
    return files


async def test_no_entry_holds_a_secret(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, https_port=0, mqtt_port=0, disk_reserve_bytes=0)
    async with Broker.running(settings) as broker:
        room = Capacity(slots=1, cpus=1, memory_bytes=1 << 30, disk_bytes=1 << 30)
        address = Address("acme", "one")
        broker.fleet.put(Machine(address=address, name="one", labels={}, capacity=room))
        await broker.accounts.create_user("ann", "admin", "acme", by=CLI)
        token = await broker.accounts.create_token("ann", by=CLI)
        _, key = await broker.accounts.create_key(ANN, uses=1, days=1, labels={})
        job = {"command": "echo hush-command", "bootstrap": "hush-boot", "env": {"A": "hush-env"}}
        await broker.launcher.submit(ANN, msgspec.convert(job, LaunchRequest))
        everything = json.dumps(await _all(broker.store))
    secrets = [
        parse_login_key(token, Scope.USER).secret,
        parse_login_key(key, Scope.DEVICE).secret,
    ]
    hidden = [s.hex() for s in secrets] + [hashlib.sha256(s).hexdigest() for s in secrets]
    for secret in (*hidden, token, key, "hush"):
        assert secret not in everything
    assert everything.count("run.submit") == 1
