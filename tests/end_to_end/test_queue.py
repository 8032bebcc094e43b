# SPDX-License-Identifier: Apache-2.0
"""The queue on a real broker with two machines of one place each: order, gangs, clusters."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml.clusters import Cluster
from fedml.errors import BrokerRefused
from tests.place import Place, command

ONE_AT_ONCE = "[tasks]\nat_once = 1\n[resources]\nprice_per_hour = {}\n"
SAY = 'echo "$RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT, $PET_NNODES, $FEDML_NODE_1_ADDR"'
# Until the file is there; ended by TERM it says so.
HOLD = (
    "trap 'echo gives way; exit 143' TERM; "
    "while [ ! -e {} ]; do read -t 0.1 <> <(:); done; echo done"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    # A busy machine is not to cost an agent its tasks: nothing here waits for a lease to end.
    with Place(tmp_path_factory.mktemp("place"), lease_s=30.0) as place:
        place.agent("cheap", policy=ONE_AT_ONCE.format("0.5"))
        place.agent("dear", policy=ONE_AT_ONCE.format("4.0"))
        yield place


def fedml(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("fedml", *words),
        env={**os.environ, "FEDML_HOME": str(place.folder / "me")},
        capture_output=True,
        text=True,
    )


def running(place: Place, run: str) -> str:
    """Wait until it runs; the machine's name."""
    item = place.until(run, lambda i: i.get("event", {}).get("kind") == "started")
    return str(item["event"]["data"]["name"])


def holds(place: Place, tmp_path: Path, **more: Any) -> tuple[str, Path]:
    """A job that runs until the file is made; its run and the file."""
    flag = tmp_path / f"go-{len(list(tmp_path.iterdir()))}-{more.get('name', 'job')}"
    return place.launch(HOLD.format(flag), **more), flag


def test_each_task_of_a_job_on_two_machines_knows_the_other(place: Place) -> None:
    run = place.launch(SAY, nodes=2)
    place.finishes(run)
    lines = sorted(place.stdout(run).splitlines())
    assert [line.split()[0] for line in lines] == ["0", "1"]
    told = re.fullmatch(r"0 of 2 at (\S+):(\d+), 2, (\S+)", lines[0])
    assert told is not None
    assert told[1] == told[3] == "127.0.0.1"
    assert 20_000 <= int(told[2]) < 30_000
    assert lines[1].endswith(lines[0].removeprefix("0"))


@pytest.mark.timeout(240)  # torch is imported four times, two at once: long on a busy machine
def test_torchrun_needs_no_options(place: Place) -> None:
    pytest.importorskip("torch")
    # Without the last step, a rank that ends while the other is still there may abort.
    program = (
        "import torch, torch.distributed as d; d.init_process_group('gloo'); "
        "t = torch.tensor([d.get_rank() + 1.0]); d.all_reduce(t); print('sum', t.item()); "
        "d.destroy_process_group()"  # or else its threads may abort the process at its exit
    )
    script = f'cat > p.py <<"END"\n{program.replace("; ", chr(10))}\nEND\n'
    run = place.launch(f"{script}{sys.executable} -m torch.distributed.run p.py", nodes=2)
    place.finishes(run)
    assert place.stdout(run).split("\n").count("sum 3.0") == 2


def test_a_rank_that_fails_ends_the_others_and_gives_its_exit_code(place: Place) -> None:
    run = place.launch('[ "$RANK" = 1 ] && exit 9; exec sleep 600', nodes=2, grace_s=1)
    end = place.end(run)
    assert (end["state"], end["exit_code"]) == ("FAILED", 9)
    assert end["cause"]["message"] == "rank 1: its command ended with exit code 9"
    states = sorted(t.state for t in place.tasks(run))
    assert states == [6, 7]  # FAILED and STOPPED: none is left


def test_a_job_goes_where_it_may_cost_what_it_costs(place: Place) -> None:
    run = place.launch("true", max_price_per_hour=1.0)
    assert running(place, run) == "cheap"
    place.finishes(run)
    with pytest.raises(BrokerRefused, match=r"dear: costs 4 an hour, at most 0\.1 is allowed"):
        place.launch("true", max_price_per_hour=0.1)


def test_a_low_job_gives_way_comes_back_and_finishes(place: Place, tmp_path: Path) -> None:
    low, flag = holds(place, tmp_path, priority=-5, max_price_per_hour=1.0, retries=0)
    assert running(place, low) == "cheap"
    high = place.launch("echo first", max_price_per_hour=1.0)
    place.finishes(high)
    flag.touch()
    end = place.finishes(low)
    assert [t.epoch for t in place.tasks(low)] == [2]
    assert place.stdout(low).splitlines() == ["gives way", "done"]
    again = [
        i["event"]["data"]["why"]
        for i in place.follow(end["id"])
        if i.get("event", {}).get("kind") == "again"
    ]
    assert again == [f"{high} goes first"]


def test_the_queue_is_listed_in_its_order_with_reasons(place: Place, tmp_path: Path) -> None:
    busy = [holds(place, tmp_path, name=n, labels={}) for n in ("one", "two")]
    for run, _ in busy:
        running(place, run)
    waiting = [place.launch(f"echo {n}", name=n) for n in ("first", "second")]
    told = fedml(place, "run", "queue")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == waiting
    assert "busy: 1 of 1 tasks run" in lines[1]
    done = fedml(place, "run", "priority", waiting[1], "high")
    assert (done.returncode, done.stderr) == (0, f"{waiting[1]} has the priority 50\n")
    assert [q["id"] for q in place.client.call("GET", "/v1/queue")["queue"]] == waiting[::-1]
    shown = place.client.call("GET", f"/v1/runs/{waiting[1]}")
    assert (shown["position"], shown["priority"]) == (1, 50)
    wrong = fedml(place, "run", "priority", waiting[1], "urgent")
    assert wrong.returncode == 2
    for _, flag in busy:
        flag.touch()
    for run in waiting:
        place.finishes(run)


def test_a_job_starts_again_after_its_own_failure_if_it_asks_to(place: Place) -> None:
    run = place.launch("echo try; exit 3", restarts=1)
    end = place.end(run)
    assert (end["state"], end["exit_code"]) == ("FAILED", 3)
    assert place.stdout(run) == "try\ntry\n"


def test_a_cluster_keeps_its_machines_for_those_that_name_it(place: Place) -> None:
    made = fedml(place, "cluster", "create", "lab", "--device", "cheap")
    assert (made.returncode, made.stderr) == (0, "lab has cheap\n")
    job = place.home / "job.yaml"
    job.write_text("job: echo hello\ncluster: lab\n")
    ours = fedml(place, "launch", str(job))
    assert (ours.returncode, ours.stdout) == (0, "hello\n"), ours.stderr
    assert "runs on cheap" in ours.stderr
    other = place.launch("true")
    assert running(place, other) == "dear"
    place.finishes(other)
    with pytest.raises(BrokerRefused, match="cheap is in another cluster"):
        Cluster.create("second", ["cheap"], at=place.client)
    looked_at = place.client.call("POST", "/v1/launch/match", {"command": "true", "cluster": "lab"})
    assert {m["name"]: m["why"] for m in looked_at["machines"]} == {
        "cheap": "0 of its 1 places are taken",
        "dear": "is not in the cluster lab",
    }
    place.broker.kill()
    place.start_broker()
    other = place.launch("true")
    assert running(place, other) == "dear"  # also after the broker has died
    place.finishes(other)
    assert Cluster.find("lab", at=place.client).stop().status == "stopped"
    free = place.launch("true", max_price_per_hour=1.0)
    assert running(place, free) == "cheap"
    place.finishes(free)


def test_killing_a_cluster_stops_its_runs(place: Place, tmp_path: Path) -> None:
    cluster = Cluster.create("short", count=1, at=place.client, cpus=1)
    run, _ = holds(place, tmp_path, cluster="short", grace_s=1)
    running(place, run)
    told = fedml(place, "cluster", "kill", "short", "--yes")
    assert (told.returncode, told.stderr) == (0, f"short is forgotten; stopped {run}\n")
    assert place.end(run)["state"] == "STOPPED"
    with pytest.raises(BrokerRefused, match="no such cluster"):
        cluster.refresh()
