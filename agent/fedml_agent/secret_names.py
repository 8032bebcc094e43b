# SPDX-License-Identifier: Apache-2.0
"""Which variables of a task are secret: those that the job declares, the owner, or their name.

What is done about them is in redact.py, which shims import; they cannot import this.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from fedml_protocol.launch import SHORTEST_SECRET, looks_secret

# A name may deceive: a short value would be taken out of every other line.
_SHORTEST_GUESSED = 6


def secrets_of(
    env: Mapping[str, str], listed: Iterable[str] = (), patterns: Iterable[str] = ()
) -> dict[str, str]:
    """The variables of a task whose values are secret, by name.

    Args:
        env: Its variables.
        listed: Names that the job declares.
        patterns: Names, `*` allowed, that the machine's owner declares.
    """
    declared = set(listed)
    found = {}
    for name, value in env.items():
        sure = name in declared or any(fnmatchcase(name, pattern) for pattern in patterns)
        least = SHORTEST_SECRET if sure else _SHORTEST_GUESSED
        if (sure or looks_secret(name)) and len(value.strip()) >= least:
            found[name] = value
    return found
