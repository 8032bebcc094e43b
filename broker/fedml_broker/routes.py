# SPDX-License-Identifier: Apache-2.0
"""Every URL of the broker, who may ask it, and the OpenAPI document made from the same table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from fedml_broker.accounts import User
from fedml_broker.api import (
    Api,
    Call,
    DrainBody,
    Handler,
    Hello,
    KeyRequest,
    Labels,
    Resync,
    TokenRequest,
    UserRequest,
)
from fedml_broker.devices import EnrolRequest, RecoverRequest, RenewRequest
from fedml_broker.federate import FederateRequest
from fedml_broker.launch import LaunchRequest
from fedml_broker.problems import Problem, as_problems
from fedml_protocol.topics import Address

ANYBODY, DEVICE, MEMBER, ADMIN, SIGNED_IN = "anybody", "device", "member", "admin", "signed-in"

# Bodies are small; blobs and logs are read by their handlers, which have their own limits.
_MAX_BODY = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Route:
    """One URL. `body` is checked before the handler sees it."""

    method: str
    path: str
    who: str
    handler: Handler
    body: type | None = None


def table(api: Api) -> Sequence[Route]:
    """One line per URL."""
    return (
        Route("GET", "/v1/health", ANYBODY, api.health),
        Route("GET", "/v1/ca", ANYBODY, api.ca),
        Route("POST", "/v1/enrol", ANYBODY, api.enrol, EnrolRequest),
        Route("POST", "/v1/agent/challenge", ANYBODY, api.challenge),
        Route("POST", "/v1/agent/recover", ANYBODY, api.recover, RecoverRequest),
        Route("POST", "/v1/agent/hello", DEVICE, api.hello, Hello),
        Route("POST", "/v1/agent/renew", DEVICE, api.renew, RenewRequest),
        Route("POST", "/v1/agent/resync", DEVICE, api.resync, Resync),
        Route("PUT", "/v1/agent/logs/{task}/{epoch}/{stream}", DEVICE, api.put_log),
        Route("HEAD", "/v1/blobs/{sha256}", SIGNED_IN, api.head_blob),
        Route("GET", "/v1/blobs/{sha256}", SIGNED_IN, api.get_blob),
        Route("PUT", "/v1/blobs/{sha256}", SIGNED_IN, api.put_blob),
        Route("POST", "/v1/launch", MEMBER, api.launch, LaunchRequest),
        Route("POST", "/v1/launch/match", MEMBER, api.match_launch, LaunchRequest),
        Route("POST", "/v1/federate", MEMBER, api.federate, FederateRequest),
        Route("GET", "/v1/runs", MEMBER, api.list_runs),
        Route("GET", "/v1/runs/{run}", MEMBER, api.show_run),
        Route("DELETE", "/v1/runs/{run}", ADMIN, api.remove_run),
        Route("GET", "/v1/runs/{run}/follow", MEMBER, api.follow_run),
        Route("POST", "/v1/runs/{run}/stop", MEMBER, api.stop_run),
        Route("GET", "/v1/devices", MEMBER, api.list_devices),
        Route("GET", "/v1/devices/{device}", MEMBER, api.show_device),
        Route("POST", "/v1/devices/{device}/labels", ADMIN, api.label_device, Labels),
        Route("POST", "/v1/devices/{device}/drain", ADMIN, api.drain_device, DrainBody),
        Route("POST", "/v1/devices/{device}/revoke", ADMIN, api.revoke_device),
        Route("DELETE", "/v1/devices/{device}", ADMIN, api.remove_device),
        Route("GET", "/v1/keys", ADMIN, api.list_keys),
        Route("POST", "/v1/keys", ADMIN, api.create_key, KeyRequest),
        Route("DELETE", "/v1/keys/{key}", ADMIN, api.revoke_key),
        Route("GET", "/v1/users", ADMIN, api.list_users),
        Route("POST", "/v1/users", ADMIN, api.create_user, UserRequest),
        Route("POST", "/v1/users/{user}/tokens", ADMIN, api.create_token, TokenRequest),
        Route("GET", "/v1/whoami", MEMBER, api.whoami),
        Route("GET", "/v1/status", MEMBER, api.status),
    )


def application(api: Api) -> web.Application:
    """The aiohttp application that serves the table."""
    app = web.Application(middlewares=[as_problems], client_max_size=_MAX_BODY)
    routes = table(api)
    for route in routes:
        # An upload decides for itself whether it wants the body that the client announces.
        expect = api.expect_blob if route.handler == api.put_blob else None
        app.router.add_route(route.method, route.path, _endpoint(api, route), expect_handler=expect)
    document = msgspec.json.encode(openapi(routes))

    async def describe(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json")

    app.router.add_get("/v1/openapi.json", describe)
    return app


def _endpoint(api: Api, route: Route) -> Any:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        caller = None if route.who == ANYBODY else await api.caller(request)
        _admit(route.who, caller)
        body: Any = None
        if route.body is not None:
            body = msgspec.json.decode(await request.read() or b"{}", type=route.body)
        answer = await route.handler(Call(request, body, caller))
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    return endpoint


def _admit(who: str, caller: User | Address | None) -> None:
    """Refuse whoever may not ask.

    Raises:
        Problem: 401 nobody is signed in, 403 the wrong kind of caller or role.
    """
    if who == ANYBODY:
        return
    if caller is None:
        raise Problem(
            401, "not signed in", "this needs a token or a certificate", hint="`fedml login KEY`"
        )
    if who == DEVICE and not isinstance(caller, Address):
        raise Problem(403, "only devices may do this", "a user's token was given")
    if who in (MEMBER, ADMIN) and not isinstance(caller, User):
        raise Problem(403, "only people may do this", "a device's certificate was given")
    if who == ADMIN and isinstance(caller, User) and caller.role != "admin":
        raise Problem(403, "only an admin may do this", f"{caller.name} is a {caller.role}")


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
            "security": [] if route.who == ANYBODY else [{_SCHEME[route.who]: []}],
        }
        if route.body is not None:
            reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            }
        paths.setdefault(route.path, {})[route.method.lower()] = operation
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


_SCHEME = {DEVICE: "certificate", MEMBER: "token", ADMIN: "token", SIGNED_IN: "token"}
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
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]
