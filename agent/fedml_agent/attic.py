# SPDX-License-Identifier: Apache-2.0
"""Logs of tasks that have ended: kept for the machine's owner, within the limits that he sets.

logs/TASK.EPOCH/            of a launched job, its workspace gone
logs/SESSION.shim-N/        of a federated worker
    out.N err.N order.N exit.json   as the shim left them (a shim that was killed wrote no record)
    mlops/                  what it recorded of itself, as long as something of it is owed
    owed.json               under which task the broker wants them; gone when it has everything

What the broker does not have yet is sent from here, however long that takes, and never removed.
The rest goes when it is older than `logs.keep_days`, when all of it is more than `logs.keep_disk`
(the oldest first), and at once when the disk is low.
"""

import asyncio
import contextlib
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedml_agent.capped_log import EXIT_RECORD
from fedml_agent.https import Https
from fedml_agent.journal import Journal
from fedml_agent.observe import Finished, LogShipper
from fedml_agent.policy import Policy
from fedml_agent.records import FOLDER
from fedml_agent.tending import End, Ended, Gone

log = logging.getLogger(__name__)

OWED = "owed.json"
_KEPT = ("out.*", "err.*", "order.*", EXIT_RECORD, "job.sh", "bootstrap.sh", OWED)
_DAY_S = 86400.0
_RETRY_S = 60.0


class Kept(NamedTuple):
    """One directory in the attic; `ended_at` is seconds since 1970."""

    folder: Path
    ended_at: float
    size: int
    owed: bool


class Attic:
    """The directory `logs` of one home."""

    def __init__(
        self,
        root: Path,
        journal: Journal,
        https: Callable[[], Https],
        policy: Callable[[], Policy],
    ) -> None:
        self._root = root
        self._journal = journal
        self._https = https
        self._policy = policy
        self._owed: set[str] = set()
        self._new = asyncio.Event()

    def take_in(self, folder: Path, name: str, owed: tuple[str, int] | None = None) -> None:
        """Move a shim's directory here, without what its task left behind (from the event loop).

        Args:
            name: Under which it is kept.
            owed: The task and epoch under which the broker wants the rest of its log; None: the
                broker has it, or `mark_owed` has said it before.
        """
        if not any((*folder.glob("out.*"), *folder.glob("err.*"), *folder.glob(EXIT_RECORD))):
            shutil.rmtree(folder, ignore_errors=True)  # it never ran
            return
        if owed is not None:
            mark_owed(folder, *owed)
        keep = {path for pattern in _KEPT for path in folder.glob(pattern)}
        if (folder / OWED).exists():
            keep.add(folder / FOLDER)
        for path in folder.iterdir():
            if path not in keep:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        target = self._root / name
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        if (target / OWED).exists():
            self._owed.add(name)
            self._new.set()

    def look(self) -> None:
        """Find what an earlier agent owed the broker when it ended."""
        self._owed |= {path.parent.name for path in self._root.glob(f"*/{OWED}")}

    def kept(self) -> list[Kept]:
        """What is here, the oldest first."""
        found = []
        for folder in self._root.iterdir():
            with contextlib.suppress(OSError):  # taken away this moment
                files = list(folder.iterdir())
                # A shim that was killed has written logs and no record.
                times = (file.stat().st_mtime for file in files if file.name != OWED)
                ended_at = max(times, default=0.0)
                size = sum(file.stat().st_blocks * 512 for file in files)
                found.append(Kept(folder, ended_at, size, (folder / OWED).exists()))
        return sorted(found, key=lambda one: one.ended_at)

    def tidy(self, *, disk_low: bool, now: float | None = None) -> list[str]:
        """Remove what is over its time or over the limit; the names."""
        policy = self._policy()
        now = time.time() if now is None else now
        kept = self.kept()
        total = sum(one.size for one in kept)
        gone = []
        for one in kept:
            old = now - one.ended_at > policy.log_days * _DAY_S
            if not one.owed and (old or disk_low or total > policy.log_disk):
                shutil.rmtree(one.folder, ignore_errors=True)
                total -= one.size
                gone.append(one.folder.name)
        return gone

    async def serve(self) -> None:
        """Send what the broker does not have yet, for ever."""
        await asyncio.to_thread(self.look)
        while True:
            self._new.clear()
            complete = await self.send_owed()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if complete else _RETRY_S):
                    await self._new.wait()

    async def send_owed(self) -> bool:
        """Send all that the broker does not have yet; a broker that is away is waited for.

        Returns:
            Whether everything is sent: this machine's disk may have failed us.
        """
        complete = True
        for name in sorted(self._owed):
            try:
                await self._ship(self._root / name)
            except (OSError, sqlite3.Error) as error:
                log.warning("the log in %s was not sent yet: %s", self._root / name, error)
                complete = False
            else:
                self._owed.discard(name)
        return complete

    async def _ship(self, folder: Path) -> None:
        try:
            said = json.loads((folder / OWED).read_text())
            task, epoch = str(said["task"]), int(said["epoch"])
            end: End = Gone("its shim was killed")
            with contextlib.suppress(FileNotFoundError):
                end = Ended.from_record(json.loads((folder / EXIT_RECORD).read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the log in %s cannot be sent: %s", folder, error)
        else:
            await LogShipper(
                Finished(folder, end),
                task,
                epoch,
                https=self._https,
                journal=self._journal,
                watched=False,
            ).run()
        await asyncio.to_thread(shutil.rmtree, folder / FOLDER, ignore_errors=True)
        (folder / OWED).unlink(missing_ok=True)


def mark_owed(folder: Path, task: str, epoch: int) -> None:
    """Say under which task the broker wants the log that a shim writes here."""
    (folder / OWED).write_text(json.dumps({"task": task, "epoch": epoch}))
