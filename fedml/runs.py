# SPDX-License-Identifier: Apache-2.0
"""A run as an object: what it is doing, what it says, and what came out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml.client import Client, Told
from fedml.errors import BrokerRefused, RunFailed

# The states in which nothing happens any more.
FINAL = frozenset({"FINISHED", "FAILED", "STOPPED", "LOST"})


@dataclass(frozen=True, slots=True)
class RunLogResult:
    """A page of a run's log, as FedML's `run_logs` gives it.

    Attributes:
        run_status: In FedML's words: STOPPED is KILLED there, LOST is FAILED.
        log_line_list: The lines of the page, or all.
    """

    run_status: str
    total_log_lines: int
    total_log_pages: int
    log_line_list: list[str]


class Run:
    """One run of one broker, as it was when it was last looked at.

    Attributes:
        id: Unique for ever.
        details: Everything that the broker says of it; `refresh` looks again.
    """

    def __init__(self, client: Client, details: Mapping[str, Any]) -> None:
        self.id = str(details["id"])
        self.details = dict(details)
        self._client = client

    @classmethod
    def find(cls, client: Client, run: str) -> Run:
        """The run with this id.

        Raises:
            BrokerRefused: There is none.
        """
        return cls(client, client.call("GET", f"/v1/runs/{run}"))

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.state}>"

    @property
    def name(self) -> str:
        """As its file calls it."""
        return str(self.details["name"])

    @property
    def kind(self) -> str:
        """`launch` or `federate`."""
        return str(self.details["kind"])

    @property
    def state(self) -> str:
        """QUEUED, RUNNING, FINISHED, FAILED, STOPPED or LOST."""
        return str(self.details["state"])

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state in FINAL

    @property
    def exit_code(self) -> int | None:
        """Of a launched job that has ended by itself."""
        code = self.details["exit_code"]
        return None if code is None else int(code)

    @property
    def cause(self) -> str:
        """Why it did not finish; empty while nothing is wrong."""
        cause = self.details["cause"]
        return "" if cause is None else str(cause["message"])

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Of a federated run: the metrics of each round's model, from round 0 (the first model)."""
        rounds = self.details.get("rounds")
        if rounds is None:
            rounds = self.refresh().details.get("rounds", [])
        return [dict(r["metrics"]) for r in rounds if r["model"]]

    @property
    def outputs(self) -> dict[str, str]:
        """The values that it has left by name, once it has ended."""
        if "outputs" not in self.details:
            self.refresh()
        found: Mapping[str, str] = self.details.get("outputs", {}).get("values", {})
        return dict(found)

    def refresh(self) -> Run:
        """Look again; itself."""
        self.details = dict(self._client.call("GET", f"/v1/runs/{self.id}"))
        return self

    def follow(self) -> Iterator[dict[str, Any]]:
        """Events and logs as they happen, until the run has ended; see `Client.follow`."""
        return self._client.follow(self.id)

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """What its tasks have printed, in pieces; with `follow` until the run has ended."""
        for item in self._client.follow(self.id, stay=follow):
            if "log" in item:
                yield item["log"]["text"]

    def log_lines(self, search: str = "", **query: Any) -> dict[str, Any]:
        """Lines of its logs that hold a text, in their order, and whether that is all.

        Args:
            query: `regex`, `case`, `context`, `since`, `tail`, `skip`, `limit`, `stream`, `task`;
                see docs/observe.md, as for the answer.
        """
        return self._client.logs(self.id, search=search, **query)

    def stop(self) -> None:
        """Ask for its end; again is harmless. `wait` tells when it has come."""
        self._client.call("POST", f"/v1/runs/{self.id}/stop")

    def wait(self, *, check: bool = False) -> Run:
        """Until it has ended; itself.

        Raises:
            RunFailed: With `check`: it did not finish. The text has the task's own traceback.
        """
        for _ in self._client.follow(self.id, logs=False):
            pass
        self.refresh()
        if check and self.state != "FINISHED":
            cause = self.details["cause"] or {}
            text = f"{self.id} {self.state}: {self.cause}"
            raise RunFailed(f"{text}\n{cause.get('traceback', '')}".rstrip(), cause.get("hint", ""))
        return self

    def download(
        self,
        into: Path | str,
        *,
        of_round: int | None = None,
        told: Told = lambda done, total: None,
    ) -> int:
        """Write the model of a federated run (safetensors) into a file; of which round it is.

        Args:
            into: The file; what is there is replaced, once everything has come.
            of_round: 0 is the first model, before any training; None the newest there is.
            told: Hears how far it is, bytes.

        Raises:
            BrokerRefused: The run has no such model.
        """
        number, blob = _model(self.refresh(), of_round)
        self._client.download(blob["sha256"], Path(into), told)
        return number

    def download_files(
        self, into: Path | str, *, told: Told = lambda done, total: None
    ) -> list[Path]:
        """Write the files that a job has left ($FEDML_OUTPUT_DIR) below a folder; where they are.

        Args:
            into: The folder; files that are there are replaced.
            told: Hears how far it is, bytes.

        Raises:
            BrokerRefused: It has left none.
        """
        if "outputs" not in self.details:
            self.refresh()
        files = self.details.get("outputs", {}).get("files", [])
        if not files:
            raise BrokerRefused(
                f"{self.id} has left no files" if self.ended else f"{self.id} has not ended",
                "a job leaves what it writes into the folder $FEDML_OUTPUT_DIR",
            )
        before, total, paths = 0, sum(file["size"] for file in files), []
        for file in files:
            path = Path(into) / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._client.download(
                file["sha256"],
                path,
                lambda done, _, before=before: told(before + done, total),  # type: ignore[misc]
            )
            before += file["size"]
            paths.append(path)
        return paths


def log_page(run: Run, number: int, size: int, *, everything: bool) -> RunLogResult:
    """A page of the lines of a run, counted from 1; or all of them.

    Raises:
        ValueError: There is no such page in any run.
    """
    if number < 1 or size < 1:
        raise ValueError(f"pages and their size count from 1, got {number} and {size}")
    status = {"STOPPED": "KILLED", "LOST": "FAILED"}.get(run.state, run.state)
    if everything:
        lines = "".join(run.logs()).splitlines()
        return RunLogResult(status, len(lines), -(-len(lines) // size), lines)
    found = run.log_lines(skip=(number - 1) * size, limit=size)
    total = found["total"]
    return RunLogResult(status, total, -(-total // size), [line["text"] for line in found["lines"]])


def _model(run: Run, wanted: int | None) -> tuple[int, Mapping[str, Any]]:
    if "rounds" not in run.details:
        raise BrokerRefused(
            f"{run.id} is a launched job: it has no model",
            "the files that it has left: `download_files`, or `fedml run download`",
        )
    models = {r["round"]: r["model"] for r in run.details["rounds"] if r["model"]}
    if not models:
        raise BrokerRefused(f"{run.id} has no model yet", f"fedml run logs -f {run.id}")
    number = max(models) if wanted is None else wanted
    if number not in models:
        raise BrokerRefused(
            f"{run.id} has no model of round {number}", f"rounds 0 to {max(models)} have one"
        )
    return number, models[number]
