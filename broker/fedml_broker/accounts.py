# SPDX-License-Identifier: Apache-2.0
"""Users and their tokens, and the keys with which machines join.

Secrets are kept as SHA-256 only: 24 random bytes need no slow hash. A secret is shown once, when it
is made.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit
from fedml_broker.audit import SignInRefused
from fedml_broker.prepared import Prepared, given
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT, login_keys, sessions, tokens, users
from fedml_protocol.errors import BadKey, MalformedMessage
from fedml_protocol.ids import check_id
from fedml_protocol.keys import SECRET_BYTES, LoginKey, Scope, parse_login_key

# Ascending: each may do what those before it may.
#   viewer   sees everything of the tenant, changes nothing
#   member   runs things, and stops them
#   admin    manages users, keys and machines, and deletes
ROLES = ("viewer", "member", "admin")

# Of a job that asks with the key of its run: it sees and stops this run, and nothing else.
OWN_RUN = "run"

# Where the job finds it.
RUN_KEY = "FEDML_RUN_API_KEY"


@dataclass(frozen=True, slots=True)
class User:
    """Who asks.

    Attributes:
        run: It is not he himself, but a job of his, of this run. Its role is `OWN_RUN`.
        expires_at: When the token ends that he came with; None: never.
    """

    name: str
    tenant: str
    role: str
    run: str | None = None
    expires_at: float | None = field(default=None, compare=False)

    def may(self, role: str) -> bool:
        """Whether his role is at least this one."""
        return self.role in ROLES and ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What a login key grants to the machine that used it; `key` is its id."""

    tenant: str
    labels: Mapping[str, str]
    key: str


# With every run.
_INSERT = Prepared(tokens.insert(), ("secret_sha256", "user", "created_at", "run"))
_FORGET = Prepared(tokens.delete().where(tokens.c.run == given("run_")))
# With every request.
_WHOSE = Prepared(
    sa.select(users.c.name, users.c.tenant, users.c.role, tokens.c.expires_at, tokens.c.run)
    .join(tokens, tokens.c.user == users.c.name)
    .where(tokens.c.secret_sha256 == given("secret"))
)


class Accounts:
    """Makes and checks secrets; `url` and `ca_sha256` go into each key."""

    def __init__(self, store: Store, *, url: str, ca_sha256: bytes) -> None:
        self._store = store
        self._url = url
        self._ca_sha256 = ca_sha256

    # ------------------------------------------------------------------ users

    async def create_user(
        self, name: str, role: str, tenant: str = DEFAULT_TENANT, *, by: str
    ) -> None:
        """Add a user.

        Args:
            by: Who does it, as the audit names him.

        Raises:
            Problem: 409 exists, 422 a name or role that cannot be.
        """
        _check_name(name, "user")
        _check_name(tenant, "tenant")
        _check_role(role)
        row = {"name": name, "tenant": tenant, "role": role, "created_at": time.time()}

        def insert(tx: Connection) -> None:
            tx.execute(users.insert().values(row))
            audit.note(tx, tenant, by, "user.create", name, role=role)

        try:
            await self._store.write(insert)
        except sa.exc.IntegrityError as error:
            raise Problem(409, "this user exists", f"there is a user {name!r} already") from error

    async def set_role(self, name: str, role: str, *, by: str, of: str | None = None) -> None:
        """Give a user another role. It counts from his next request on.

        Args:
            by: Who does it, as the audit names him.
            of: The tenant that the user must belong to; None: any.

        Raises:
            Problem: 404 no such user, 409 nobody could grant roles any more, 422 no such role.
        """
        _check_role(role)

        def change(tx: Connection) -> None:
            row = tx.execute(sa.select(users).where(users.c.name == name)).first()
            if row is None or (of is not None and row.tenant != of):
                raise _unknown(name)
            if row.role == role:
                return
            if row.role == "admin" and _admins(tx, row.tenant) == [name]:
                raise Problem(
                    409,
                    "a tenant needs an admin",
                    f"{name} is the only one of {row.tenant!r}",
                    hint="make another user an admin first",
                )
            tx.execute(users.update().where(users.c.name == name).values(role=role))
            audit.note(tx, row.tenant, by, "user.role", name, role=role, before=row.role)

        await self._store.write(change)

    async def admins(self, tenant: str) -> list[str]:
        """The admins of a tenant, by name."""
        return await self._store.read(lambda tx: _admins(tx, tenant))

    async def create_token(
        self, user: str, days: float | None = None, *, by: str, of: str | None = None
    ) -> str:
        """A new token of a user, as the one string that `fedml login` takes.

        Args:
            by: Who makes it, as the audit names him.
            of: The tenant that he must belong to; None: any.

        Raises:
            Problem: 404 no such user, also for another tenant's.
        """
        secret = secrets.token_bytes(SECRET_BYTES)
        now = time.time()
        ends = None if days is None else now + days * 86400
        row = {
            "secret_sha256": _hash(secret),
            "user": user,
            "created_at": now,
            "expires_at": ends,
        }

        def insert(tx: Connection) -> None:
            found = tx.execute(sa.select(users.c.tenant).where(users.c.name == user)).scalar()
            if found is None or (of is not None and found != of):
                raise _unknown(user)
            tx.execute(tokens.insert().values(row))
            audit.note(tx, found, by, "token.create", user, good_until=_moment(ends))

        await self._store.write(insert)
        return self._key(Scope.USER, secret)

    async def end_token(self, user: User, secret: bytes) -> None:
        """A token is good no more, nor what was begun with it. Again is harmless."""
        digest = _hash(secret)

        def end(tx: Connection) -> None:
            found = tx.execute(tokens.delete().where(tokens.c.secret_sha256 == digest))
            if found.rowcount:
                tx.execute(sessions.delete().where(sessions.c.token_sha256 == digest))
                audit.note(tx, user.tenant, audit.user(user.name), "token.end", user.name)

        await self._store.write(end)

    async def revoke_tokens(
        self, name: str, *, by: str, of: str | None = None, keep: str = ""
    ) -> int:
        """End all tokens and browser sessions of a user; how many tokens these were.

        The keys of his runs stay: his jobs go on.

        Args:
            by: Who does it, as the audit names him.
            of: The tenant that the user must belong to; None: any.
            keep: But not the one with this hash, nor what was begun with it.

        Raises:
            Problem: 404 no such user.
        """

        def end(tx: Connection) -> int:
            tenant = tx.execute(sa.select(users.c.tenant).where(users.c.name == name)).scalar()
            if tenant is None or (of is not None and tenant != of):
                raise _unknown(name)
            his = sa.and_(tokens.c.user == name, tokens.c.run.is_(None))
            count = tx.execute(tokens.delete().where(his, tokens.c.secret_sha256 != keep)).rowcount
            others = sa.func.coalesce(sessions.c.token_sha256, "-") != keep
            tx.execute(sessions.delete().where(sessions.c.user == name, others))
            audit.note(tx, tenant, by, "token.revoke", name, tokens=count)
            return count

        return await self._store.write(end)

    async def list_users(self, tenant: str) -> list[dict[str, Any]]:
        """The users of a tenant with the number of their tokens."""
        query = (
            sa.select(users, sa.func.count(tokens.c.secret_sha256).label("tokens"))
            .outerjoin(tokens, sa.and_(tokens.c.user == users.c.name, tokens.c.run.is_(None)))
            .where(users.c.tenant == tenant)
            .group_by(users.c.name)
            .order_by(users.c.name)
        )
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    def authenticate(self, secret: bytes, *, jobs: bool = False) -> User | None:
        """The user behind a token; None when it is unknown.

        Args:
            jobs: Whoever asks minds `User.run`: the key of a run is good, too.

        Raises:
            SignInRefused: 401, it has expired.
        """
        row = self._store.find(_WHOSE, secret=_hash(secret))
        if row is None:
            return None
        name, tenant, role, expires_at, run = row
        if run is not None and not jobs:
            return None
        if expires_at is not None and expires_at < time.time():
            raise SignInRefused(
                401,
                "this token has expired",
                f"it was {name}'s and good until {_moment(expires_at)}",
                "`fedml login` with a new key (`fedml-broker users token NAME`, or --oidc)",
                tenant=tenant,
                thing=name,
            )
        return User(name, tenant, OWN_RUN if run else role, run, expires_at)

    def run_key(self, user: User, run: str) -> tuple[str, Callable[[Connection], None]]:
        """A key for the job of a run, and what keeps its hash, in the transaction of that run.

        It is good until `forget_run_key`.
        """
        secret = secrets.token_bytes(SECRET_BYTES)
        row = {
            "secret_sha256": _hash(secret),
            "user": user.name,
            "created_at": time.time(),
            "run": run,
        }

        def keep(tx: Connection) -> None:
            _INSERT.run(tx, **row)

        return self._key(Scope.RUN, secret), keep

    async def user(self, name: str) -> User | None:
        """A user as he is at this moment; None: there is none of this name."""
        query = sa.select(users).where(users.c.name == name)
        row = await self._store.read(lambda tx: tx.execute(query).first())
        return None if row is None else User(row.name, row.tenant, row.role)

    async def still_fits(self, key: str) -> bool:
        """Whether a user's key is good, and names this broker as it can be reached now."""
        try:
            found = parse_login_key(key, Scope.USER)
            good = self.authenticate(found.secret) is not None
        except (BadKey, SignInRefused):
            return False
        return good and found.url == self._url and found.ca_sha256 == self._ca_sha256

    # ------------------------------------------------------------------ login keys

    async def create_key(
        self,
        by: User,
        *,
        uses: int | None,
        days: float | None,
        labels: Mapping[str, str],
        tenant: str = "",
    ) -> tuple[str, str]:
        """A key with which `uses` machines may join: its id, and the string to hand out.

        Args:
            tenant: To whom those machines belong; nobody: to the tenant of `by`.

        Raises:
            Problem: 422 a limit, label or tenant that cannot be.
        """
        tenant = tenant or by.tenant
        _check_name(tenant, "tenant")
        if uses is not None and uses < 1:
            raise Problem(422, "a key needs at least one use", f"got {uses}")
        if days is not None and not days > 0:
            raise Problem(422, "a key must expire in the future", f"got {days} days")
        check_labels(labels)
        secret = secrets.token_bytes(SECRET_BYTES)
        now = time.time()
        ends = None if days is None else now + days * 86400
        row = {
            "id": "k-" + secrets.token_hex(4),
            "secret_sha256": _hash(secret),
            "tenant": tenant,
            "labels": dict(labels),
            "uses": uses,
            "used": 0,
            "expires_at": ends,
            "revoked": False,
            "created_at": now,
            "created_by": by.name,
        }
        key_id = str(row["id"])

        def insert(tx: Connection) -> None:
            tx.execute(login_keys.insert().values(row))
            actor, until = audit.user(by.name), _moment(ends)
            facts: dict[str, audit.Detail] = {"uses": uses, "good_until": until, "labels": labels}
            audit.note(tx, tenant, actor, "key.create", key_id, **facts)

        await self._store.write(insert)
        return key_id, self._key(Scope.DEVICE, secret)

    async def list_keys(self, tenant: str) -> list[dict[str, Any]]:
        """The keys of a tenant, newest first, without their secrets."""
        query = (
            sa.select(login_keys)
            .where(login_keys.c.tenant == tenant)
            .order_by(login_keys.c.created_at.desc())
        )

        def rows(tx: Connection) -> list[dict[str, Any]]:
            found = [dict(row) for row in tx.execute(query).mappings()]
            for row in found:
                del row["secret_sha256"]
            return found

        return await self._store.read(rows)

    async def revoke_key(self, tenant: str, key_id: str, *, by: str) -> None:
        """No further machine joins with this key; those that did stay. Again is harmless.

        Raises:
            Problem: 404 no such key.
        """
        mine = sa.and_(login_keys.c.id == key_id, login_keys.c.tenant == tenant)

        def revoke(tx: Connection) -> None:
            revoked = tx.execute(sa.select(login_keys.c.revoked).where(mine)).scalar()
            if revoked is None:
                raise Problem(404, "no such key", f"{key_id!r} is unknown")
            if not revoked:
                tx.execute(login_keys.update().where(mine).values(revoked=True))
                audit.note(tx, tenant, audit.user(by), "key.revoke", key_id)

        await self._store.write(revoke)

    def _key(self, scope: Scope, secret: bytes) -> str:
        key = LoginKey(scope=scope, url=self._url, ca_sha256=self._ca_sha256, secret=secret)
        return str(key)


def forget_run_key(tx: Connection, run: str) -> None:
    """The key of a run is good no more; again is harmless."""
    _FORGET.run(tx, run_=run)


def use_key(tx: Connection, secret: bytes, *, again: bool) -> Enrolment:
    """Count one use of a login key, in the transaction that enrols the machine.

    Args:
        again: The machine joined with its present key before: this use is not counted.

    Raises:
        SignInRefused: 401 unknown, 403 revoked, expired or used up; each says what to ask for.
    """
    row = tx.execute(
        sa.select(login_keys).where(login_keys.c.secret_sha256 == _hash(secret))
    ).first()
    ask = "ask the broker's admin for a new key: `fedml-broker keys create`"
    if row is None:
        raise SignInRefused(401, "unknown login key", "this broker never made it", ask)
    detail = f"key {row.id}"
    if row.revoked:
        title = "this login key was revoked"
    elif row.expires_at is not None and row.expires_at < time.time():
        title = "this login key has expired"
        detail += f" ended {_moment(row.expires_at)}"
    elif not again and row.uses is not None and row.used >= row.uses:
        title = "this login key is used up"
        detail += f" was good for {row.uses}"
    else:
        title = ""
    if title:
        raise SignInRefused(403, title, detail, ask, tenant=row.tenant, thing=row.id)
    if not again:
        tx.execute(login_keys.update().where(login_keys.c.id == row.id).values(used=row.used + 1))
    return Enrolment(row.tenant, row.labels, row.id)


def check_labels(labels: Mapping[str, str]) -> None:
    """Labels are short words: they are typed on command lines and shown in tables.

    Raises:
        Problem: 422.
    """
    for name, value in labels.items():
        _check_name(name, "label")
        if not 0 < len(value) <= 80 or any(c.isspace() or not c.isprintable() for c in value):
            raise Problem(422, "a label's value is one short word", f"{name}={value!r}")


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise Problem(422, "no such role", f"{role!r} is none of {', '.join(ROLES)}")


def _unknown(user: str) -> Problem:
    return Problem(404, "no such user", f"{user!r} is unknown", hint="`fedml-broker users create`")


def _admins(tx: Connection, tenant: str) -> list[str]:
    query = sa.select(users.c.name).where(users.c.tenant == tenant, users.c.role == "admin")
    return list(tx.execute(query.order_by(users.c.name)).scalars())


def _check_name(name: str, what: str) -> None:
    try:
        check_id(name, what)
    except MalformedMessage as error:
        raise Problem(422, f"not a {what}'s name", str(error)) from error


def _moment(at: float | None) -> str | None:
    if at is None:
        return None
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
    except (OverflowError, ValueError, OSError):
        return "beyond the calendar"


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
