# SPDX-License-Identifier: Apache-2.0
"""Signing in with an OpenID Connect provider."""

from html import escape
from typing import TYPE_CHECKING, Any

from aiohttp import web

from fedml_broker.api.call import Call
from fedml_broker.problems import Problem

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


class Handlers:
    """For people who come with a browser."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def start(self, call: Call) -> Any:
        """Send the browser to the provider."""
        where, secret = await self._sign_ins().start()
        response = web.Response(status=302, headers={"Location": where, **_NOT_KEPT})
        response.set_cookie(
            _COOKIE, secret, max_age=600, path="/", secure=True, httponly=True, samesite="Lax"
        )
        return response

    async def callback(self, call: Call) -> Any:
        """The browser comes back from the provider; answers with a page that shows a user's key."""
        sign_ins, http = self._sign_ins(), call.http
        user, key = await sign_ins.finish(http.query, http.cookies.get(_COOKIE, ""))
        hours = sign_ins.provider.token_days * 24
        known = {"name": user.name, "role": user.role, "tenant": user.tenant, "key": key}
        page = _PAGE.format(hours=hours, **{name: escape(text) for name, text in known.items()})
        response = web.Response(text=page, content_type="text/html", headers=_NOT_KEPT)
        response.del_cookie(_COOKIE, path="/", secure=True, httponly=True, samesite="Lax")
        return response

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
