# SPDX-License-Identifier: Apache-2.0
"""Retained messages: the last one of each topic, found by filter without looking at all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedml_broker.mqtt.message import Message


class _Node:
    __slots__ = ("children", "message")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.message: Message | None = None


class Retained:
    """A tree of topic levels with at most one message each.

    Attributes:
        size: Bytes of all messages, as `Message.size` counts them.
    """

    def __init__(self) -> None:
        self.size = 0
        self._root = _Node()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, topic: str) -> Message | None:
        """The retained message of exactly this topic."""
        node: _Node | None = self._root
        for level in topic.split("/"):
            node = node.children.get(level) if node else None
        return node.message if node else None

    def put(self, topic: str, message: Message) -> None:
        """Keep a message, in place of the one before."""
        node = self._root
        for level in topic.split("/"):
            node = node.children.setdefault(level, _Node())
        if node.message is None:
            self._count += 1
        else:
            self.size -= node.message.size
        self.size += message.size
        node.message = message

    def drop(self, topic: str) -> bool:
        """Forget a topic's message; whether there was one."""
        levels = topic.split("/")
        path = [self._root]
        for level in levels:
            below = path[-1].children.get(level)
            if below is None:
                return False
            path.append(below)
        if path[-1].message is None:
            return False
        self.size -= path[-1].message.size
        path[-1].message = None
        self._count -= 1
        while levels and path[-1].message is None and not path[-1].children:
            path.pop()
            del path[-1].children[levels.pop()]
        return True

    def match(self, topic_filter: str) -> Iterator[Message]:
        """Every retained message whose topic matches a (valid) filter."""
        here = [self._root]
        levels = topic_filter.split("/")
        for index, level in enumerate(levels):
            if level == "#":
                # "a/#" matches "a" too, hence from these nodes themselves, not from their children.
                yield from self._below(here, top=index == 0)
                return
            below: list[_Node] = []
            for node in here:
                if level == "+":
                    below.extend(
                        child
                        for name, child in node.children.items()
                        if index > 0 or not name.startswith("$")
                    )
                elif level in node.children:
                    below.append(node.children[level])
            here = below
        for node in here:
            if node.message is not None:
                yield node.message

    def _below(self, nodes: list[_Node], *, top: bool) -> Iterator[Message]:
        stack = nodes
        while stack:
            node = stack.pop()
            if node.message is not None:
                yield node.message
            stack.extend(
                child
                for name, child in node.children.items()
                if not (top and node is self._root and name.startswith("$"))
            )
