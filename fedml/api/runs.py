# SPDX-License-Identifier: Apache-2.0
"""Runs that exist already."""

import logging
import sys
from pathlib import Path
from typing import Any

from fedml.api.account import Home, connect
from fedml.api.answers import FedMLRunModelList, RunLogResult, RunStatus
from fedml.errors import BrokerRefused
from fedml.runs import Run

log = logging.getLogger(__name__)

_SEARCHED = 1000


def run_list(
    run_name: str | None = None,
    run_id: str | None = None,
    platform: str = "falcon",
    api_key: str | None = None,
    *,
    home: Home = None,
) -> FedMLRunModelList:
    """The newest runs, or those of a name or id. No matter what `platform` is."""
    return FedMLRunModelList.of(_found(run_name, run_id, api_key, home))


def run_status(
    run_name: str | None = None,
    run_id: str | None = None,
    platform: str = "falcon",
    api_key: str | None = None,
    *,
    home: Home = None,
) -> tuple[FedMLRunModelList, RunStatus]:
    """The runs of a name or id, and the status of the newest: UNDETERMINED if there is none."""
    found = _found(run_name, run_id, api_key, home)
    status = RunStatus.of(found[0]) if found else RunStatus.UNDETERMINED
    return FedMLRunModelList.of(found), status


def run_stop(
    run_id: str, platform: str = "falcon", api_key: str | None = None, *, home: Home = None
) -> bool:
    """Ask for a run's end; whether there is such a run. Why not is logged."""
    try:
        Run.find(run_id, at=connect(api_key, home=home)).stop()
    except BrokerRefused as error:
        log.warning("%s is not stopped: %s", run_id, error)
        return False
    return True


def run_logs(
    run_id: str,
    page_num: int = 1,
    page_size: int = 10,
    need_all_logs: bool = False,
    platform: str = "falcon",
    api_key: str | None = None,
    *,
    home: Home = None,
) -> RunLogResult:
    """A page of what its tasks have printed, from 1; or, with `need_all_logs`, all.

    To read on as they come: `fedml.Run.find(run).logs(follow=True)`.
    """
    run = Run.find(run_id, at=connect(api_key, home=home))
    return RunLogResult.of(run, page_num, page_size, everything=need_all_logs)


def fedml_logs(
    client: bool = True,
    server: bool = False,
    docker: bool = False,
    docker_rank: int = 1,
    *,
    home: Home = None,
) -> None:
    """Print what the newest run has printed; its parts are all at the broker.

    Raises:
        BrokerRefused: There are no runs yet.
    """
    newest = Run.list(limit=1, at=connect(home=home))
    if not newest:
        raise BrokerRefused("there are no runs yet", "fedml launch job.yaml")
    for text in newest[0].logs():
        sys.stdout.write(text)


def queue(*, home: Home = None) -> list[dict[str, Any]]:
    """The runs that wait for machines, in the order in which they go, each with what keeps it."""
    found: list[dict[str, Any]] = connect(home=home).call("GET", "/v1/queue")["queue"]
    return found


def run_show(run: str, *, home: Home = None) -> Run:
    """One run."""
    return Run.find(run, at=connect(home=home))


def run_wait(run: str, *, check: bool = False, home: Home = None) -> Run:
    """Until it has ended; with `check`, RunFailed if it did not finish."""
    return run_show(run, home=home).wait(check=check)


def run_download(
    run: str, into: Path | str, *, of_round: int | None = None, home: Home = None
) -> int:
    """Write the model of a federated run into a file; of which round it is."""
    return run_show(run, home=home).download(into, of_round=of_round)


def _found(name: str | None, run: str | None, api_key: str | None, home: Home) -> list[Run]:
    client = connect(api_key, home=home)
    if run:
        try:
            return [found for found in [Run.find(run, at=client)] if name in (None, found.name)]
        except BrokerRefused as error:
            log.warning("%s", error)
            return []
    if name is None:
        return Run.list(at=client)
    return [found for found in Run.list(limit=_SEARCHED, at=client) if found.name == name]
