# SPDX-License-Identifier: Apache-2.0
"""Machines reserved under a name."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedml.api.account import Home, connect
from fedml.api.answers import FedMLClusterModelList
from fedml.client import Client
from fedml.clusters import Cluster
from fedml.errors import BrokerRefused

log = logging.getLogger(__name__)

# One name, or several.
Names = str | Sequence[str]


def cluster_create(
    name: str,
    devices: Sequence[str] = (),
    *,
    count: int = 0,
    labels: Mapping[str, str] | None = None,
    home: Home = None,
    **needs: Any,
) -> Cluster:
    """Reserve machines under a name; see `fedml.Cluster.create`."""
    client = connect(home=home)
    return Cluster.create(name, devices, count=count, labels=labels, at=client, **needs)


def cluster_show(name: str, *, home: Home = None) -> Cluster:
    """One cluster."""
    return Cluster.find(name, at=connect(home=home))


def cluster_list(
    cluster_names: Names = (), api_key: str | None = None, *, home: Home = None
) -> FedMLClusterModelList:
    """Every cluster, or those of these names that there are."""
    found = Cluster.list(at=connect(api_key, home=home))
    wanted = _named(cluster_names)
    return FedMLClusterModelList.of(c for c in found if not wanted or c.name in wanted)


def cluster_exists(cluster_name: str, api_key: str | None = None, *, home: Home = None) -> bool:
    """Whether there is such a cluster."""
    return bool(cluster_list((cluster_name,), api_key, home=home).cluster_list)


def cluster_status(
    cluster_name: str, api_key: str | None = None, *, home: Home = None
) -> tuple[str, FedMLClusterModelList]:
    """`up` or `stopped`, and the cluster in a list.

    Raises:
        BrokerRefused: There is no such cluster.
    """
    found = Cluster.find(cluster_name, at=connect(api_key, home=home))
    return found.status, FedMLClusterModelList.of([found])


def cluster_start(cluster_names: Names, api_key: str | None = None, *, home: Home = None) -> bool:
    """Reserve the machines of stopped clusters again; whether all are up. Why not is logged."""
    return _each(connect(api_key, home=home), _named(cluster_names), Cluster.start)


def cluster_startall(api_key: str | None = None, *, home: Home = None) -> bool:
    """The same for every cluster."""
    return _all(connect(api_key, home=home), Cluster.start)


def cluster_stop(cluster_names: Names, api_key: str | None = None, *, home: Home = None) -> bool:
    """Give the machines of clusters back and keep the names; whether all have."""
    return _each(connect(api_key, home=home), _named(cluster_names), Cluster.stop)


def cluster_stopall(api_key: str | None = None, *, home: Home = None) -> bool:
    """The same for every cluster."""
    return _all(connect(api_key, home=home), Cluster.stop)


def cluster_kill(cluster_names: Names, api_key: str | None = None, *, home: Home = None) -> bool:
    """Forget clusters and stop their runs; whether all are gone."""
    return _each(connect(api_key, home=home), _named(cluster_names), Cluster.kill)


def cluster_killall(api_key: str | None = None, *, home: Home = None) -> bool:
    """The same for every cluster."""
    return _all(connect(api_key, home=home), Cluster.kill)


def cluster_autostop(
    cluster_name: str, time: float, api_key: str | None = None, *, home: Home = None
) -> bool:
    """Stop by itself when it has been idle for so many minutes; whether there is such a cluster."""
    client = connect(api_key, home=home)
    return _each(client, [cluster_name], lambda cluster: cluster.autostop(time))


def _named(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else [*names]


def _all(client: Client, act: Callable[[Cluster], object]) -> bool:
    return _each(client, [cluster.name for cluster in Cluster.list(at=client)], act)


def _each(client: Client, names: Sequence[str], act: Callable[[Cluster], object]) -> bool:
    done = True
    for name in names:
        try:
            act(Cluster.find(name, at=client))
        except BrokerRefused as error:
            log.warning("the cluster %s: %s", name, error)
            done = False
    return done
