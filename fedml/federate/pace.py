# SPDX-License-Identifier: Apache-2.0
"""How many epochs a client has time for, where its own `train` cannot be stopped in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Seconds of an epoch, as the client's latest training tells; before that nobody knows."""

    def __init__(self) -> None:
        self._epoch_s = 0.0

    def fitting(self, epochs: int, seconds: float) -> int:
        """Of so many epochs, how many are through in so many seconds; one is always tried."""
        if not self._epoch_s:
            return epochs
        return max(1, int(min(epochs, seconds / self._epoch_s)))

    @contextmanager
    def measured(self, epochs: int) -> Iterator[None]:
        """Around a training of so many epochs. One that is broken off tries half as many next."""
        began = time.monotonic()
        whole = False
        try:
            yield
            whole = True
        finally:
            took = (time.monotonic() - began) / epochs
            self._epoch_s = took if whole else 2 * took
