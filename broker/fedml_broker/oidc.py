# SPDX-License-Identifier: Apache-2.0
"""People sign in with an OpenID Connect provider: authorization code flow with PKCE.

    browser ── start ──► broker ──► provider ──► callback ── code ──► provider ──► ID token

What is believed is the ID token alone (OpenID Connect Core 1.0, 3.1.3.7): signed by a key of the
provider with an asymmetric algorithm, for this client, not over, with the nonce of this very
sign-in. A person is known by (issuer, subject); a name alone never makes him somebody who is here
already, unless the admin has said that it does (`known_only`). Nobody but the provider is asked.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote_plus, urlencode, urlsplit

import aiohttp
import sqlalchemy as sa
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from sqlalchemy import Connection

from fedml_broker import audit
from fedml_broker.accounts import ROLES, Accounts, User
from fedml_broker.audit import SignInRefused
from fedml_broker.handover import Terminal
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT, sign_ins, users
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id

CALLBACK = "/v1/oidc/callback"

# Asymmetric ones only: with a symmetric algorithm, or none, anybody could make a token.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
# How far the provider's clock may be from ours.
_SKEW_S = 60
_STATE_S = 600.0
_MAX_PENDING = 10_000
# A key that we do not know makes us ask for the keys again, this often at most.
_KEYS_AGAIN_S = 30.0
_MAX_ANSWER = 1 << 20
_NAME = re.compile(r"[^a-z0-9-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Who is in this group of the provider's has this role in this tenant; "*": everybody."""

    group: str
    role: str
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """What the admin has said of the provider.

    Attributes:
        secret: Of the client; empty for a public one.
        known_only: Only users that an admin has made may come, under the name in `name_claim`.
        token_days: How long the key that a sign-in gives is good.
    """

    issuer: str
    client_id: str
    secret: str = field(default="", repr=False)
    grants: tuple[Grant, ...] = ()
    group_claim: str = "groups"
    name_claim: str = "preferred_username"
    scope: str = "openid profile email"
    known_only: bool = False
    token_days: float = 0.5

    def __post_init__(self) -> None:
        parts = urlsplit(self.issuer)
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and here)):
            raise ValueError(f"the issuer must be an https:// URL, got {self.issuer!r}")
        if not self.client_id:
            raise ValueError("the provider's client id is missing")
        if not self.grants and not self.known_only:
            raise ValueError("nobody is granted a role: name a group, or '*' for everybody")
        for grant in self.grants:
            if grant.role not in ROLES:
                raise ValueError(f"{grant.role!r} is none of {', '.join(ROLES)}")
            try:
                check_id(grant.tenant, "tenant")
            except MalformedMessage as error:
                raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Pending:
    """One sign-in that has begun. `browser`: the hash of what its cookie must hold."""

    nonce: str
    verifier: str
    browser: bytes
    ends_at: float
    terminal: Terminal | None
    to_dashboard: bool


class SignIns:
    """Begins sign-ins and ends them. Pending ones are in memory: a restart asks to begin again."""

    def __init__(
        self,
        provider: Provider,
        store: Store,
        accounts: Accounts,
        *,
        url: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.provider = provider
        self._store = store
        self._accounts = accounts
        self._callback = url + CALLBACK
        self._clock = clock
        self._wall = wall
        self._pending: dict[str, _Pending] = {}
        self._metadata: dict[str, Any] = {}
        self._keys: KeySet | None = None
        self._keys_at = 0.0
        self._fetching = asyncio.Lock()

    async def start(
        self, terminal: Terminal | None = None, *, to_dashboard: bool = False
    ) -> tuple[str, str]:
        """Where the browser goes, and what its cookie holds meanwhile.

        Args:
            terminal: Where the person has begun, if it was not in the browser.
            to_dashboard: He wants to be signed in there, and no key.

        Raises:
            Problem: 502 the provider does not answer, 503 too many sign-ins.
        """
        found = await self._discover()
        now = self._clock()
        if len(self._pending) >= _MAX_PENDING:
            self._pending = {s: p for s, p in self._pending.items() if p.ends_at > now}
        if len(self._pending) >= _MAX_PENDING:
            raise Problem(503, "too many sign-ins at once", "try again in some minutes")
        state, nonce, verifier, browser = (secrets.token_urlsafe(32) for _ in range(4))
        self._pending[state] = _Pending(
            nonce, verifier, _sha256(browser), now + _STATE_S, terminal, to_dashboard
        )
        challenge = base64.urlsafe_b64encode(_sha256(verifier)).decode().rstrip("=")
        query = {
            "response_type": "code",
            "client_id": self.provider.client_id,
            "redirect_uri": self._callback,
            "scope": self.provider.scope,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        endpoint = str(found["authorization_endpoint"])
        return endpoint + ("&" if "?" in endpoint else "?") + urlencode(query), browser

    def terminal(self, query: Mapping[str, str]) -> Terminal | None:
        """Where the person has begun who comes back from the provider."""
        pending = self._pending.get(query.get("state", ""))
        return None if pending is None else pending.terminal

    def to_dashboard(self, query: Mapping[str, str]) -> bool:
        """Whether he wants to go there."""
        pending = self._pending.get(query.get("state", ""))
        return pending is not None and pending.to_dashboard

    async def key(self, user: User) -> str:
        """A key of somebody who has signed in."""
        by = audit.user(user.name)
        return await self._accounts.create_token(user.name, self.provider.token_days, by=by)

    async def finish(self, query: Mapping[str, str], browser: str) -> User:
        """Who has come back from the provider.

        Raises:
            SignInRefused: 400 not a sign-in of this browser, 401 what the provider says does not
                hold, 403 the person has no role here.
            Problem: 502 the provider does not answer.
        """
        pending = self._pending.pop(query.get("state", ""), None)
        if pending is None or pending.ends_at < self._clock():
            raise _refused(400, "this sign-in is not known", "it is over, or was used already")
        if not hmac.compare_digest(pending.browser, _sha256(browser)):
            raise _refused(400, "this sign-in was begun elsewhere", "by another browser")
        if query.get("iss", self.provider.issuer) != self.provider.issuer:  # RFC 9207
            raise _refused(401, "another provider has answered", query["iss"][:200])
        if "code" not in query:
            said = query.get("error_description") or query.get("error", "without a reason")
            raise _refused(401, "the provider has refused", said[:200])
        claims = await self._claims(query["code"], pending)
        return await self._store.write(lambda tx: self._enter(tx, claims))

    # ------------------------------------------------------------------ the ID token

    async def _claims(self, code: str, pending: _Pending) -> dict[str, Any]:
        found = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._callback,
            "client_id": self.provider.client_id,
            "code_verifier": pending.verifier,
        }
        headers = {}
        methods = found.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if self.provider.secret and "client_secret_basic" in methods:
            headers = _basic(self.provider.client_id, self.provider.secret)
        elif self.provider.secret:
            form["client_secret"] = self.provider.secret
        answer = await self._ask("POST", str(found["token_endpoint"]), form, headers)
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise _refused(401, "the provider has refused", str(answer.get("error", "no ID token")))
        claims = await self._verified(token)
        if claims.get("nonce") != pending.nonce:
            raise _refused(401, "the ID token is of another sign-in", "its nonce is wrong")
        return claims

    async def _verified(self, token: str) -> dict[str, Any]:
        """The claims of an ID token that is the provider's, for us, and good now."""
        registry = jwt.JWTClaimsRegistry(
            now=lambda: int(self._wall()),
            leeway=_SKEW_S,
            iss={"essential": True, "value": self.provider.issuer},
            aud={"essential": True, "value": self.provider.client_id},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )
        try:
            try:
                decoded = jwt.decode(token, await self._key_set(), algorithms=_ALGORITHMS)
            except InvalidKeyIdError:  # the provider may have new keys
                decoded = jwt.decode(token, await self._key_set(newer=True), algorithms=_ALGORITHMS)
            registry.validate(decoded.claims)
        except (JoseError, ValueError) as error:
            raise _refused(401, "the provider's ID token does not hold", str(error)) from error
        claims = dict(decoded.claims)
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1
        if (several or "azp" in claims) and claims.get("azp") != self.provider.client_id:
            raise _refused(401, "the ID token is for another client", "its azp is not ours")
        if not isinstance(claims["sub"], str) or not claims["sub"]:
            raise _refused(401, "the ID token names nobody", "sub is not a text")
        return claims

    async def _key_set(self, *, newer: bool = False) -> KeySet:
        async with self._fetching:
            old = newer and self._clock() - self._keys_at > _KEYS_AGAIN_S
            if self._keys is None or old:
                found = await self._ask("GET", str(self._metadata["jwks_uri"]))
                self._keys = KeySet.import_key_set(found)  # type: ignore[arg-type]
                self._keys_at = self._clock()
            return self._keys

    # ------------------------------------------------------------------ who it is here

    def _enter(self, tx: Connection, claims: Mapping[str, Any]) -> User:
        """The user behind the claims, made or changed as the provider's groups say."""
        issuer, subject = self.provider.issuer, claims["sub"]
        grants = self._granted(claims)
        mine = sa.and_(sign_ins.c.issuer == issuer, sign_ins.c.subject == subject)
        known = tx.execute(sa.select(sign_ins.c.user).where(mine)).scalar()
        name = self._name(claims) if known is None else known
        row = tx.execute(sa.select(users).where(users.c.name == name)).first()
        if known is None:
            self._check_newcomer(tx, name, exists=row is not None)
            values = {"issuer": issuer, "subject": subject, "user": name}
            tx.execute(sign_ins.insert(), {**values, "created_at": time.time()})
        if row is None:
            user = self._made(tx, name, grants)
        else:
            user = self._changed(tx, User(row.name, row.tenant, row.role), grants)
        audit.note(tx, user.tenant, audit.user(name), "user.sign-in", name, issuer=issuer)
        return user

    def _check_newcomer(self, tx: Connection, name: str, *, exists: bool) -> None:
        """Somebody is here for the first time: may he have this name?"""
        taken = sa.select(sign_ins.c.user).where(sign_ins.c.user == name)
        if self.provider.known_only and not exists:
            raise _refused(
                403,
                "you are not a user here",
                f"{name!r} is unknown",
                "ask an admin: `fedml-broker users create`",
            )
        if exists and (not self.provider.known_only or tx.execute(taken).first() is not None):
            raise _refused(
                403,
                "this name is another user's",
                f"{name!r} is here already, and is not who signs in now",
                "ask for another name at the provider",
            )

    def _made(self, tx: Connection, name: str, grants: Sequence[Grant]) -> User:
        """A new user, of the tenant of the first grant that fits him."""
        tenant = grants[0].tenant if grants else DEFAULT_TENANT
        user = User(name, tenant, _highest(grants, tenant))
        row = {"name": name, "tenant": user.tenant, "role": user.role, "created_at": time.time()}
        tx.execute(users.insert(), row)
        facts = {"role": user.role, "issuer": self.provider.issuer}
        audit.note(tx, user.tenant, audit.BROKER, "user.create", name, **facts)
        return user

    def _changed(self, tx: Connection, user: User, grants: Sequence[Grant]) -> User:
        """The user with the role that he has at the provider now, in the tenant that he is of."""
        if not self.provider.grants:
            return user
        role = _highest(grants, user.tenant)
        if role != user.role:
            tx.execute(users.update().where(users.c.name == user.name).values(role=role))
            facts = {"role": role, "before": user.role}
            audit.note(tx, user.tenant, audit.BROKER, "user.role", user.name, **facts)
        return User(user.name, user.tenant, role)

    def _granted(self, claims: Mapping[str, Any]) -> list[Grant]:
        """The grants that fit the groups in the claims."""
        told = claims.get(self.provider.group_claim)
        groups = [told] if isinstance(told, str) else told if isinstance(told, list) else []
        return [g for g in self.provider.grants if g.group == "*" or g.group in groups]

    def _name(self, claims: Mapping[str, Any]) -> str:
        told = claims.get(self.provider.name_claim)
        name = _NAME.sub("-", str(told or "").partition("@")[0].lower()).strip("-")[:40]
        if not name:
            raise _refused(
                401,
                "the provider does not say who you are",
                f"the claim {self.provider.name_claim!r} is missing or has no letters",
            )
        return name

    # ------------------------------------------------------------------ the provider

    async def _discover(self) -> dict[str, Any]:
        """The provider's metadata (OpenID Connect Discovery 1.0), kept once it has been read."""
        if not self._metadata:
            url = self.provider.issuer.rstrip("/") + "/.well-known/openid-configuration"
            found = await self._ask("GET", url)
            needed = ("authorization_endpoint", "token_endpoint", "jwks_uri")
            if found.get("issuer") != self.provider.issuer:
                raise _failed(f"it calls itself {found.get('issuer')!r}")
            scheme = urlsplit(self.provider.issuer).scheme + "://"
            if lacking := [n for n in needed if not str(found.get(n)).startswith(scheme)]:
                raise _failed(f"its metadata lacks {', '.join(lacking)} with {scheme}")
            self._metadata = found
        return self._metadata

    async def _ask(
        self,
        method: str,
        url: str,
        form: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(
                    method, url, data=form, headers=headers, allow_redirects=False
                ) as response,
            ):
                body = await response.content.read(_MAX_ANSWER)
                found = json.loads(body)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _failed(f"{url}: {str(error) or type(error).__name__}") from error
        if not isinstance(found, dict) or (response.status != 200 and "error" not in found):
            raise _failed(f"{url} answers {response.status}")
        return found


def parse_grants(given: Sequence[str]) -> tuple[Grant, ...]:
    """`GROUP=ROLE` or `GROUP=ROLE@TENANT`, each.

    Raises:
        ValueError: Neither.
    """
    found = []
    for text in given:
        group, equals, rest = text.rpartition("=")
        role, _, tenant = rest.partition("@")
        if not equals or not group or role not in ROLES:
            raise ValueError(f"{text!r} is not GROUP=ROLE or GROUP=ROLE@TENANT")
        found.append(Grant(group=group, role=role, tenant=tenant or DEFAULT_TENANT))
    return tuple(found)


def _highest(grants: Sequence[Grant], tenant: str) -> str:
    """The highest role that these grant in a tenant.

    Raises:
        SignInRefused: 403, they grant none.
    """
    roles = [grant.role for grant in grants if grant.tenant == tenant]
    if not roles:
        raise _refused(
            403,
            "you have no role here",
            f"none of your groups has one in {tenant!r}",
            "ask an admin",
        )
    return max(roles, key=ROLES.index)


def _basic(client_id: str, secret: str) -> dict[str, str]:
    """How a client says who it is (RFC 6749, 2.3.1: both encoded as in a form)."""
    pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _refused(status: int, title: str, detail: str, hint: str = "") -> SignInRefused:
    return SignInRefused(status, title, detail, hint or "begin again at /v1/oidc/start")


def _failed(why: str) -> Problem:
    return Problem(
        502,
        "the sign-in provider cannot be used",
        why,
        hint="`--oidc-issuer` must be what the provider calls itself, and be reachable from here",
    )
