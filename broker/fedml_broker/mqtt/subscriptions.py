# SPDX-License-Identifier: Apache-2.0
"""Who wants which topic: a tree of filter levels, and what a topic matches in it.

A match is computed once per topic and kept until any subscription changes, so that routing a
message costs one dictionary look-up. Overlapping subscriptions of one session are merged into one
delivery that carries all their identifiers (MQTT 5, 3.3.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedml_broker.mqtt import Handler
from fedml_broker.mqtt.wire import varint

if TYPE_CHECKING:
    from fedml_broker.mqtt.sessions import Session


def split_filter(text: str, max_levels: int = 0xFFFF) -> tuple[str, str]:
    """A filter's share group ("" for none) and the topic filter proper.

    Raises:
        ValueError: It breaks MQTT 5, 4.7 or 4.8.2, or has too many levels.
    """
    group, topic_filter = "", text
    if text.startswith("$share/"):
        _, group, topic_filter, *_ = [*text.split("/", 2), ""]
        if not group or "+" in group or "#" in group:
            raise ValueError(f"{text!r} names no share group")
    levels = topic_filter.split("/")
    if not topic_filter or "\0" in topic_filter or len(topic_filter.encode()) > 0xFFFF:
        raise ValueError(f"{text!r} is empty, too long, or has a null character")
    if len(levels) > max_levels:
        raise ValueError(f"{text!r} has more than {max_levels} levels")
    for index, level in enumerate(levels):
        if ("#" in level and (level != "#" or index + 1 < len(levels))) or (
            "+" in level and level != "+"
        ):
            raise ValueError(f"{text!r} has a wildcard where none may be")
    return group, topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a valid filter matches a topic (MQTT 5, 4.7): the rule that the tree computes."""
    levels, wanted = topic.split("/"), topic_filter.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or level not in ("+", levels[index]):
            return False
    return len(wanted) == len(levels)


@dataclass(slots=True, eq=False)
class Subscription:
    """One session's wish. `filter` is as the client wrote it, `$share/...` included."""

    session: Session
    filter: str
    qos: int
    no_local: bool = False
    retain_as_published: bool = False
    ident: int = 0
    group: Group | None = None


@dataclass(slots=True, eq=False)
class Target:
    """One delivery that a topic's messages cause.

    Attributes:
        idents: Subscription Identifier properties, encoded.
        own: The delivery when the session itself is the publisher; None where No Local forbids it.
    """

    session: Session
    qos: int
    retain_as_published: bool
    idents: bytes = b""
    own: Target | None = None
    group: Group | None = None


def target(subscriptions: Sequence[Subscription]) -> Target:
    """Merge one session's subscriptions to a topic (at least one) into one delivery."""
    idents = b"".join(b"\x0b" + varint(sub.ident) for sub in subscriptions if sub.ident)
    merged = Target(
        subscriptions[0].session,
        max(sub.qos for sub in subscriptions),
        any(sub.retain_as_published for sub in subscriptions),
        idents,
        group=subscriptions[0].group,
    )
    local = [sub for sub in subscriptions if not sub.no_local]
    if local:
        merged.own = merged if len(local) == len(subscriptions) else target(local)
    return merged


@dataclass(slots=True, eq=False)
class Group:
    """The members of one shared subscription (MQTT 5, 4.8.2), served in turn."""

    name: str
    filter: str
    members: list[Subscription] = field(default_factory=list)
    turn: int = 0

    def choose(self, *, online: bool = False) -> Target | None:
        """Whose turn it is: who can take a message now, else who is online, else who remembers.

        Args:
            online: Leave out the third kind.
        """
        count = len(self.members)
        best: int | None = None
        rank = 0
        for step in range(count):
            index = (self.turn + step) % count
            session = self.members[index].session
            score = 3 if session.ready else 2 if session.line else session.stored and not online
            if score > rank:
                best, rank = index, score
                if rank == 3:
                    break
        if best is None:
            return None
        self.turn = best + 1
        return target([self.members[best]])


@dataclass(slots=True, eq=False)
class Match:
    """Everything that happens to a message of one topic."""

    targets: tuple[Target, ...] = ()
    groups: tuple[Group, ...] = ()
    handlers: tuple[Handler, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.targets or self.groups or self.handlers)


class _Node:
    """One level of the tree. Empty parts are None: a fleet has three nodes per device."""

    __slots__ = ("children", "groups", "handlers", "subscriptions")

    def __init__(self) -> None:
        self.children: dict[str, _Node] | None = None
        self.subscriptions: dict[Session, Subscription] | None = None
        self.groups: dict[str, Group] | None = None
        self.handlers: list[Handler] | None = None

    @property
    def empty(self) -> bool:
        return not (self.children or self.subscriptions or self.groups or self.handlers)


class Subscriptions:
    """The tree. `version` grows with every change, so that a kept `Match` can be seen to be old."""

    def __init__(self) -> None:
        self.version = 1
        self._root = _Node()

    def add(self, topic_filter: str, group: str, sub: Subscription) -> None:
        """Add or replace one session's subscription to a filter."""
        node = self._grow(topic_filter)
        if group:
            node.groups = node.groups or {}
            sub.group = node.groups.setdefault(group, Group(group, topic_filter))
            members = sub.group.members
            members[:] = [m for m in members if m.session is not sub.session]
            members.append(sub)
        else:
            node.subscriptions = node.subscriptions or {}
            node.subscriptions[sub.session] = sub
        self.version += 1

    def add_handler(self, topic_filter: str, handler: Handler) -> None:
        """Add a subscriber that lives in this process."""
        node = self._grow(topic_filter)
        node.handlers = [*(node.handlers or ()), handler]
        self.version += 1

    def remove(self, sub: Subscription) -> None:
        """Remove one subscription and the branches that nobody needs any more."""
        group = sub.group
        levels = (group.filter if group else sub.filter).split("/")
        path = [self._root]
        for level in levels:
            path.append((path[-1].children or {})[level])
        node = path[-1]
        if group:
            group.members[:] = [m for m in group.members if m is not sub]
            if not group.members and node.groups:
                node.groups.pop(group.name, None)
        elif node.subscriptions and node.subscriptions.get(sub.session) is sub:
            del node.subscriptions[sub.session]
        while levels and path[-1].empty:
            path.pop()
            (path[-1].children or {}).pop(levels.pop(), None)
        self.version += 1

    def match(self, topic: str) -> Match:
        """Who gets the messages of one topic."""
        wanted: dict[Session, list[Subscription]] = {}
        groups: list[Group] = []
        handlers: list[Handler] = []
        for node in self._walk(topic):
            for session, sub in (node.subscriptions or {}).items():
                wanted.setdefault(session, []).append(sub)
            groups.extend((node.groups or {}).values())
            handlers.extend(node.handlers or ())
        return Match(tuple(map(target, wanted.values())), tuple(groups), tuple(handlers))

    def _walk(self, topic: str) -> Iterator[_Node]:
        """Every node whose filter matches."""
        here = [self._root]
        for index, level in enumerate(topic.split("/")):
            # Wildcards in the first level do not see topics of the server's own kind (4.7.2).
            wild = index > 0 or not level.startswith("$")
            below: list[_Node] = []
            for node in here:
                children = node.children
                if not children:
                    continue
                if wild and "#" in children:
                    yield children["#"]
                if wild and "+" in children:
                    below.append(children["+"])
                if level in children:
                    below.append(children[level])
            here = below
        for node in here:
            yield node
            if node.children and "#" in node.children:  # "a/#" matches "a" itself (4.7.1.2)
                yield node.children["#"]

    def _grow(self, topic_filter: str) -> _Node:
        node = self._root
        for level in topic_filter.split("/"):
            node.children = node.children or {}
            node = node.children.setdefault(level, _Node())
        return node
