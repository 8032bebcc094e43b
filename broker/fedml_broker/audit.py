# SPDX-License-Identifier: Apache-2.0
"""Who did what, and when: a chain of entries in which nothing can be changed unseen.

An entry is written in the transaction of the action that it tells of: there is no action without
its entry, and no entry without its action. Each carries a hash of itself and of the one before:

    hash = sha256(hash of the entry before, in hex ("0" * 64 for the first) + entry)

where `entry` is everything but the hash, as canonical JSON (RFC 8785; all numbers are integers), in
UTF-8. The chain shows that nothing in it was altered, taken out or moved. That its end was cut off,
or that all of it was made anew, only a hash shows that somebody kept elsewhere (`head`).

Entries hold no secrets: neither tokens nor keys, nor a job's command and environment.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.prepared import Prepared
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT, audit

log = logging.getLogger(__name__)

Detail = str | int | bool | None | Sequence[str] | Mapping[str, str]

# Actors that are neither users nor devices.
CLI = "cli"  # a command on the broker's own machine
BROKER = "broker"
NOBODY = "nobody"  # who could not say who he is

GENESIS = "0" * 64

# With every run.
_INSERT = Prepared(audit.insert(), [column.name for column in audit.c])
_LAST = Prepared(sa.select(audit.c.n, audit.c.hash).order_by(audit.c.n.desc()).limit(1))

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)

_TEXT_MAX = 200
_DETAILS_MAX = 4000

# Of refused sign-ins: so many are written at once, then one a minute.
_BURST = 20
_REFILL_S = 60.0
# The same one again (from there, with that, for this reason) within so long is only counted.
_SAME_S = 3600.0
# So many different ones are told apart; and so many may wait to be written.
_KNOWN = 1000


class Broken(Exception):
    """The chain does not hold; `n` is the first entry that is wrong."""

    def __init__(self, n: int, why: str) -> None:
        super().__init__(f"entry {n}: {why}")
        self.n = n


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry of a chain; of an empty one, 0 and `GENESIS`."""

    n: int
    hash: str


class SignInRefused(Problem):
    """Somebody could not show who he is, or is shut out. The route that meets it has it noted.

    Attributes:
        tenant: Whose business it is, as far as that is known.
        thing: What he came with: a key's id, a device.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        hint: str = "",
        *,
        tenant: str = DEFAULT_TENANT,
        thing: str = "",
    ) -> None:
        super().__init__(status, title, detail, hint)
        self.tenant = tenant
        self.thing = thing


def user(name: str) -> str:
    """A user as an actor."""
    return f"user/{name}"


def device(name: str) -> str:
    """A device as an actor."""
    return f"device/{name}"


def run(name: str) -> str:
    """A job of a run as an actor."""
    return f"run/{name}"


def note(
    tx: Connection, tenant: str, actor: str, action: str, thing: str, /, **details: Detail
) -> None:
    """Add an entry, in the transaction in which the action happens.

    Args:
        tenant: Whose admins may read it; what concerns the whole broker is the first tenant's.
        action: What was done, as ``word.verb``.
        thing: To what: a user's name, a device's or run's id.
        details: Never a secret, and nothing that may hold one. Long texts are cut.
    """
    before = head(tx)
    told = {name: _short(value) for name, value in details.items()}
    text = canonical(told)
    if len(text) > _DETAILS_MAX:
        told = {"cut": text[:_DETAILS_MAX]}
        text = canonical(told)
    row = {
        "n": before.n + 1,
        "at_ms": int(time.time() * 1000),
        "tenant": tenant,
        "actor": actor,
        "action": action,
        "object": _short(thing),
        "details": told,
    }
    _INSERT.run(tx, **row | {"details": text}, hash=_hash(before.hash, row))


def head(tx: Connection) -> Head:
    """The last entry."""
    row = _LAST.first(tx)
    return Head(0, GENESIS) if row is None else Head(*row)


def entries(
    tx: Connection,
    *,
    tenant: str | None = None,
    actor: str | None = None,
    action: str | None = None,
    since: float | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[dict[str, Any]]:
    """Entries, newest first.

    Args:
        action: ``run.stop``, or ``run`` for all that was done to runs.
        since: Seconds since 1970.
        before: Only entries with a smaller number, for the next page.
    """
    query = sa.select(audit).order_by(audit.c.n.desc()).limit(limit)
    if tenant is not None:
        query = query.where(audit.c.tenant == tenant)
    if actor is not None:
        query = query.where(audit.c.actor == actor)
    if action is not None:
        below = audit.c.action.startswith(f"{action}.", autoescape=True)
        query = query.where(sa.or_(audit.c.action == action, below))
    if since is not None:
        query = query.where(audit.c.at_ms >= int(since * 1000))
    if before is not None:
        query = query.where(audit.c.n < before)
    return [{**row, "details": json.loads(row["details"])} for row in tx.execute(query).mappings()]


def verify(tx: Connection, each: Callable[[Head], None] = lambda entry: None) -> Head:
    """Walk the whole chain; its head.

    Args:
        each: Is called with every entry that is right.

    Raises:
        Broken: With the first entry that is wrong.
    """
    last = Head(0, GENESIS)
    for row in _rows(tx):
        if row["n"] != last.n + 1:
            raise Broken(last.n + 1, f"missing; the next one that is there is {row['n']}")
        try:
            fits = row["hash"] == _hash(last.hash, _entry(row))
        except (ValueError, TypeError) as error:
            raise Broken(row["n"], f"its details cannot be read: {error}") from error
        if not fits:
            raise Broken(row["n"], "its hash does not fit: it, or the one before it, was changed")
        last = Head(row["n"], row["hash"])
        each(last)
    return last


def _rows(tx: Connection) -> Iterator[Mapping[Any, Any]]:
    """All entries in order, a thousand at a time."""
    found = tx.execution_options(yield_per=1000).execute(sa.select(audit).order_by(audit.c.n))
    yield from found.mappings()


def canonical(value: Mapping[str, Any]) -> str:
    """JSON as RFC 8785 writes it, for what we put into it: no floats, and names in ASCII."""
    return _CANONICAL.encode(value)


def _entry(row: Mapping[Any, Any]) -> dict[str, Any]:
    """What is hashed of a row: everything but the hash, and `details` not as a text."""
    entry = {name: value for name, value in row.items() if name != "hash"}
    entry["details"] = json.loads(row["details"])
    if canonical(entry["details"]) != row["details"]:
        raise ValueError("not in the form in which they were written")
    return entry


def _hash(before: str, entry: Mapping[str, Any]) -> str:
    return hashlib.sha256((before + canonical(entry)).encode()).hexdigest()


def _short(value: Any) -> Any:
    if isinstance(value, str):
        # Names of files may hold bytes that are no UTF-8.
        return value[:_TEXT_MAX].encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_short(name): _short(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_short(item) for item in value]
    return value


@dataclass(slots=True)
class _Repeats:
    """One kind of refused sign-in that was noted, and how often it has come since."""

    noted_at: float
    refused: SignInRefused
    address: str
    count: int = 0


class Refusals:
    """Notes refused sign-ins, so few of them that a flood does not fill the disk.

    The first of each kind is written when it comes, its repeats as a number after an hour. Of many
    kinds at once some are not written but counted, and the count goes into the next entry that is.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._left = float(_BURST)
        self._filled_at = clock()
        self._unwritten = 0
        self._repeats: dict[tuple[str, str, str, str], _Repeats] = {}
        self._waiting: asyncio.Queue[tuple[SignInRefused, str]] = asyncio.Queue(_KNOWN)

    async def note(self, refused: SignInRefused, address: str) -> None:
        """Write it down, or count it. A full disk does not change what the client is told."""
        kind = (refused.tenant, refused.thing, refused.title, address)
        known = self._repeats.get(kind)
        if known is not None:
            known.count += 1
        elif not self._may_write():
            self._unwritten += 1
        else:
            if len(self._repeats) < _KNOWN:
                self._repeats[kind] = _Repeats(self._clock(), refused, address)
            await self._write_one(refused, address)

    def note_soon(self, refused: SignInRefused, address: str) -> None:
        """As `note`, for whom may not wait; `serve` writes it."""
        try:
            self._waiting.put_nowait((refused, address))
        except asyncio.QueueFull:
            self._unwritten += 1

    async def serve(self) -> None:
        """Write what was noted in passing, for ever."""
        while True:
            await self.note(*await self._waiting.get())
            self._waiting.task_done()

    async def flush(self) -> None:
        """Write the counts that are due; called once a minute."""
        for kind, known in list(self._repeats.items()):
            if self._clock() - known.noted_at < _SAME_S:
                break  # in the order in which they came
            del self._repeats[kind]
            if known.count and self._may_write():
                await self._write_one(known.refused, known.address, times=known.count)
            else:
                self._unwritten += known.count
        if self._unwritten and self._may_write():
            await self._write(DEFAULT_TENANT, "", {"why": "a flood"})

    async def _write_one(self, refused: SignInRefused, address: str, **more: Detail) -> None:
        details: dict[str, Detail] = {"why": refused.title, "from": address, **more}
        await self._write(refused.tenant, refused.thing, details)

    async def _write(self, tenant: str, thing: str, details: dict[str, Detail]) -> None:
        unwritten, self._unwritten = self._unwritten, 0
        if unwritten:
            details["not_written_before"] = unwritten
        try:
            await self._store.write(
                lambda tx: note(tx, tenant, NOBODY, "sign-in.refused", thing, **details)
            )
        except Problem as error:
            self._unwritten += unwritten + 1
            log.warning("a refused sign-in was not noted: %s", error)

    def _may_write(self) -> bool:
        now = self._clock()
        self._left = min(_BURST, self._left + (now - self._filled_at) / _REFILL_S)
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
