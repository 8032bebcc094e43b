# SPDX-License-Identifier: Apache-2.0
"""Every URL of the broker, who may ask it, and the OpenAPI document made from the same table."""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from fedml_broker.accounts import User
from fedml_broker.api import (
    about,
    accounts,
    agents,
    blobs,
    clusters,
    devices,
    logs,
    mlflow,
    oidc,
    runs,
    session,
    storage,
    tracking,
    watch,
    workflows,
)
from fedml_broker.api import web as pages
from fedml_broker.api.call import Call, Callers, Handler
from fedml_broker.audit import SignInRefused
from fedml_broker.clusters import AutostopBody, ClusterRequest
from fedml_broker.dashboard import guard
from fedml_broker.devices import EnrolRequest, RecoverRequest, RenewRequest
from fedml_broker.federate import FederateRequest, MachinesRequest
from fedml_broker.launch import LaunchRequest
from fedml_broker.problems import Problem, as_problems
from fedml_broker.storage import PutObject
from fedml_broker.workflow import ResumeBody, WorkflowRequest
from fedml_protocol.topics import Address

if TYPE_CHECKING:
    from fedml_broker.app import Broker


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask a URL: users from a role upwards, devices, both, or anybody.

    `loopback`: also who asks from this very machine, without saying who he is. `own_run`: also a
    job with the key of its run; of a run in the path, of that one alone.
    """

    role: str | None = None
    device: bool = False
    anybody: bool = False
    loopback: bool = False
    own_run: bool = False


ANYBODY = Access(anybody=True)
DEVICE = Access(device=True)
VIEWER = Access(role="viewer")
MEMBER = Access(role="member")
ADMIN = Access(role="admin")
SCRAPER = Access(role="viewer", loopback=True)
VIEWER_OR_DEVICE = Access(role="viewer", device=True)
VIEWER_OR_OWN = Access(role="viewer", own_run=True)
MEMBER_OR_OWN = Access(role="member", own_run=True)
MEMBER_OR_DEVICE = Access(role="member", device=True)

# What clients of MLflow ask, under the address that they are given.
_MLFLOW, _FLOW_FILES = "/api/2.0/mlflow", "/api/2.0/mlflow-artifacts/artifacts"
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")

# Bodies are small; blobs and logs are read by their handlers, which have their own limits.
_MAX_BODY = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Route:
    """One URL. `body` is checked before the handler sees it.

    `expect`: asked first, when a client announces its body and waits to be told to send it.
    """

    method: str
    path: str
    who: Access
    handler: Handler
    body: type | None = None
    expect: Callable[[web.Request], Awaitable[None]] | None = None


def table(broker: "Broker") -> Sequence[Route]:
    """One line per URL, and with it the least role: there is no other way to be served."""
    itself, agent, blob = about.Handlers(broker), agents.Handlers(broker), blobs.Handlers(broker)
    run, device = runs.Handlers(broker), devices.Handlers(broker)
    account, cluster = accounts.Handlers(broker), clusters.Handlers(broker)
    stored, log = storage.Handlers(broker), logs.Handlers(broker)
    provider, track = oidc.Handlers(broker), tracking.Handlers(broker)
    mlflows, dashboard = mlflow.Handlers(broker), pages.Handlers()
    browser, screen = session.Handlers(broker), watch.Handlers(broker)
    flow = workflows.Handlers(broker)

    async def describe(_: Call) -> Any:
        """This document."""
        return document

    routes = (
        Route("GET", "/", ANYBODY, dashboard.page),
        Route("GET", "/web/{digest}/{file}", ANYBODY, dashboard.file),
        Route("POST", "/v1/session", ANYBODY, browser.sign_in, session.SignIn),
        Route("GET", "/v1/session", VIEWER, browser.show),
        Route("DELETE", "/v1/session", VIEWER, browser.sign_out),
        Route("GET", "/v1/health", ANYBODY, itself.health),
        Route("GET", "/v1/openapi.json", ANYBODY, describe),
        Route("GET", "/v1/ca", ANYBODY, itself.ca),
        Route("GET", "/v1/oidc", ANYBODY, provider.show),
        Route("GET", "/v1/oidc/start", ANYBODY, provider.start),
        Route("GET", "/v1/oidc/callback", ANYBODY, provider.callback),
        Route("POST", "/v1/oidc/key", ANYBODY, provider.key, oidc.KeyBody),
        Route("POST", "/v1/enrol", ANYBODY, agent.enrol, EnrolRequest),
        Route("POST", "/v1/agent/challenge", ANYBODY, agent.challenge),
        Route("POST", "/v1/agent/recover", ANYBODY, agent.recover, RecoverRequest),
        Route("POST", "/v1/agent/hello", DEVICE, agent.hello, agents.Hello),
        Route("POST", "/v1/agent/renew", DEVICE, agent.renew, RenewRequest),
        Route("POST", "/v1/agent/resync", DEVICE, agent.resync, agents.Resync),
        Route("PUT", "/v1/agent/logs/{task}/{epoch}/{stream}", DEVICE, agent.put_log),
        Route("HEAD", "/v1/blobs/{sha256}", VIEWER_OR_DEVICE, blob.head_blob),
        Route("GET", "/v1/blobs/{sha256}", VIEWER_OR_DEVICE, blob.get_blob),
        Route(
            "PUT", "/v1/blobs/{sha256}", MEMBER_OR_DEVICE, blob.put_blob, expect=blob.expect_blob
        ),
        Route("POST", "/v1/blobs/missing", MEMBER, blob.missing_blobs, blobs.Asked),
        Route("POST", "/v1/launch", MEMBER, run.launch, LaunchRequest),
        Route("POST", "/v1/launch/match", MEMBER, run.match_launch, LaunchRequest),
        Route("POST", "/v1/federate", MEMBER, run.federate, FederateRequest),
        Route("POST", "/v1/federate/match", MEMBER, run.match_federate, MachinesRequest),
        Route("GET", "/v1/runs", VIEWER, run.list_runs),
        Route("GET", "/v1/queue", VIEWER, run.list_queue),
        Route("GET", "/v1/runs/{run}", VIEWER_OR_OWN, run.show_run),
        Route("DELETE", "/v1/runs/{run}", ADMIN, run.remove_run),
        Route("GET", "/v1/runs/{run}/follow", VIEWER_OR_OWN, run.follow_run),
        Route("GET", "/v1/runs/{run}/logs", VIEWER_OR_OWN, log.search_logs),
        Route("GET", "/v1/runs/{run}/clients", VIEWER, run.show_clients),
        Route("POST", "/v1/runs/{run}/stop", MEMBER_OR_OWN, run.stop_run),
        Route("PUT", "/v1/runs/{run}/priority", MEMBER, run.set_priority, runs.PriorityBody),
        Route("GET", "/v1/workflows", VIEWER, flow.list_workflows),
        Route("POST", "/v1/workflows", MEMBER, flow.submit_workflow, WorkflowRequest),
        Route("GET", "/v1/workflows/{workflow}", VIEWER, flow.show_workflow),
        Route("DELETE", "/v1/workflows/{workflow}", ADMIN, flow.remove_workflow),
        Route("GET", "/v1/workflows/{workflow}/follow", VIEWER, flow.follow_workflow),
        Route("POST", "/v1/workflows/{workflow}/stop", MEMBER, flow.stop_workflow),
        Route("POST", "/v1/workflows/{workflow}/resume", MEMBER, flow.resume_workflow, ResumeBody),
        Route("GET", "/v1/clusters", VIEWER, cluster.list_clusters),
        Route("POST", "/v1/clusters", MEMBER, cluster.create_cluster, ClusterRequest),
        Route("GET", "/v1/clusters/{cluster}", VIEWER, cluster.show_cluster),
        Route("DELETE", "/v1/clusters/{cluster}", MEMBER, cluster.remove_cluster),
        Route("POST", "/v1/clusters/{cluster}/start", MEMBER, cluster.start_cluster),
        Route("POST", "/v1/clusters/{cluster}/stop", MEMBER, cluster.stop_cluster),
        Route(
            "PUT", "/v1/clusters/{cluster}/autostop", MEMBER, cluster.autostop_cluster, AutostopBody
        ),
        Route("GET", "/v1/storage", VIEWER, stored.list_objects),
        Route("GET", "/v1/storage/{name}", VIEWER, stored.show_object),
        Route("PUT", "/v1/storage/{name}", MEMBER, stored.put_object, PutObject),
        Route("DELETE", "/v1/storage/{name}", MEMBER, stored.remove_object),
        Route("GET", "/v1/runs/{run}/metrics", VIEWER, track.metrics),
        Route("GET", "/v1/runs/{run}/params", VIEWER, track.params),
        Route("GET", "/v1/runs/{run}/artifacts", VIEWER, track.artifacts),
        Route("POST", "/v1/tracked", MEMBER, track.track, tracking.TrackRequest),
        Route("PUT", "/v1/runs/{run}/records", MEMBER, track.put_records),
        Route("POST", "/v1/runs/{run}/end", MEMBER, track.end, tracking.EndRequest),
        Route("POST", f"{_MLFLOW}/experiments/create", MEMBER, mlflows.create_experiment),
        Route("GET", f"{_MLFLOW}/experiments/get", VIEWER, mlflows.get_experiment),
        Route("GET", f"{_MLFLOW}/experiments/get-by-name", VIEWER, mlflows.get_experiment_by_name),
        Route("POST", f"{_MLFLOW}/experiments/search", VIEWER, mlflows.search_experiments),
        Route("GET", f"{_MLFLOW}/experiments/search", VIEWER, mlflows.search_experiments),
        Route("POST", f"{_MLFLOW}/experiments/update", MEMBER, mlflows.update_experiment),
        Route("POST", f"{_MLFLOW}/experiments/delete", MEMBER, mlflows.delete_experiment),
        Route("POST", f"{_MLFLOW}/experiments/restore", MEMBER, mlflows.restore_experiment),
        Route("POST", f"{_MLFLOW}/experiments/set-experiment-tag", MEMBER, mlflows.tag_experiment),
        Route("POST", f"{_MLFLOW}/runs/create", MEMBER, mlflows.create_run),
        Route("GET", f"{_MLFLOW}/runs/get", VIEWER, mlflows.get_run),
        Route("POST", f"{_MLFLOW}/runs/update", MEMBER, mlflows.update_run),
        Route("POST", f"{_MLFLOW}/runs/delete", MEMBER, mlflows.delete_run),
        Route("POST", f"{_MLFLOW}/runs/restore", MEMBER, mlflows.restore_run),
        Route("POST", f"{_MLFLOW}/runs/search", VIEWER, mlflows.search_runs),
        Route("POST", f"{_MLFLOW}/runs/log-metric", MEMBER, mlflows.log_metric),
        Route("POST", f"{_MLFLOW}/runs/log-parameter", MEMBER, mlflows.log_parameter),
        Route("POST", f"{_MLFLOW}/runs/set-tag", MEMBER, mlflows.set_tag),
        Route("POST", f"{_MLFLOW}/runs/delete-tag", MEMBER, mlflows.delete_tag),
        Route("POST", f"{_MLFLOW}/runs/log-batch", MEMBER, mlflows.log_batch),
        Route("GET", f"{_MLFLOW}/metrics/get-history", VIEWER, mlflows.history),
        Route("GET", f"{_MLFLOW}/artifacts/list", VIEWER, mlflows.list_artifacts),
        Route("POST", f"{_MLFLOW}/logged-models/search", VIEWER, mlflows.search_models),
        Route("GET", _FLOW_FILES, VIEWER, mlflows.list_proxied),
        Route("GET", f"{_FLOW_FILES}/{{path:.+}}", VIEWER, mlflows.get_artifact),
        Route("PUT", f"{_FLOW_FILES}/{{path:.+}}", MEMBER, mlflows.put_artifact),
        Route("GET", "/v1/watch", VIEWER, screen.watch),
        Route("GET", "/v1/devices", VIEWER, device.list_devices),
        Route("GET", "/v1/devices/{device}", VIEWER, device.show_device),
        Route("POST", "/v1/devices/{device}/labels", ADMIN, device.label_device, devices.Labels),
        Route("POST", "/v1/devices/{device}/drain", ADMIN, device.drain_device, devices.DrainBody),
        Route("POST", "/v1/devices/{device}/revoke", ADMIN, device.revoke_device),
        Route("DELETE", "/v1/devices/{device}", ADMIN, device.remove_device),
        Route("GET", "/v1/keys", ADMIN, account.list_keys),
        Route("POST", "/v1/keys", ADMIN, account.create_key, accounts.KeyRequest),
        Route("DELETE", "/v1/keys/{key}", ADMIN, account.revoke_key),
        Route("GET", "/v1/users", ADMIN, account.list_users),
        Route("POST", "/v1/users", ADMIN, account.create_user, accounts.UserRequest),
        Route("PUT", "/v1/users/{user}/role", ADMIN, account.set_role, accounts.RoleRequest),
        Route(
            "POST", "/v1/users/{user}/tokens", ADMIN, account.create_token, accounts.TokenRequest
        ),
        Route("DELETE", "/v1/users/{user}/tokens", ADMIN, account.revoke_tokens),
        Route("DELETE", "/v1/token", VIEWER, account.end_token),
        Route("GET", "/v1/audit", ADMIN, itself.list_audit),
        Route("GET", "/v1/whoami", VIEWER_OR_OWN, itself.whoami),
        Route("GET", "/v1/status", VIEWER, itself.status),
        Route("GET", "/metrics", SCRAPER, itself.metrics),
    )
    document = openapi(routes)
    return routes


def application(broker: "Broker", *around: Middleware) -> web.Application:
    """The aiohttp application that serves the table."""
    app = web.Application(middlewares=[*around, as_problems], client_max_size=_MAX_BODY)
    app.on_response_prepare.append(guard)
    callers = Callers(broker)
    for route in table(broker):
        answer = _endpoint(callers, route)
        app.router.add_route(route.method, route.path, answer, expect_handler=route.expect)
    return app


def _endpoint(callers: Callers, route: Route) -> Any:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        try:
            return await _answer(callers, route, request)
        except SignInRefused as refused:
            await callers.refused(request, refused)
            raise

    return endpoint


async def _answer(callers: Callers, route: Route, request: web.Request) -> web.StreamResponse:
    caller = None if route.who.anybody else await callers.caller(request)
    await _admit(callers, route.who, caller, request)
    body: Any = None
    if route.body is not None:
        body = msgspec.json.decode(await request.read() or b"{}", type=route.body)
    answer = await route.handler(Call(request, body, caller))
    if isinstance(answer, web.StreamResponse):
        return answer
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _admit(
    callers: Callers, who: Access, caller: User | Address | None, request: web.Request
) -> None:
    """Refuse whoever may not ask.

    Raises:
        Problem: 401 nobody is signed in, 403 the wrong kind of caller, or too small a role.
    """
    match caller:
        case _ if who.anybody:
            return
        case None if who.loopback and _from_here(request):
            return
        case None:
            raise Problem(
                401, "not signed in", "this needs a token or a certificate", "`fedml login KEY`"
            )
        case Address() if not who.device:
            raise Problem(403, "only people may do this", "a device's certificate was given")
        case User(run=str(own)):
            _admit_job(who, own, request)
        case User() if who.role is None:
            raise Problem(403, "only devices may do this", "a user's token was given")
        case User() if who.role is not None and not caller.may(who.role):
            raise Problem(
                403,
                f"this needs the role {who.role}",
                f"{caller.name} is a {caller.role} of {caller.tenant!r}",
                await callers.who_grants(caller, who.role),
            )


def _admit_job(who: Access, own: str, request: web.Request) -> None:
    """Refuse a job what is not about its own run.

    Raises:
        Problem: 403.
    """
    if not who.own_run or request.match_info.get("run", own) != own:
        raise Problem(
            403,
            "a job's key is for its own run",
            f"this is that of {own}",
            hint="a job that is to do more needs a user's key, among its `secrets`",
        )


def _from_here(request: web.Request) -> bool:
    """Whether it comes from this machine, and no proxy on it has passed it on for somebody else."""
    forwarded = any(name in request.headers for name in _FORWARDED)
    try:
        return not forwarded and ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


def openapi(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the table."""
    bodies = [route.body for route in routes if route.body is not None]
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "summary": (route.handler.__doc__ or "").strip().splitlines()[0],
            "operationId": getattr(route.handler, "__name__", route.path),
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in _variables(route.path)
            ],
            "responses": {
                "200": {"description": "done"},
                "default": {
                    "description": "what went wrong and what to do",
                    "content": {"application/problem+json": {"schema": _PROBLEM}},
                },
            },
            "security": _security(route.who),
        }
        if route.who.role is not None:
            operation["description"] = f"Users need the role {route.who.role} at least."
            operation["x-least-role"] = route.who.role
        if route.who.own_run:
            operation["description"] += " A job may ask it about its own run."
            operation["x-own-run"] = True
        if route.body is not None:
            reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            }
        paths.setdefault(_PATTERN.sub(r"{\1}", route.path), {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "fedml-broker", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "certificate": {"type": "mutualTLS"},
            },
        },
    }


def _security(who: Access) -> list[dict[str, list[str]]]:
    """Any one of these is enough; nothing: anybody."""
    ways = {"token": who.role is not None, "certificate": who.device}
    enough: list[dict[str, list[str]]] = [{name: []} for name, takes in ways.items() if takes]
    return [*enough, {}] if who.loopback else enough


# A variable that may contain slashes says so: {path:.+}.
_PATTERN = re.compile(r"\{(\w+):[^}]*\}")

_PROBLEM = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "hint": {"type": "string"},
    },
}


def _variables(path: str) -> list[str]:
    return [part[1:-1].partition(":")[0] for part in path.split("/") if part.startswith("{")]
