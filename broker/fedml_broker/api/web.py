# SPDX-License-Identifier: Apache-2.0
"""The dashboard's page and files; its data comes from the same URLs as everybody's."""

from typing import Any

from fedml_broker.api.call import Call
from fedml_broker.dashboard import Dashboard


class Handlers:
    """For browsers."""

    def __init__(self) -> None:
        self._dashboard = Dashboard()

    async def page(self, call: Call) -> Any:
        """The dashboard."""
        return self._dashboard.page(call.http)

    async def file(self, call: Call) -> Any:
        """A script or style of the dashboard."""
        return self._dashboard.file(call.http, call.part("digest"), call.part("file"))
