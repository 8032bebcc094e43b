# SPDX-License-Identifier: Apache-2.0
"""Records of a program outside any task, sent to the broker by a thread of that program.

HOME/mlops/RUN/     its records and artifacts (see `fedml_protocol.records`), removed once sent
    ended.json      how it ended, where the broker has not heard it yet
    lock            held by the process that sends them

What a process could not send is sent by the next one that begins a shipment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import secrets
import shutil
import threading
from pathlib import Path
from typing import Any

from fedml import session
from fedml.client import Client
from fedml.errors import BrokerRefused, BrokerUnreachable
from fedml_protocol.records import FILE

_EVERY_S = 2.0
_PIECE_BYTES = 256 * 1024
_END_S = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Shipment:
    """One run that this process records."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.run = folder.name
        self.folder = folder
        self._client = client
        self._lock = (folder / "lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._offset = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="fedml.mlops", daemon=True)

    @classmethod
    def begin(cls, name: str, experiment: str, home: Path | str | None) -> Shipment:
        """Begin a run at the broker, and send what earlier processes could not."""
        root = session.find_home(None if home is None else str(home))
        client = Client(session.load(root))
        run = "r-" + secrets.token_hex(5)
        request = {"run": run, "name": name or "run", "experiment": experiment}
        client.call("POST", "/v1/tracked", request)
        folder = root / "mlops" / run
        folder.mkdir(mode=0o700, parents=True)
        shipment = cls(client, folder)
        shipment._thread.start()
        return shipment

    def end(self, *, failed: bool, message: str) -> bool:
        """Nothing more is recorded; whether the broker has everything."""
        said = {"state": "FAILED" if failed else "FINISHED", "message": message}
        (self.folder / "ended.json").write_text(json.dumps(said))
        self._ending.set()
        self._thread.join(_END_S)
        return not self.folder.exists()

    def _serve(self) -> None:
        self._send_older()
        while not self._ending.wait(_EVERY_S):
            with contextlib.suppress(BrokerUnreachable):
                self._send()
        with contextlib.suppress(BrokerUnreachable):
            self._conclude()

    def _send_older(self) -> None:
        for folder in sorted(self.folder.parent.iterdir()):
            if folder.name == self.run or (folder / "refused.txt").exists():
                continue
            with contextlib.suppress(BrokerUnreachable, BlockingIOError):
                older = Shipment(self._client, folder)
                try:
                    older._conclude()
                finally:
                    older._lock.close()

    def _send(self) -> None:
        """What there is by now."""
        file = self.folder / FILE
        if file.exists():
            with file.open("rb") as records:
                while True:
                    records.seek(self._offset)
                    data = records.read(_PIECE_BYTES)
                    if not data:
                        break
                    taken = self._client.put_records(self.run, self._offset, data)
                    if taken == self._offset:  # half a record; the rest will come
                        break
                    self._offset = taken
        for path in self.folder.iterdir():
            if _SHA256.fullmatch(path.name):
                self._client.upload(path)
                path.unlink()

    def _conclude(self) -> None:
        try:
            self._send()
            ended: dict[str, Any] = {"state": "FAILED", "message": "its process was killed"}
            with contextlib.suppress(FileNotFoundError):
                ended = json.loads((self.folder / "ended.json").read_text())
            self._client.call("POST", f"/v1/runs/{self.run}/end", ended)
        except BrokerRefused as error:
            # Removed there, it may be: nobody will ever want these.
            (self.folder / "refused.txt").write_text(f"{error}\n")
            return
        shutil.rmtree(self.folder, ignore_errors=True)
