# SPDX-License-Identifier: Apache-2.0
"""Who may ask which URL: every route of the OpenAPI document, asked by everybody there is.

`LEAST` is written down here once more: to give a route to more people means to change it too.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import urllib3
from aiohttp import web

from fedml import session
from fedml.errors import BrokerRefused
from fedml_broker import accounts
from fedml_broker.app import Broker
from fedml_broker.cli import users
from fedml_broker.routes import application, openapi, table
from fedml_protocol.codec import parse
from fedml_protocol.keys import LoginKey, Scope, parse_login_key
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import Offer
from tests.place import Place

ROLES = ("viewer", "member", "admin")

# Least role of a user; "-" for none; and whether devices may.
LEAST = {
    "GET /": ("anybody", True),
    "GET /web/{digest}/{file}": ("anybody", True),
    "POST /v1/session": ("anybody", True),
    "GET /v1/session": ("viewer", False),
    "DELETE /v1/session": ("viewer", False),
    "GET /v1/watch": ("viewer", False),
    "GET /v1/runs/{run}/clients": ("viewer", False),
    "GET /v1/health": ("anybody", True),
    "GET /v1/openapi.json": ("anybody", True),
    "GET /v1/ca": ("anybody", True),
    "GET /v1/oidc": ("anybody", True),
    "GET /v1/oidc/start": ("anybody", True),
    "GET /v1/oidc/callback": ("anybody", True),
    "POST /v1/oidc/key": ("anybody", True),
    "POST /v1/enrol": ("anybody", True),
    "POST /v1/agent/challenge": ("anybody", True),
    "POST /v1/agent/recover": ("anybody", True),
    "POST /v1/agent/hello": ("-", True),
    "POST /v1/agent/renew": ("-", True),
    "POST /v1/agent/resync": ("-", True),
    "PUT /v1/agent/logs/{task}/{epoch}/{stream}": ("-", True),
    "HEAD /v1/blobs/{sha256}": ("viewer", True),
    "GET /v1/blobs/{sha256}": ("viewer", True),
    "PUT /v1/blobs/{sha256}": ("member", True),
    "POST /v1/blobs/missing": ("member", False),
    "POST /v1/launch": ("member", False),
    "POST /v1/launch/match": ("member", False),
    "POST /v1/federate": ("member", False),
    "POST /v1/federate/match": ("member", False),
    "GET /v1/runs": ("viewer", False),
    "GET /v1/queue": ("viewer", False),
    "GET /v1/runs/{run}": ("viewer", False),
    "PUT /v1/runs/{run}/priority": ("member", False),
    "GET /v1/clusters": ("viewer", False),
    "POST /v1/clusters": ("member", False),
    "GET /v1/clusters/{cluster}": ("viewer", False),
    "DELETE /v1/clusters/{cluster}": ("member", False),
    "POST /v1/clusters/{cluster}/start": ("member", False),
    "POST /v1/clusters/{cluster}/stop": ("member", False),
    "PUT /v1/clusters/{cluster}/autostop": ("member", False),
    "DELETE /v1/runs/{run}": ("admin", False),
    "GET /v1/runs/{run}/follow": ("viewer", False),
    "GET /v1/runs/{run}/logs": ("viewer", False),
    "POST /v1/runs/{run}/stop": ("member", False),
    "GET /v1/workflows": ("viewer", False),
    "POST /v1/workflows": ("member", False),
    "GET /v1/workflows/{workflow}": ("viewer", False),
    "DELETE /v1/workflows/{workflow}": ("admin", False),
    "GET /v1/workflows/{workflow}/follow": ("viewer", False),
    "POST /v1/workflows/{workflow}/stop": ("member", False),
    "POST /v1/workflows/{workflow}/resume": ("member", False),
    "GET /v1/storage": ("viewer", False),
    "GET /v1/storage/{name}": ("viewer", False),
    "PUT /v1/storage/{name}": ("member", False),
    "DELETE /v1/storage/{name}": ("member", False),
    "GET /v1/runs/{run}/metrics": ("viewer", False),
    "GET /v1/runs/{run}/params": ("viewer", False),
    "GET /v1/runs/{run}/artifacts": ("viewer", False),
    "POST /v1/tracked": ("member", False),
    "PUT /v1/runs/{run}/records": ("member", False),
    "POST /v1/runs/{run}/end": ("member", False),
    "POST /api/2.0/mlflow/experiments/create": ("member", False),
    "GET /api/2.0/mlflow/experiments/get": ("viewer", False),
    "GET /api/2.0/mlflow/experiments/get-by-name": ("viewer", False),
    "POST /api/2.0/mlflow/experiments/search": ("viewer", False),
    "GET /api/2.0/mlflow/experiments/search": ("viewer", False),
    "POST /api/2.0/mlflow/experiments/update": ("member", False),
    "POST /api/2.0/mlflow/experiments/delete": ("member", False),
    "POST /api/2.0/mlflow/experiments/restore": ("member", False),
    "POST /api/2.0/mlflow/experiments/set-experiment-tag": ("member", False),
    "POST /api/2.0/mlflow/runs/create": ("member", False),
    "GET /api/2.0/mlflow/runs/get": ("viewer", False),
    "POST /api/2.0/mlflow/runs/update": ("member", False),
    "POST /api/2.0/mlflow/runs/delete": ("member", False),
    "POST /api/2.0/mlflow/runs/restore": ("member", False),
    "POST /api/2.0/mlflow/runs/search": ("viewer", False),
    "POST /api/2.0/mlflow/runs/log-metric": ("member", False),
    "POST /api/2.0/mlflow/runs/log-parameter": ("member", False),
    "POST /api/2.0/mlflow/runs/set-tag": ("member", False),
    "POST /api/2.0/mlflow/runs/delete-tag": ("member", False),
    "POST /api/2.0/mlflow/runs/log-batch": ("member", False),
    "GET /api/2.0/mlflow/metrics/get-history": ("viewer", False),
    "GET /api/2.0/mlflow/artifacts/list": ("viewer", False),
    "POST /api/2.0/mlflow/logged-models/search": ("viewer", False),
    "GET /api/2.0/mlflow-artifacts/artifacts": ("viewer", False),
    "GET /api/2.0/mlflow-artifacts/artifacts/{path}": ("viewer", False),
    "PUT /api/2.0/mlflow-artifacts/artifacts/{path}": ("member", False),
    "GET /v1/devices": ("viewer", False),
    "GET /v1/devices/{device}": ("viewer", False),
    "POST /v1/devices/{device}/labels": ("admin", False),
    "POST /v1/devices/{device}/drain": ("admin", False),
    "POST /v1/devices/{device}/revoke": ("admin", False),
    "DELETE /v1/devices/{device}": ("admin", False),
    "GET /v1/keys": ("admin", False),
    "POST /v1/keys": ("admin", False),
    "DELETE /v1/keys/{key}": ("admin", False),
    "GET /v1/users": ("admin", False),
    "POST /v1/users": ("admin", False),
    "PUT /v1/users/{user}/role": ("admin", False),
    "POST /v1/users/{user}/tokens": ("admin", False),
    "DELETE /v1/users/{user}/tokens": ("admin", False),
    "DELETE /v1/token": ("viewer", False),
    "GET /v1/audit": ("admin", False),
    "GET /v1/whoami": ("viewer", False),
    "GET /v1/status": ("viewer", False),
    "GET /metrics": ("viewer", False),  # and, from the broker's own machine, anybody
}
# What a job may ask with the key of its run, about this run.
OWN_RUN = {
    "GET /v1/runs/{run}",
    "GET /v1/runs/{run}/follow",
    "GET /v1/runs/{run}/logs",
    "POST /v1/runs/{run}/stop",
    "GET /v1/whoami",
}
DOCUMENT = openapi(table(cast(Broker, None)))
ROUTES = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


def test_the_command_offers_the_roles_that_there_are() -> None:
    assert (
        users._ROLES == accounts.ROLES
    )  # kept apart, so that the command starts without SQLAlchemy


def test_each_route_has_its_least_role_and_no_route_is_without_a_row() -> None:
    said = {
        name: (
            operation.get("x-least-role", "-" if operation["security"] else "anybody"),
            not operation["security"] or {"certificate": []} in operation["security"],
        )
        for name, operation in ROUTES.items()
    }
    assert said == LEAST
    assert {name for name, operation in ROUTES.items() if operation.get("x-own-run")} == OWN_RUN
    served = application(cast(Broker, None)).router.routes()
    assert {f"{r.method} {r.resource.canonical}" for r in served if r.resource} == set(LEAST)
    assert all(isinstance(r, web.ResourceRoute) for r in served)


# What a hash names is nobody's, and a name that is ours may be somebody else's, too.
OURS_ALONE = [r for r in ROUTES if "{" in r and "/blobs/" not in r and "PUT /v1/storage" not in r]


def _key_of(place: Place, run: str) -> LoginKey:
    """The key that a job of ours would find: no machine runs it."""
    ((data,),) = place.query("SELECT offer FROM tasks WHERE run = :run", run=run)
    spec = parse(Offer, data).spec
    assert isinstance(spec, LaunchSpec)
    assert spec.secrets == (accounts.RUN_KEY,)
    return parse_login_key(spec.env[accounts.RUN_KEY], Scope.RUN)


class Askers:
    """A broker, and everybody who may come: by name, with the credentials of each."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self._url = place.client.url
        ca = str(place.home / "broker" / "identity" / "ca.pem")
        call = place.client.call
        self.headers: dict[str, dict[str, str]] = {"nobody": {}}
        for tenant, prefix in (("default", ""), ("acme", "foreign ")):
            for role in ROLES:
                name = f"{tenant}-{role}"
                call("POST", "/v1/users", {"name": name, "role": role, "tenant": tenant})
                token = call("POST", f"/v1/users/{name}/tokens", {})["key"]
                secret = session.login(folder / name, token).token
                self.headers[prefix + role] = {"Authorization": f"Bearer {secret}"}
        ours = place.agent("ours", run=False)
        place.login_key = call("POST", "/v1/keys", {"tenant": "acme"})["key"]
        theirs = place.agent("theirs", run=False)
        plain = urllib3.PoolManager(ca_certs=ca, retries=False, timeout=20)
        self.pools = dict.fromkeys(self.headers, plain)
        for name, agent in (("device", ours), ("foreign device", theirs)):
            private = agent.home / "agent" / "private"
            self.headers[name] = {}
            self.pools[name] = urllib3.PoolManager(
                ca_certs=ca,
                cert_file=str(private / "device.crt"),
                key_file=str(private / "device.key"),
                retries=False,
                timeout=20,
            )
        run = place.launch("true")
        for who, named in (("job", run), ("job of another run", place.launch("true"))):
            secret = _key_of(place, named).secret.hex()
            self.headers[who] = {"Authorization": f"Bearer {secret}"}
            self.pools[who] = plain
        step = {"name": "s", "job": {"command": "true"}}
        flow = call("POST", "/v1/workflows", {"name": "flow", "steps": [step]})
        self.real = {
            "run": run,
            "workflow": flow["workflow"],
            "task": f"{run}-t",
            "epoch": "1",
            "stream": "stdout",
            "device": ours.device,
            "key": call("POST", "/v1/keys", {})["id"],
            "user": "default-member",
            "cluster": call("POST", "/v1/clusters", {"name": "c", "devices": ["ours"]})["name"],
            "sha256": hashlib.sha256(b"").hexdigest(),
            "name": "an-object",
            "path": f"0/{run}/artifacts/a",
            "digest": "nothing",
            "file": "nothing",
        }
        place.client.put(self.real["sha256"], 0, lambda start: iter([]))
        call("PUT", "/v1/storage/an-object", {"sha256": self.real["sha256"]})
        # What is not there: for those who may, so that nothing of ours is deleted by the way.
        self.made_up = {**dict.fromkeys(self.real, "nothing"), "epoch": "1", "stream": "stdout"}
        self.made_up["sha256"] = self.real["sha256"]

    def ask(self, who: str, route: str, parts: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """The status, and the problem's or answer's body where it is JSON."""
        method, path = route.split(" ", 1)
        bodies = {"/role": b'{"role": "viewer"}', "/priority": b'{"priority": 0}'}
        body = next((body for end, body in bodies.items() if path.endswith(end)), b"{}")
        if path.startswith("/v1/blobs"):
            body = b""
        response = self.pools[who].request(
            method,
            self._url
            + path.format(**parts)
            + ("?stay=0" if path.endswith(("/follow", "/watch")) else ""),
            headers=self.headers[who],
            body=None if method in ("GET", "HEAD") else body,
        )
        is_json = response.headers.get("Content-Type", "").endswith("json") and response.data
        return response.status, json.loads(response.data.splitlines()[0]) if is_json else {}


@pytest.fixture(scope="module")
def askers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Askers]:
    folder = tmp_path_factory.mktemp("roles")
    with Place(folder) as place:
        yield Askers(place, folder)


def _may(who: str, route: str) -> bool:
    least, devices = LEAST[route]
    if least == "anybody":
        return True
    kind = who.removeprefix("foreign ")
    if route == "GET /metrics" and kind == "nobody":
        return True
    if kind == "device":
        return devices
    return kind in ROLES and least in ROLES and ROLES.index(kind) >= ROLES.index(least)


@pytest.mark.parametrize("who", ["nobody", *ROLES, "device"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_answers_those_who_may_ask_and_refuses_the_others(
    askers: Askers, route: str, who: str
) -> None:
    if _may(who, route):
        if route == "DELETE /v1/token":
            return  # it would end what this test comes with: see below
        status, answer = askers.ask(who, route, askers.made_up)
        if route == "POST /v1/agent/recover" or "/logs/" in route:
            return  # these ask for more than a role: see test_devices.py and below
        assert status not in (401, 403), answer
        return
    status, answer = askers.ask(who, route, askers.real)
    assert status == (401 if who == "nobody" else 403), answer
    if route.startswith("HEAD"):
        return
    least = LEAST[route][0]
    if who in ROLES and least in ROLES:
        assert answer["title"] == f"this needs the role {least}"
        assert f"default-{who} is a {who}" in answer["detail"]
        assert f"`fedml-broker users role default-{who} {least}`" in answer["hint"]
        assert "(admin, default-admin)" in answer["hint"]


@pytest.mark.parametrize("who", ["job", "job of another run"])
@pytest.mark.parametrize("route", [r for r in ROUTES if LEAST[r][0] != "anybody"])
def test_a_job_asks_about_its_own_run_alone(askers: Askers, route: str, who: str) -> None:
    may = route in OWN_RUN and (who == "job" or "{run}" not in route)
    if may and route.startswith("POST"):
        return  # it would stop the run that the other tests look at: see below
    status, answer = askers.ask(who, route, askers.real)
    assert status == (200 if may else 403), answer
    if not may and not route.startswith("HEAD"):
        assert answer["title"] == "a job's key is for its own run"


def test_a_jobs_key_ends_with_its_run_and_is_no_users_token(askers: Askers) -> None:
    place = askers.place
    call = place.client.call
    before = next(u for u in call("GET", "/v1/users")["users"] if u["name"] == "admin")["tokens"]
    run = place.launch("true")
    secret = _key_of(place, run).secret.hex()
    askers.headers["own"] = {"Authorization": f"Bearer {secret}"}
    askers.pools["own"] = askers.pools["nobody"]
    whose = askers.ask("own", "GET /v1/whoami", {})[1]
    assert whose == {"name": "admin", "tenant": "default", "role": "run", "run": run}
    with pytest.raises(BrokerRefused, match="unknown or expired key"):
        call("POST", "/v1/session", {"key": secret})  # else a job would be its user in a browser
    users = call("GET", "/v1/users")["users"]
    assert next(u for u in users if u["name"] == "admin")["tokens"] == before
    assert askers.ask("own", "POST /v1/runs/{run}/stop", {"run": run})[0] == 200
    shown = call("GET", f"/v1/runs/{run}")
    assert (shown["state"], shown["stopped_by"]) == ("STOPPED", "the job itself")
    assert secret not in json.dumps(shown)
    (entry,) = call("GET", "/v1/audit?action=run.stop&limit=1")["entries"]
    assert (entry["actor"], entry["object"]) == (f"run/{run}", run)
    assert askers.ask("own", "GET /v1/whoami", {})[0] == 401


@pytest.mark.parametrize("who", ["foreign viewer", "foreign member", "foreign admin"])
@pytest.mark.parametrize("route", OURS_ALONE)
def test_what_is_ours_does_not_exist_for_another_tenant(
    askers: Askers, route: str, who: str
) -> None:
    status, answer = askers.ask(who, route, askers.real)
    assert status == (404 if _may(who, route) else 403), answer


@pytest.mark.parametrize("who", ["foreign admin", "foreign device"])
@pytest.mark.parametrize("route", [r for r in ROUTES if r.startswith("GET") and "{" not in r])
def test_no_list_shows_another_tenant_what_is_ours(askers: Askers, route: str, who: str) -> None:
    _, answer = askers.ask(who, route, {})
    if route != "GET /v1/openapi.json":
        for name in ("device", "run", "key", "user", "name"):
            assert askers.real[name] not in json.dumps(answer)


@pytest.mark.parametrize("who", ["device", "foreign device"])
def test_a_device_writes_the_logs_of_its_own_tasks_only(askers: Askers, who: str) -> None:
    # The task was offered to nobody: its machine has never been online.
    route = "PUT /v1/agent/logs/{task}/{epoch}/{stream}"
    status, answer = askers.ask(who, route, askers.real)
    assert (status, answer["title"]) == (403, "not this device's task")


def test_a_role_counts_from_the_next_request_and_is_in_the_audit(askers: Askers) -> None:
    call = askers.place.client.call
    call("POST", "/v1/users", {"name": "eve", "role": "viewer"})
    token = call("POST", "/v1/users/eve/tokens", {})["key"]
    secret = session.login(askers.place.folder / "eve", token).token
    askers.headers["eve"] = {"Authorization": f"Bearer {secret}"}
    askers.pools["eve"] = askers.pools["nobody"]
    for role, status in (("viewer", 403), ("admin", 200), ("member", 403)):
        call("PUT", "/v1/users/eve/role", {"role": role})
        assert askers.ask("eve", "GET /v1/users", {})[0] == status
    (first, second) = call("GET", "/v1/audit?action=user.role&limit=2")["entries"]
    assert (first["object"], first["details"]) == ("eve", {"role": "member", "before": "admin"})
    assert second["details"] == {"role": "admin", "before": "viewer"}


def test_tokens_end_when_their_user_or_an_admin_says_so(askers: Askers) -> None:
    call = askers.place.client.call
    call("POST", "/v1/users", {"name": "mallory", "role": "member"})
    keys = [call("POST", "/v1/users/mallory/tokens", {})["key"] for _ in range(3)]
    for number, key in enumerate(keys):
        secret = parse_login_key(key, Scope.USER).secret.hex()
        askers.headers[f"mallory {number}"] = {"Authorization": f"Bearer {secret}"}
        askers.pools[f"mallory {number}"] = askers.pools["nobody"]

    def good() -> list[int]:
        asked = [askers.ask(f"mallory {n}", "GET /v1/whoami", {})[0] for n in range(3)]
        return [n for n, status in enumerate(asked) if status == 200]

    assert askers.ask("mallory 1", "DELETE /v1/token", {})[0] == 200
    assert good() == [0, 2]
    assert call("DELETE", "/v1/users/mallory/tokens") == {"name": "mallory", "tokens": 2}
    assert good() == []
    assert askers.ask("foreign admin", "DELETE /v1/users/mallory/tokens", {})[0] == 404
    assert call("DELETE", "/v1/users/mallory/tokens")["tokens"] == 0
    told = call("GET", "/v1/audit?action=token&limit=3")["entries"]
    assert [(e["action"], e["actor"], e["details"].get("tokens")) for e in told] == [
        ("token.revoke", "user/admin", 0),
        ("token.revoke", "user/admin", 2),
        ("token.end", "user/mallory", None),
    ]


def test_an_admin_who_revokes_his_own_tokens_keeps_that_with_which_he_asks(askers: Askers) -> None:
    call = askers.place.client.call
    other = parse_login_key(call("POST", "/v1/users/admin/tokens", {})["key"], Scope.USER)
    askers.headers["other"] = {"Authorization": f"Bearer {other.secret.hex()}"}
    askers.pools["other"] = askers.pools["nobody"]
    call("DELETE", "/v1/users/admin/tokens")
    assert askers.ask("other", "GET /v1/whoami", {})[0] == 401
    assert call("GET", "/v1/whoami")["name"] == "admin"
