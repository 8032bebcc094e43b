# SPDX-License-Identifier: Apache-2.0
"""What TAB completes that only the broker knows: runs, machines, clusters, stored objects.

A broker that does not answer at once completes nothing, without a word: the person is typing.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click
from click.shell_completion import CompletionItem

from fedml import session
from fedml.client import Client
from fedml.errors import FedMLError

# (name, what is said beside it) of each row of an answer.
_Rows = Callable[[dict[str, Any]], list[tuple[str, str]]]
_Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _asking(path: str, rows: _Rows) -> _Complete:
    def complete(context: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
        try:
            home = context.params.get("home") or session.find_home()
            client = Client(session.load(home), connect_s=1, read_s=2)
            found = rows(client.call("GET", path.format(begun=quote(begun, safe=""))))
        except FedMLError:
            return []
        return [CompletionItem(name, help=said) for name, said in found if name.startswith(begun)]

    return complete


runs = _asking(
    "/v1/runs?limit=100",
    lambda told: [(r["id"], f"{r['name']} {r['state']}") for r in told["runs"]],
)
devices = _asking("/v1/devices", lambda told: [(d["name"], d["status"]) for d in told["devices"]])
clusters = _asking(
    "/v1/clusters", lambda told: [(c["name"], c["status"]) for c in told["clusters"]]
)
objects = _asking(
    "/v1/storage?prefix={begun}", lambda told: [(o["name"], o["user"]) for o in told["objects"]]
)
