# SPDX-License-Identifier: Apache-2.0
"""Login keys, users, roles and tokens."""

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from fedml_broker import audit
from fedml_broker.accounts import User
from fedml_broker.api.call import Call
from fedml_broker.problems import Problem
from fedml_broker.tables import DEFAULT_TENANT

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class KeyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A login key to be made; no `uses` or `days`: no limit; no `tenant`: the caller's."""

    uses: int | None = 1
    days: float | None = 7.0
    labels: dict[str, str] = {}
    tenant: str = ""


class UserRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user to be made; no `tenant`: the caller's."""

    name: str
    role: str = "member"
    tenant: str = ""


class RoleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The role that a user is to have: viewer, member or admin."""

    role: str


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token to be made; no `days`: it never expires."""

    days: float | None = None


class Handlers:
    """For whoever says who may do what."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def list_keys(self, call: Call) -> Any:
        """The login keys of the tenant."""
        return {"keys": await self._broker.accounts.list_keys(call.user.tenant)}

    async def create_key(self, call: Call) -> Any:
        """A new login key; its secret is shown this once."""
        body: KeyRequest = call.body
        key_id, key = await self._broker.accounts.create_key(
            call.user,
            uses=body.uses,
            days=body.days,
            labels=body.labels,
            tenant=_tenant(call.user, body.tenant),
        )
        return {"id": key_id, "key": key}

    async def revoke_key(self, call: Call) -> Any:
        """No further machine joins with this key."""
        await self._broker.accounts.revoke_key(
            call.user.tenant, call.part("key"), by=call.user.name
        )
        return {"id": call.part("key")}

    async def list_users(self, call: Call) -> Any:
        """The users of the tenant."""
        return {"users": await self._broker.accounts.list_users(call.user.tenant)}

    async def create_user(self, call: Call) -> Any:
        """A new user."""
        body: UserRequest = call.body
        tenant = _tenant(call.user, body.tenant)
        by = audit.user(call.user.name)
        await self._broker.accounts.create_user(body.name, body.role, tenant, by=by)
        return {"name": body.name, "role": body.role, "tenant": tenant}

    async def set_role(self, call: Call) -> Any:
        """Another role for a user."""
        name, role = call.part("user"), call.body.role
        by, of = audit.user(call.user.name), _only_of(call.user)
        await self._broker.accounts.set_role(name, role, by=by, of=of)
        return {"name": name, "role": role}

    async def create_token(self, call: Call) -> Any:
        """A new token of a user; shown this once."""
        name = call.part("user")
        by, of = audit.user(call.user.name), _only_of(call.user)
        return {"key": await self._broker.accounts.create_token(name, call.body.days, by=by, of=of)}

    async def revoke_tokens(self, call: Call) -> Any:
        """All tokens of a user end, and the sessions of browsers; but not the caller's token."""
        name = call.part("user")
        by, of = audit.user(call.user.name), _only_of(call.user)
        if call.token is None:
            keep = await self._broker.sessions.token_sha256(call.http)
        else:
            keep = hashlib.sha256(call.token).hexdigest()
        count = await self._broker.accounts.revoke_tokens(name, by=by, of=of, keep=keep)
        return {"name": name, "tokens": count}

    async def end_token(self, call: Call) -> Any:
        """The token that asks is good no more."""
        if call.token is None:
            raise Problem(422, "no token", "a browser's session ends with `DELETE /v1/session`")
        await self._broker.accounts.end_token(call.user, call.token)
        return {}


def _tenant(user: User, named: str) -> str:
    """For whom something is made: the admins of the first tenant may name another one.

    Raises:
        Problem: 403.
    """
    if named and named != user.tenant and user.tenant != DEFAULT_TENANT:
        raise Problem(
            403,
            "only your own tenant",
            f"you are of {user.tenant!r}; other tenants belong to the admins of {DEFAULT_TENANT!r}",
        )
    return named or user.tenant


def _only_of(user: User) -> str | None:
    """Whose users he manages: those of his tenant, or of the first tenant everybody's (None)."""
    return None if user.tenant == DEFAULT_TENANT else user.tenant
