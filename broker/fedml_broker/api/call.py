# SPDX-License-Identifier: Apache-2.0
"""One request to the API, and who asks."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from fedml_broker import sessions
from fedml_broker.accounts import User
from fedml_broker.audit import SignInRefused
from fedml_broker.identity import common_name
from fedml_broker.problems import Problem
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.topics import Address, parse_client_id

if TYPE_CHECKING:
    from fedml_broker.app import Broker


@dataclass(frozen=True, slots=True)
class Call:
    """One request whose caller is known."""

    http: web.Request
    body: Any
    caller: User | Address | None

    @property
    def user(self) -> User:
        """The caller, where the route asks for a user."""
        if not isinstance(self.caller, User):
            raise Problem(401, "not signed in", "a user's token is needed", hint="`fedml login`")
        return self.caller

    @property
    def device(self) -> Address:
        """The caller, where the route asks for a device."""
        if not isinstance(self.caller, Address):
            raise Problem(401, "not a device", "a device's certificate is needed")
        return self.caller

    @property
    def owner(self) -> str:
        """Who uploads."""
        return self.device.device if isinstance(self.caller, Address) else f"u/{self.user.name}"

    @property
    def token(self) -> bytes | None:
        """That the caller came with; None: a browser, or a device."""
        return _bearer(self.http)

    def part(self, name: str) -> str:
        """A variable part of the path."""
        return self.http.match_info[name]


Handler = Callable[[Call], Awaitable[Any]]


def _bearer(request: web.Request) -> bytes | None:
    """The token of a request; empty where it cannot be one."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    try:
        return bytes.fromhex(secret)
    except ValueError:
        return b""


class Callers:
    """Tells who asks."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def caller(self, request: web.Request) -> User | Address | None:
        """The user of the bearer token, or of the browser's session, or else the device of the
        client certificate.
        """
        if (token := _bearer(request)) is not None:
            user = self._broker.accounts.authenticate(token, jobs=True)
            if user is None:
                raise SignInRefused(
                    401,
                    "unknown or expired token",
                    "the broker does not know this token",
                    hint="ask an admin for a new one: `fedml-broker users token NAME`",
                )
            return user
        cookie = request.cookies.get(sessions.COOKIE)
        if cookie is not None:
            return await self._broker.sessions.caller(cookie, request)
        transport = request.transport
        peer = transport.get_extra_info("peercert") if transport is not None else None
        name = common_name(peer)
        if name is None:
            return None
        try:
            address = parse_client_id(name)
        except MalformedMessage:
            return None
        if not self._broker.devices.known(address):
            raise SignInRefused(
                403,
                "this device is not known here",
                f"{address.device} was revoked or removed",
                hint="`fedml-agent logout`, then `fedml-agent login KEY` with a new key",
                tenant=address.tenant,
                thing=address.device,
            )
        return address

    async def refused(self, request: web.Request, refused: SignInRefused) -> None:
        """Somebody was not let in."""
        await self._broker.refusals.note(refused, request.remote or "")

    async def who_grants(self, user: User, role: str) -> str:
        """Whom a user asks for a role, and what they type."""
        admins = await self._broker.accounts.admins(user.tenant)
        names = ", ".join(admins[:3]) or "none is left: ask those who run the broker"
        return (
            f"an admin of {user.tenant!r} can grant it ({names}): "
            f"`fedml-broker users role {user.name} {role}`"
        )


def number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Problem(422, "not a whole number", repr(text[:40]))
    return int(text)
