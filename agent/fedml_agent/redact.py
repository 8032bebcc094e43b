# SPDX-License-Identifier: Apache-2.0
"""Secrets of a task, taken out of what it prints: `***NAME***` stands where the value was.

The shim does this before a byte is written, so that neither the machine's disk nor the broker has
them, and a piece that is sent twice is the same both times. Whatever pieces the output comes in,
the result is that of the whole: what may be the beginning of a secret is held back until it is
known.

Looked for: the value itself; each long line of one that has several; and its base64 at all three
places that it can have in a longer text (`user:password`), as far as only the value decides it.
Something that a program derives in another way is not found.
"""

import base64
import re
from collections.abc import Mapping

_SHORTEST_LINE = 16
_SHORTEST_BASE64 = 12


class Secrets:
    """What to look for, and what to put there."""

    def __init__(self, values: Mapping[str, str]) -> None:
        """`values` by name, as `secret_names.secrets_of` gives them."""
        self._shown: dict[bytes, bytes] = {}
        for name, value in values.items():
            for form in _forms(value.encode(errors="surrogateescape")):
                self._shown.setdefault(form, f"***{name}***".encode(errors="surrogateescape"))
        # At one place, the longer of two counts.
        self._forms = sorted(self._shown, key=len, reverse=True)
        self._any = re.compile(b"|".join(map(re.escape, self._forms)))
        # By their last byte, the longest first: most pieces end with one that no secret has.
        self._beginnings: dict[int, list[bytes]] = {}
        for form in self._forms:
            for end in range(len(form) - 1, 0, -1):
                self._beginnings.setdefault(form[end - 1], []).append(form[:end])
        for beginnings in self._beginnings.values():
            beginnings.sort(key=len, reverse=True)

    def __bool__(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._forms)

    def hide(self, text: str) -> str:
        """A text without them."""
        if not self._forms:
            return text
        raw = text.encode(errors="surrogateescape")
        return self.replace(raw).decode(errors="surrogateescape")

    def replace(self, data: bytes) -> bytes:
        """Bytes without them."""
        # Ten times as fast as the expression, and nearly always the answer.
        if not any(form in data for form in self._forms):
            return data
        return self._any.sub(lambda found: self._shown[found[0]], data)

    def settled(self, data: bytes) -> int:
        """How much of the data can be told from what follows it."""
        held = next(
            (b for b in self._beginnings.get(data[-1], ()) if data.endswith(b))
            if data
            else iter(()),
            b"",
        )
        end = len(data) - len(held)
        if held:
            # A secret that began before it, and ends in it, is one for sure.
            for found in self._any.finditer(data):
                if found.start() >= end:
                    break
                end = max(end, found.end())
        return end


class Redactor:
    """One stream of bytes, in the pieces that come."""

    def __init__(self, secrets: Secrets) -> None:
        """`secrets` may be shared."""
        self._secrets = secrets
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """One piece more; what is sure by now."""
        data = self._held + piece
        end = self._secrets.settled(data)
        self._held = data[end:]
        return self._secrets.replace(data[:end])

    def rest(self) -> bytes:
        """Nothing follows: what was held back."""
        data, self._held = self._held, b""
        return self._secrets.replace(data)


def _forms(value: bytes) -> set[bytes]:
    forms = {value, value.strip()}
    forms |= {line for line in value.split(b"\n") if len(line) >= _SHORTEST_LINE}
    for before in range(3):
        text = base64.b64encode(bytes(before) + value.strip())
        # Characters that bits of a neighbour go into are left out at both ends.
        first, last = -(-before * 8 // 6), (before + len(value.strip())) // 3 * 4
        core = text[first:last]
        if len(core) >= _SHORTEST_BASE64:
            forms |= {core, core.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms
