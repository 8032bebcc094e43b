# SPDX-License-Identifier: Apache-2.0
"""Two tenants on one broker: neither sees, uses or administers what is the other's."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import session
from fedml.client import Client
from fedml.errors import BrokerRefused
from tests.place import Place


class Tenants:
    """The first tenant with a machine `ours`, and `acme` with its admin and a machine `theirs`."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        operator = place.client
        operator.call("POST", "/v1/users", {"name": "bob", "role": "admin", "tenant": "acme"})
        token = operator.call("POST", "/v1/users/bob/tokens", {})["key"]
        self.acme = Client(session.login(folder / "bob", token))
        place.agent("ours")
        place.login_key = operator.call("POST", "/v1/keys", {"tenant": "acme"})["key"]
        place.agent("theirs")

    def run(self, client: Client, command: str) -> str:
        run = client.submit("launch", {"command": command})
        *_, last = client.follow(run, logs=False)
        assert last["end"]["state"] == "FINISHED", last["end"]["cause"]
        return run


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    with Place(folder) as place:
        yield Tenants(place, folder)


def _names(client: Client) -> list[str]:
    return [d["name"] for d in client.call("GET", "/v1/devices")["devices"]]


def test_a_machine_belongs_to_the_tenant_of_its_key(tenants: Tenants) -> None:
    assert _names(tenants.place.client) == ["ours"]
    assert _names(tenants.acme) == ["theirs"]


def test_jobs_run_on_the_tenants_own_machines_only(tenants: Tenants) -> None:
    mine, other = (tenants.run(c, "true") for c in (tenants.place.client, tenants.acme))
    devices = {name: tenants.place.agents[name].device for name in ("ours", "theirs")}
    (first,), (second,) = tenants.place.tasks(mine), tenants.place.tasks(other)
    assert (first.device, second.device) == (devices["ours"], devices["theirs"])


def test_what_another_tenant_has_does_not_exist(tenants: Tenants) -> None:
    run = tenants.run(tenants.place.client, "echo secret")
    assert run not in [r["id"] for r in tenants.acme.call("GET", "/v1/runs")["runs"]]
    for method, path in (
        ("GET", f"/v1/runs/{run}"),
        ("POST", f"/v1/runs/{run}/stop"),
        ("DELETE", f"/v1/runs/{run}"),
        ("GET", "/v1/devices/ours"),
        ("POST", "/v1/devices/ours/revoke"),
        ("DELETE", "/v1/devices/ours"),
        ("POST", "/v1/users/admin/tokens"),
    ):
        with pytest.raises(BrokerRefused, match="no such"):
            tenants.acme.call(method, path, {} if method == "POST" else None)
    with pytest.raises(BrokerRefused):
        list(tenants.acme.follow(run))


def test_only_the_first_tenants_admins_make_something_for_another(tenants: Tenants) -> None:
    for path, body in (
        ("/v1/keys", {"tenant": "default"}),
        ("/v1/users", {"name": "eve", "role": "admin", "tenant": "default"}),
    ):
        with pytest.raises(BrokerRefused, match="only your own tenant"):
            tenants.acme.call("POST", path, body)
    made = tenants.acme.call("POST", "/v1/users", {"name": "carol"})
    assert made == {"name": "carol", "role": "member", "tenant": "acme"}


def test_a_member_administers_nothing(tenants: Tenants) -> None:
    tenants.acme.call("POST", "/v1/users", {"name": "dave"})
    token = tenants.acme.call("POST", "/v1/users/dave/tokens", {})["key"]
    dave = Client(session.login(tenants.place.folder / "dave", token))
    assert dave.call("GET", "/v1/whoami")["role"] == "member"
    for method, path in (
        ("GET", "/v1/keys"),
        ("POST", "/v1/keys"),
        ("GET", "/v1/users"),
        ("POST", "/v1/users"),
        ("POST", "/v1/users/bob/tokens"),
        ("POST", "/v1/devices/theirs/drain"),
        ("POST", "/v1/devices/theirs/labels"),
        ("POST", "/v1/devices/theirs/revoke"),
        ("DELETE", "/v1/devices/theirs"),
        ("DELETE", "/v1/runs/r-any"),
    ):
        with pytest.raises(BrokerRefused, match="admin"):
            dave.call(method, path, {"name": "x"} if method == "POST" else None)
    tenants.run(dave, "true")  # but may run


def test_each_tenants_admins_read_their_own_audit(tenants: Tenants) -> None:
    def told(client: Client, query: str = "") -> list[dict[str, Any]]:
        entries = client.call("GET", f"/v1/audit?limit=1000{query}")["entries"]
        assert {e["tenant"] for e in entries} == {client.call("GET", "/v1/whoami")["tenant"]}
        return entries

    acme, first = told(tenants.acme), told(tenants.place.client)
    names = {name: tenants.place.agents[name].device for name in ("ours", "theirs")}
    for entries, device in ((acme, names["theirs"]), (first, names["ours"])):
        enrolled = [e["object"] for e in entries if e["action"] == "device.enrol"]
        assert enrolled == [device]
    assert ("user/admin", "user.create", "bob") in {
        (e["actor"], e["action"], e["object"]) for e in acme
    }
    assert {e["actor"] for e in told(tenants.acme, "&user=bob")} == {"user/bob"}
    newest = acme[0]["n"]
    assert told(tenants.acme, f"&before={newest}")[0]["n"] == acme[1]["n"]


def test_whom_the_broker_turns_away_is_in_the_audit_of_the_tenant(tenants: Tenants) -> None:
    key = tenants.acme.call("POST", "/v1/keys", {})
    tenants.acme.call("DELETE", f"/v1/keys/{key['id']}")
    tenants.place.login_key = key["key"]
    with pytest.raises(subprocess.CalledProcessError):
        tenants.place.agent("late", run=False)
    for client, wanted in ((tenants.acme, [key["id"]]), (tenants.place.client, [])):
        found = client.call("GET", "/v1/audit?action=sign-in")["entries"]
        assert [e["object"] for e in found if "revoked" in e["details"]["why"]] == wanted


def test_nobody_is_let_in_without_a_token(tenants: Tenants) -> None:
    stranger = session.load(tenants.place.folder / "me")
    object.__setattr__(stranger, "token", "00" * 24)
    with pytest.raises(BrokerRefused, match=r"(?i)token"):
        Client(stranger).call("GET", "/v1/runs")
    found = tenants.place.client.call("GET", "/v1/audit?action=sign-in&limit=1")["entries"]
    assert found[0]["actor"] == "nobody"
    assert found[0]["details"]["from"] == "127.0.0.1"
    assert "00" * 24 not in str(found)
