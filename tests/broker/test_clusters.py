# SPDX-License-Identifier: Apache-2.0
"""Clusters with a real store and a clock moved by hand; also end_to_end/test_queue.py."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from fedml_broker.accounts import User
from fedml_broker.clusters import ClusterRequest, Clusters
from fedml_broker.dispatch import Dispatcher
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.launch import NeedsBody
from fedml_broker.match import Capacity
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_protocol.devices import Heartbeat
from fedml_protocol.tasks import Needs
from fedml_protocol.topics import Address

ANN = User(name="ann", tenant="acme", role="member")
EVE = User(name="eve", tenant="acme", role="member")
ROOT = User(name="root", tenant="acme", role="admin")


class Place:
    """Three machines that beat, and who reserves them."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.woken = 0
        self.store = Store.open(folder / "broker.db")
        self.fleet = Fleet(heartbeat_s=1e9, clock=lambda: self.now)
        capacity = Capacity(slots=1, cpus=4, memory_bytes=1 << 30, disk_bytes=1 << 30)
        for name in "abc":
            self.fleet.put(
                Machine(address=Address("acme", name), name=name, labels={}, capacity=capacity)
            )
            self.fleet.heard(name, 1, Heartbeat(free_slots=1))
        self.clusters = Clusters(self.store, self.fleet, cast(Dispatcher, self))

    def wake(self) -> None:
        """As the dispatcher's."""
        self.woken += 1

    def reserved(self) -> dict[str, str]:
        """What the fleet knows: machine -> cluster."""
        return {m.name: m.cluster for m in self.fleet if m.cluster}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    yield place
    place.store.close()


def of(*devices: str, name: str = "lab", **more: object) -> ClusterRequest:
    return ClusterRequest(name=name, devices=list(devices), **more)  # type: ignore[arg-type]


async def test_machines_are_reserved_given_back_and_reserved_again(place: Place) -> None:
    made = await place.clusters.create(ANN, of("a", "b"))
    assert [d["name"] for d in made["devices"]] == ["a", "b"]
    assert place.reserved() == {"a": "lab", "b": "lab"}
    assert (await place.clusters.stop(ANN, "lab"))["status"] == "stopped"
    assert place.reserved() == {}
    await place.clusters.start(ANN, "lab")
    assert place.reserved() == {"a": "lab", "b": "lab"}
    assert await place.clusters.remove(ANN, "lab") == []
    assert place.reserved() == {}
    assert place.woken == 4  # whoever waits for a machine looks again


async def test_a_restart_reserves_what_was_reserved(place: Place) -> None:
    await place.clusters.create(ANN, of("a"))
    await place.clusters.create(ANN, of("b", name="off"))
    await place.clusters.stop(ANN, "off")
    for device in "abc":
        place.fleet.reserve(device, "")
    await Clusters(place.store, place.fleet, cast(Dispatcher, place)).load()
    assert place.reserved() == {"a": "lab"}


async def test_a_machine_is_in_one_cluster_at_a_time(place: Place) -> None:
    await place.clusters.create(ANN, of("a"))
    with pytest.raises(Problem, match="another cluster"):
        await place.clusters.create(EVE, of("a", "b", name="mine"))
    assert place.reserved() == {"a": "lab"}
    await place.clusters.stop(ANN, "lab")
    await place.clusters.create(EVE, of("a", name="mine"))
    with pytest.raises(Problem, match="another cluster"):
        await place.clusters.start(ANN, "lab")


async def test_so_many_as_are_asked_for_of_those_that_are_free(place: Place) -> None:
    busy = place.fleet.get("a")
    assert busy is not None
    place.fleet.hold(busy, "t", Needs())
    made = await place.clusters.create(ANN, of(count=2))
    assert [d["name"] for d in made["devices"]] == ["b", "c"]
    with pytest.raises(Problem, match="too few machines") as refused:
        await place.clusters.create(ANN, of(count=1, name="more", needs=NeedsBody(cpus=9)))
    assert "  a: has 4 CPUs, 9 are asked for" in refused.value.detail


@pytest.mark.parametrize("verb", ["start", "stop", "remove", "autostop"])
async def test_only_who_has_made_it_and_admins_change_a_cluster(place: Place, verb: str) -> None:
    await place.clusters.create(ANN, of("a"))
    more = (5.0,) if verb == "autostop" else ()
    with pytest.raises(Problem, match="the cluster lab is ann's"):
        await getattr(place.clusters, verb)(EVE, "lab", *more)
    await getattr(place.clusters, verb)(ROOT, "lab", *more)


async def test_it_stops_by_itself_when_it_has_been_idle_for_long_enough(place: Place) -> None:
    await place.clusters.create(ANN, of("a", autostop_minutes=10.0))
    machine = place.fleet.get("a")
    assert machine is not None
    place.fleet.hold(machine, "t", Needs())
    await place.clusters.stop_idle()
    place.now += 3600
    await place.clusters.stop_idle()  # busy all the time, for all that is known
    assert place.reserved() == {"a": "lab"}
    place.fleet.free(machine, "t")
    await place.clusters.stop_idle()
    place.now += 599
    await place.clusters.stop_idle()
    assert place.reserved() == {"a": "lab"}
    place.now += 1
    await place.clusters.stop_idle()
    assert place.reserved() == {}


@pytest.mark.parametrize("name", ["", "a b", "x" * 200, "../up"])
async def test_a_name_that_cannot_be_is_refused(place: Place, name: str) -> None:
    with pytest.raises(Problem, match="cannot be a cluster's name"):
        await place.clusters.create(ANN, of("a", name=name))


async def test_a_name_that_is_taken_and_a_machine_that_is_not_there(place: Place) -> None:
    await place.clusters.create(ANN, of("a"))
    with pytest.raises(Problem, match="there is a cluster lab already"):
        await place.clusters.create(ANN, of("b"))
    with pytest.raises(Problem, match="no such machine"):
        await place.clusters.create(ANN, of("z", name="other"))
    with pytest.raises(Problem, match="no such cluster"):
        await place.clusters.show("acme", "nowhere")
    with pytest.raises(Problem, match="no such cluster"):
        await place.clusters.show("other", "lab")
