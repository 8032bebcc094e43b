# SPDX-License-Identifier: Apache-2.0
"""Browsers that are signed in: a cookie in place of the token, and what guards it.

The cookie cannot be read by scripts and is sent only over TLS and only by our own pages (HttpOnly,
Secure, SameSite=Strict). A request that changes something must besides name the session's CSRF
token, which other sites cannot read, and come from our own origin. A session ends by itself, with
the token that it was begun with, or by signing out; the store keeps a hash of its secret alone.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import sqlalchemy as sa
from aiohttp import web
from sqlalchemy import Connection

from fedml_broker import audit
from fedml_broker.accounts import Accounts, User
from fedml_broker.audit import SignInRefused
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import sessions, tokens, users
from fedml_protocol.errors import BadKey
from fedml_protocol.keys import SECRET_BYTES, Scope, parse_login_key

# With this prefix browsers refuse it from whoever is not this very host over TLS.
COOKIE = "__Host-fedml"
CSRF_HEADER = "X-CSRF-Token"
LASTS_S = 7 * 86400.0

_HARMLESS = ("GET", "HEAD")
_ASK = "ask an admin for a new key: `fedml-broker users token NAME`"


@dataclass(frozen=True, slots=True)
class Session:
    """One that has just begun; `secret` goes into the cookie and is kept nowhere else."""

    user: User
    secret: str
    lasts_s: float


class Sessions:
    """Begins, knows and ends sessions."""

    def __init__(self, store: Store, accounts: Accounts, *, url: str, ca_sha256: bytes) -> None:
        self._store = store
        self._accounts = accounts
        self._url = url
        self._ca_sha256 = ca_sha256

    async def begin(self, key: str, request: web.Request) -> Session:
        """Sign in with a user's key, or the bare token in it.

        Raises:
            Problem: 403 another site asks.
            SignInRefused: 401 no such key, or it has expired.
        """
        self._check_origin(request, needed=False)
        token = self._token(key.strip())
        user = self._accounts.authenticate(token)
        if user is None:
            raise SignInRefused(
                401, "unknown or expired key", "the broker does not know this key", _ASK
            )
        return await self.open(user, request, token=token)

    async def open(
        self,
        user: User,
        request: web.Request,
        *,
        token: bytes | None = None,
        lasts_s: float = LASTS_S,
    ) -> Session:
        """A session of somebody who has proved who he is.

        Args:
            token: By which he did; the session ends with it.
        """
        secret, now, lasts_s = secrets.token_urlsafe(32), time.time(), min(lasts_s, LASTS_S)
        row = {
            "secret_sha256": _hash(secret.encode()),
            "user": user.name,
            "token_sha256": None if token is None else _hash(token),
            "created_at": now,
            "expires_at": now + lasts_s,
        }

        def insert(tx: Connection) -> None:
            tx.execute(sessions.delete().where(sessions.c.expires_at < now))
            tx.execute(sessions.insert().values(row))
            whence = request.remote or ""
            audit.note(
                tx, user.tenant, audit.user(user.name), "session.begin", user.name, whence=whence
            )

        await self._store.write(insert)
        return Session(user, secret, lasts_s)

    async def caller(self, secret: str, request: web.Request) -> User:
        """The user of a session, if the request is really his.

        Raises:
            Problem: 401 the session has ended, 403 another site has made the request.
        """
        now = time.time()
        good = sa.or_(tokens.c.expires_at.is_(None), tokens.c.expires_at >= now)
        # A session that was begun without a token (by another way to sign in) needs none.
        held = sa.or_(
            sessions.c.token_sha256.is_(None), sa.and_(tokens.c.secret_sha256.is_not(None), good)
        )
        query = (
            sa.select(users.c.name, users.c.tenant, users.c.role)
            .join_from(sessions, users, sessions.c.user == users.c.name)
            .outerjoin(tokens, tokens.c.secret_sha256 == sessions.c.token_sha256)
            .where(
                sessions.c.secret_sha256 == _hash(secret.encode()),
                sessions.c.expires_at >= now,
                held,
            )
        )
        row = await self._store.read(lambda tx: tx.execute(query).first())
        if row is None:
            raise Problem(
                401,
                "you are signed out",
                "the session, or the key that it was begun with, has ended",
                hint="sign in again; " + _ASK,
            )
        if request.method not in _HARMLESS:
            self._check_origin(request, needed=True)
            named = request.headers.get(CSRF_HEADER, "")
            if not hmac.compare_digest(named.encode(), csrf_token(secret).encode()):
                raise Problem(
                    403,
                    "this request lacks the session's CSRF token",
                    f"the header {CSRF_HEADER} is missing or wrong",
                    hint="reload the page; a script uses `Authorization: Bearer` instead",
                )
        return User(row.name, row.tenant, row.role)

    async def token_sha256(self, request: web.Request) -> str:
        """The hash of the token that the browser's session was begun with; empty: none."""
        mine = sessions.c.secret_sha256 == _hash(request.cookies.get(COOKIE, "").encode())
        query = sa.select(sessions.c.token_sha256).where(mine)
        return await self._store.read(lambda tx: tx.execute(query).scalar()) or ""

    async def end(self, secret: str) -> None:
        """Sign out; again is harmless."""
        mine = sessions.c.secret_sha256 == _hash(secret.encode())

        def delete(tx: Connection) -> None:
            row = tx.execute(
                sa.select(users.c.name, users.c.tenant)
                .join_from(sessions, users, sessions.c.user == users.c.name)
                .where(mine)
            ).first()
            if row is not None:
                tx.execute(sessions.delete().where(mine))
                audit.note(tx, row.tenant, audit.user(row.name), "session.end", row.name)

        await self._store.write(delete)

    def _token(self, key: str) -> bytes:
        """The token in what somebody has pasted."""
        if len(key) == 2 * SECRET_BYTES:
            try:
                return bytes.fromhex(key)
            except ValueError:
                pass  # then it is no bare token, and the parser says what it should be
        try:
            found = parse_login_key(key, Scope.USER)
        except BadKey as error:
            raise SignInRefused(401, "this key cannot be used here", str(error), _ASK) from error
        if found.ca_sha256 != self._ca_sha256:
            raise SignInRefused(
                401, "this key is of another broker", f"it was made at {found.url}", _ASK
            )
        return found.secret

    def _check_origin(self, request: web.Request, *, needed: bool) -> None:
        """Refuse what a page of another site has sent."""
        origin = request.headers.get("Origin")
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        ours = {request.host, urlsplit(self._url).netloc}
        fits = not needed if origin is None else urlsplit(origin).netloc in ours
        if not fits or site != "same-origin":
            raise Problem(
                403,
                "another site has made this request",
                f"it comes from {origin or 'nowhere'}, not from {request.host}",
                hint="behind a proxy: have it pass on the header Host",
            )


def set_cookie(response: web.Response, session: Session) -> None:
    """Hand a session to the browser."""
    response.set_cookie(
        COOKIE,
        session.secret,
        max_age=int(session.lasts_s),
        path="/",
        secure=True,
        httponly=True,
        samesite="Strict",
    )


def csrf_token(secret: str) -> str:
    """What a page must say to change something: follows from the secret, which it cannot read."""
    return hmac.new(secret.encode(), b"fedml csrf 1", hashlib.sha256).hexdigest()


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
