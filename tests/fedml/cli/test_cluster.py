# SPDX-License-Identifier: Apache-2.0
"""Clusters by command: several names at once, and those of others."""

import json
import re
from pathlib import Path

from fedml import session
from tests.fedml.cli.conftest import Fedml


def test_several_clusters_at_once_and_one_that_is_not_there_keeps_nobody(fedml: Fedml) -> None:
    fedml("cluster", "create", "uno", "--device", "one")
    fedml("cluster", "create", "dos", "--device", "two")
    assert re.search(r"^cluster +dos$", fedml("device", "show", "two").stdout, re.M)
    assert re.search(r"^one .* uno +\d", fedml("device", "list").stdout, re.M)
    done = fedml("cluster", "stop", "uno", "nowhere", "dos", code=6)
    assert "no such cluster: nowhere" in done.stderr
    assert "uno has given its machines back\ndos has given" in done.stderr
    found = json.loads(fedml("cluster", "start", "uno", "dos", "--json").stdout)
    assert [(c["name"], c["status"]) for c in found] == [("uno", "up"), ("dos", "up")]
    assert "dos" not in fedml("cluster", "list", "uno").stdout
    assert "uno is forgotten\ndos is forgotten\n" in fedml("cluster", "kill", "uno", "dos").stderr
    assert json.loads(fedml("cluster", "list", "--json").stdout) == []
    assert re.search(r"^cluster +none$", fedml("device", "show", "two").stdout, re.M)


def test_a_cluster_that_is_not_there_or_is_stopped_is_told_as_such(fedml: Fedml) -> None:
    job = fedml.file("job.yaml", "job: echo\n")
    fedml("cluster", "create", "off", "--device", "one")
    fedml("cluster", "stop", "off")
    for name, more in (("off", ()), ("none", ()), ("none", ("--dry-run",))):
        said = fedml("launch", job, "-c", name, *more, code=6).stderr
        assert f"no machine is reserved as {name}" in said
        assert f"`fedml cluster create {name} --device MACHINE`" in said
    fedml("cluster", "start", "off")
    fedml("launch", job, "-c", "off")
    fedml("cluster", "kill", "off")


def test_a_new_cluster_is_what_its_first_job_asks_for(fedml: Fedml) -> None:
    job = fedml.file("job.yaml", "job: echo $FEDML_NUM_NODES\nnum_nodes: 2\n")
    done = fedml("launch", job, "-c", "pair", "-y")
    assert sorted(done.stdout.splitlines()) == ["[0 one] 2", "[1 two] 2"]
    assert "reserved as pair: one, two; `fedml cluster kill pair` gives them back" in done.stderr
    again = fedml("launch", job, "-c", "pair", "-y")
    assert "FINISHED" in again.stderr
    assert "reserved" not in again.stderr
    # Who is too many for the machines that are left gets none of them.
    said = fedml("launch", job, "-c", "more", "-y", code=6).stderr
    assert "one: is kept for the cluster pair" in said
    (left,) = json.loads(fedml("cluster", "list", "--json").stdout)
    assert left["name"] == "pair"
    fedml("cluster", "kill", "pair")


def test_all_clusters_are_those_that_are_mine_to_change(fedml: Fedml, tmp_path: Path) -> None:
    call = fedml.place.client.call
    call("POST", "/v1/users", {"name": "cara", "role": "member"})
    session.login(tmp_path / "cara", call("POST", "/v1/users/cara/tokens", {})["key"])
    fedml("cluster", "create", "admins", "--device", "one")
    fedml("cluster", "create", "caras", "--device", "two", home=tmp_path / "cara")
    done = fedml("cluster", "killall", "--yes", home=tmp_path / "cara", code=6)
    assert "the cluster admins is admin's" in done.stderr
    assert "caras is forgotten" in done.stderr
    assert "admins is forgotten" in fedml("cluster", "killall", "--yes").stderr
