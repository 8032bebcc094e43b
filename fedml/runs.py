# SPDX-License-Identifier: Apache-2.0
"""A run as an object: what it is doing, what it says, and what came out of it.

    run = Run.submit("job.yaml")
    print(*run.logs(follow=True), sep="", end="")
    run.wait(check=True)

`fedml.aio` has the same for asyncio.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedml import launch, runfile
from fedml.client import At, Client, Told, silent
from fedml.client import at as _at
from fedml.errors import BrokerRefused, ConfigError, RunFailed

# The states in which nothing happens any more.
FINAL = frozenset({"FINISHED", "FAILED", "STOPPED", "LOST"})


class RunFacts:
    """What is known of a run: what `Run` and `fedml.aio.Run` have in common.

    Attributes:
        id: Unique for ever.
        details: Everything that the broker said of it when it was last looked at.
    """

    def __init__(self, client: Client, details: Mapping[str, Any]) -> None:
        self.id = str(details["id"])
        self.details = dict(details)
        self._client = client

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.state}>"

    @property
    def name(self) -> str:
        """As its file calls it."""
        return str(self.details["name"])

    @property
    def url(self) -> str:
        """Where the broker tells of it."""
        return f"{self._client.url}/v1/runs/{self.id}"

    @property
    def kind(self) -> str:
        """`launch`, `federate`, or `tracked`: driven by its own program."""
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
    def metrics(self) -> builtins.list[dict[str, float]]:
        """Of a federated run: the metrics of each round's model, from round 0 (the first model)."""
        return [dict(r["metrics"]) for r in self.details.get("rounds", ()) if r["model"]]


class Run(RunFacts):
    """One run of one broker, as it was when it was last looked at; `refresh` looks again."""

    @classmethod
    def submit(
        cls,
        file: Path | str,
        *,
        cluster: str = "",
        any_resource: bool = False,
        package: str = "",
        at: At = None,
    ) -> Run:
        """Send a job or run file; the run, which has only been queued.

        Args:
            file: A job file (docs/launch.md), a run file (docs/federate.md), or one of FedML's.
            cluster: On the machines that are reserved under this name.
            any_resource: On GPUs of any model, or none where no machine has them.
            package: In place of the workspace: a file that `fedml build` made, the name of a
                stored folder, or a hash.
            at: The home of a login (`~/.fedml`), or a client.

        Raises:
            ConfigError: The file or its workspace is wrong.
            BrokerRefused: No machine can ever run it, or the broker says no for another reason.
            BrokerUnreachable: No answer.
        """
        client, path = _at(at), Path(file)
        submit = launch.federate if runfile.is_federated(path) else launch.launch
        run = submit(client, path, any_resource=any_resource, cluster=cluster, package=package)
        return cls.find(run, at=client)

    @classmethod
    def find(cls, run: str, *, at: At = None) -> Run:
        """The run with this id.

        Raises:
            BrokerRefused: There is none.
        """
        client = _at(at)
        return cls(client, client.call("GET", f"/v1/runs/{run}"))

    @classmethod
    def current(cls, *, at: At = None) -> Run:
        """The run that this very process is a part of.

        Raises:
            ConfigError: It is not part of any.
        """
        run = os.environ.get("FEDML_CURRENT_RUN_ID")
        if not run:
            raise ConfigError("this is not a job: FEDML_CURRENT_RUN_ID is not set")
        return cls.find(run, at=at)

    @classmethod
    def list(cls, *, limit: int = 50, at: At = None) -> builtins.list[Run]:
        """The newest runs, newest first."""
        client = _at(at)
        return [cls(client, row) for row in client.call("GET", f"/v1/runs?limit={limit}")["runs"]]

    @property
    def metrics(self) -> builtins.list[dict[str, float]]:
        """Of a federated run: the metrics of each round's model, from round 0 (the first model)."""
        if "rounds" not in self.details:
            self.refresh()
        return super().metrics

    @property
    def outputs(self) -> dict[str, str]:
        """The values that it has left by name, once it has ended."""
        if "outputs" not in self.details:
            self.refresh()
        found: Mapping[str, str] = self.details.get("outputs", {}).get("values", {})
        return dict(found)

    @property
    def endpoint(self) -> str | None:
        """Of a service: the URL where it answered when that was last looked at; None: nowhere."""
        endpoint = self.details.get("endpoint")
        return None if endpoint is None else str(endpoint["url"])

    def refresh(self) -> Run:
        """Look again; itself."""
        self.details = dict(self._client.call("GET", f"/v1/runs/{self.id}"))
        return self

    def follow(self) -> Generator[dict[str, Any], None, None]:
        """Events and logs as they happen, until the run has ended; see `Client.follow`."""
        return self._client.follow(self.id)

    def logs(self, *, follow: bool = False) -> Generator[str, None, None]:
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

    def series(
        self, name: str | None = None, *, points: int = 1000
    ) -> builtins.list[dict[str, Any]]:
        """What its tasks have logged: `name`, `source` and `points` ([step, value, at]) each."""
        query = f"points={points}" + ("" if name is None else f"&name={quote(name, safe='')}")
        return list(self._client.call("GET", f"/v1/runs/{self.id}/metrics?{query}")["series"])

    def params(self) -> dict[str, str]:
        """What its tasks have logged as parameters."""
        found = self._client.call("GET", f"/v1/runs/{self.id}/params")["params"]
        return {p["name"]: p["value"] for p in found}

    def artifacts(self) -> builtins.list[dict[str, Any]]:
        """The files that its tasks have logged: `name`, `sha256`, `size`, `at`, `type`, `here`."""
        return list(self._client.call("GET", f"/v1/runs/{self.id}/artifacts")["artifacts"])

    def files(self) -> builtins.list[dict[str, Any]]:
        """All files of it, as `artifacts` tells them: those logged, and those in $FEDML_OUTPUT_DIR.

        The latter are of the type `output` and come when the job has ended.
        """
        if "outputs" not in self.details:
            self.refresh()
        left = [
            {"name": f["path"], "source": "outputs", "type": "output", "here": True, **f}
            for f in self.details.get("outputs", {}).get("files", [])
        ]
        return [*self.artifacts(), *left]

    def download_artifact(
        self,
        artifact: Mapping[str, Any],
        into: Path | str,
        *,
        told: Told = silent,
    ) -> Path:
        """Write one of `files` below a directory, by its name; what is there is replaced.

        Raises:
            BrokerRefused: Its bytes have not come yet, or its name leads out of the directory.
        """
        name = str(artifact["name"])
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise BrokerRefused(f"{name!r} is no name for a file here")
        if not artifact["here"]:
            raise BrokerRefused(
                f"{name} has not reached the broker yet", "its machine sends it: try again later"
            )
        file = Path(into) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        self._client.download(artifact["sha256"], file, told)
        return file

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
        told: Told = silent,
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


def _model(run: Run, wanted: int | None) -> tuple[int, Mapping[str, Any]]:
    if "rounds" not in run.details:
        raise BrokerRefused(
            f"{run.id} is a launched job: it has no model",
            "`fedml run download RUN` brings the files that it has logged and left",
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
