# SPDX-License-Identifier: Apache-2.0
"""A small OpenID Connect provider on loopback: discovery, authorize, token, keys.

    async with OidcProvider() as provider:
        provider.claims = {"sub": "1", "preferred_username": "lee"}   # who signs in next
        query = provider.approve(url)     # what the person's click at `url` leads to
        provider.change = {"aud": "other"}                            # spoil the next ID token

It is strict where a real one is: the client's secret, the redirect and the PKCE verifier must fit,
and a code is good once.
"""

import base64
import hashlib
import secrets
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Self
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from aiohttp import web
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey


@cache
def _first_key() -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": "k1", "use": "sig"})


class OidcProvider:
    """See the module. `sign` makes the next ID token of its claims."""

    client_id = "fedml"
    secret = "a client's secret"

    def __init__(self) -> None:
        self.claims: dict[str, Any] = {"sub": "1", "preferred_username": "lee"}
        self.change: dict[str, Any] = {}
        self.key = _first_key()
        self.sign: Callable[[dict[str, Any]], str] = self.sign_as(self.key)
        self.keys_asked = 0
        self._codes: dict[str, dict[str, str]] = {}
        self._runner: web.AppRunner
        self.issuer = ""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", self._metadata)
        app.router.add_get("/keys", self._keys)
        app.router.add_post("/token", self._token)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.issuer = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def approve(self, url: str) -> dict[str, str]:
        """The person has said yes at the authorization endpoint; the query of the redirect."""
        asked = dict(parse_qsl(urlsplit(url).query))
        assert url.startswith(self.issuer + "/authorize?")
        assert (asked["response_type"], asked["client_id"]) == ("code", self.client_id)
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        code = secrets.token_hex(8)
        self._codes[code] = asked
        return {"code": code, "state": asked["state"], "iss": self.issuer}

    @staticmethod
    def sign_as(key: RSAKey) -> Callable[[dict[str, Any]], str]:
        """Tokens signed by this key."""
        return lambda claims: jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)

    async def _metadata(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/keys",
            }
        )

    async def _keys(self, _: web.Request) -> web.Response:
        self.keys_asked += 1
        return web.json_response(KeySet([self.key]).as_dict(private=False))

    async def _token(self, request: web.Request) -> web.Response:
        form = await request.post()
        asked = self._codes.pop(str(form["code"]), None)
        basic = base64.b64decode(request.headers["Authorization"].removeprefix("Basic ")).decode()
        who = [unquote_plus(part) for part in basic.split(":")]
        challenge = hashlib.sha256(str(form["code_verifier"]).encode()).digest()
        if (
            asked is None
            or who != [self.client_id, self.secret]
            or form["redirect_uri"] != asked["redirect_uri"]
            or base64.urlsafe_b64encode(challenge).decode().rstrip("=") != asked["code_challenge"]
        ):
            return web.json_response({"error": "invalid_grant"}, status=400)
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": self.client_id,
            "iat": now,
            "exp": now + 300,
            "nonce": asked["nonce"],
            **self.claims,
            **self.change,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        token = self.sign(claims)
        return web.json_response({"access_token": "x", "token_type": "Bearer", "id_token": token})
