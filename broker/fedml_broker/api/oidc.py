# SPDX-License-Identifier: Apache-2.0
"""Signing in with an OpenID Connect provider."""

from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from fedml_broker.api.call import Call
from fedml_broker.audit import SignInRefused
from fedml_broker.handover import Handovers, terminal
from fedml_broker.problems import Problem
from fedml_broker.sessions import set_cookie

if TYPE_CHECKING:
    from fedml_broker.app import Broker
    from fedml_broker.oidc import SignIns

# Binds a sign-in to the browser that began it. Lax: the provider's redirect must bring it along.
_COOKIE = "__Host-fedml-sign-in"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Signed in</title>
<body style="font: 16px/1.5 system-ui; max-width: 44rem; margin: 4rem auto; padding: 0 1rem">
<h1>Signed in as {name}</h1>
<p>A {role} of {tenant}. On your machine, for the next {hours:g} hours:</p>
<pre style="white-space: pre-wrap; overflow-wrap: anywhere">fedml login {key}</pre>
<p>The key is shown this once. Close this page when you have it.</p>
</body></html>
"""


class KeyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a terminal shows for its key."""

    code: str
    verifier: str


class Handlers:
    """For people who come with a browser."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker
        self._handovers = Handovers()

    async def show(self, call: Call) -> Any:
        """Where people may sign in: the provider's host, if this broker knows one."""
        known = self._broker.sign_ins
        return {"provider": None if known is None else urlsplit(known.provider.issuer).netloc}

    async def start(self, call: Call) -> Any:
        """Send the browser to the provider.

        Query: of `fedml login`, `port challenge state`; of the dashboard, `to=dashboard`.
        """
        query = call.http.query
        to_dashboard = query.get("to") == "dashboard"
        where, secret = await self._sign_ins().start(terminal(query), to_dashboard=to_dashboard)
        response = web.Response(status=302, headers={"Location": where, **_NOT_KEPT})
        response.set_cookie(
            _COOKIE, secret, max_age=600, path="/", secure=True, httponly=True, samesite="Lax"
        )
        return response

    async def callback(self, call: Call) -> Any:
        """The browser comes back: a page with a key, or on to the terminal or the dashboard."""
        sign_ins, http = self._sign_ins(), call.http
        begun_at, to_dashboard = sign_ins.terminal(http.query), sign_ins.to_dashboard(http.query)
        try:
            user = await sign_ins.finish(http.query, http.cookies.get(_COOKIE, ""))
        except SignInRefused as refused:
            if begun_at is None:
                raise
            await self._broker.refusals.note(refused, http.remote or "")
            return _on(begun_at.url(error=str(refused), hint=refused.hint))
        if begun_at is not None:
            ca = self._broker.identity.ca_sha256.hex()
            return _on(begun_at.url(code=self._handovers.code(user, begun_at), ca=ca))
        if to_dashboard:
            response = _on("/")
            lasts_s = sign_ins.provider.token_days * 86400
            set_cookie(response, await self._broker.sessions.open(user, http, lasts_s=lasts_s))
            return response
        key, hours = await sign_ins.key(user), sign_ins.provider.token_days * 24
        known = {"name": user.name, "role": user.role, "tenant": user.tenant, "key": key}
        page = _PAGE.format(hours=hours, **{name: escape(text) for name, text in known.items()})
        return _without_cookie(web.Response(text=page, content_type="text/html", headers=_NOT_KEPT))

    async def key(self, call: Call) -> Any:
        """The key of somebody who has signed in, for the terminal where he began."""
        sign_ins, body = self._sign_ins(), call.body
        user = self._handovers.redeem(body.code, body.verifier)
        return {"key": await sign_ins.key(user), "hours": sign_ins.provider.token_days * 24}

    def _sign_ins(self) -> "SignIns":
        found = self._broker.sign_ins
        if found is None:
            raise Problem(
                404,
                "no sign-in provider",
                "this broker knows no OpenID Connect provider",
                hint="`fedml login KEY`; its admin can name one: `fedml-broker up --oidc-issuer`",
            )
        return found


_NOT_KEPT = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
}


def _on(url: str) -> web.Response:
    """The browser goes on to where he has begun."""
    return _without_cookie(web.Response(status=302, headers={"Location": url, **_NOT_KEPT}))


def _without_cookie(response: web.Response) -> web.Response:
    response.del_cookie(_COOKIE, path="/", secure=True, httponly=True, samesite="Lax")
    return response
