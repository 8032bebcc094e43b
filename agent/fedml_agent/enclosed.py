# SPDX-License-Identifier: Apache-2.0
"""Start a program in which somebody else's code runs and which no agent tends.

    python -m fedml_agent.enclosed FACTS PROGRAM [ARGUMENT ...]

FACTS is a JSON object of absolute paths: what lies below `hidden` cannot be read, but for what lies
below `show`; only what lies below `writable` can be written. There is no network. The program takes
this process over, with its standard streams. What this machine cannot give is said on stderr in
one line, and the program runs without it: the broker's doctor tells the person in charge.
"""

import json
import os
import sys

from fedml_agent import confine
from fedml_agent.namespaces import HIDE, NETWORK, READ_ONLY
from fedml_agent.view import control_sockets

_WALLS = (HIDE, READ_ONLY, NETWORK)


def missing() -> dict[str, str]:
    """Which walls this machine cannot put up, and why."""
    controls = control_sockets()
    return {wall: why for wall in _WALLS if (why := confine.why_not(wall, controls))}


def main() -> None:
    """Put up the walls that are to be had, and become the program."""
    facts = {
        name: [os.path.realpath(path) for path in paths]
        for name, paths in json.loads(sys.argv[1]).items()
    }
    without = missing()
    for wall, why in without.items():
        sys.stderr.write(f"fedml: this machine gives aggregators no protection '{wall}': {why}\n")
    confine.enclose([w for w in _WALLS if w not in without], **facts)
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606


if __name__ == "__main__":
    main()
