# SPDX-License-Identifier: Apache-2.0
"""Signing in and out with a browser."""

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from fedml_broker.accounts import User
from fedml_broker.api.call import Call
from fedml_broker.sessions import COOKIE, csrf_token, set_cookie

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class SignIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user's key (``fedml1u_…``), or the bare token in it."""

    key: str


class Handlers:
    """For the dashboard."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def sign_in(self, call: Call) -> Any:
        """Begin a session: sets a cookie, and answers with the CSRF token for what changes."""
        session = await self._broker.sessions.begin(call.body.key, call.http)
        response = _json(_describe(session.user, session.secret))
        set_cookie(response, session)
        return response

    async def show(self, call: Call) -> Any:
        """Who is signed in, and the session's CSRF token."""
        return _json(_describe(call.user, call.http.cookies.get(COOKIE, "")))

    async def sign_out(self, call: Call) -> Any:
        """End the session of this browser."""
        if (secret := call.http.cookies.get(COOKIE)) is not None:
            await self._broker.sessions.end(secret)
        response = _json({})
        response.del_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="Strict")
        return response


def _describe(user: User, secret: str) -> dict[str, str]:
    csrf = csrf_token(secret) if secret else ""
    return {"name": user.name, "tenant": user.tenant, "role": user.role, "csrf": csrf}


def _json(value: Any) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
