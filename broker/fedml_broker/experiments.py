# SPDX-License-Identifier: Apache-2.0
"""Experiments: what tracked runs are sorted into, by the names that MLflow clients give."""

import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit, runs
from fedml_broker.accounts import User
from fedml_broker.tables import experiments, tracked

DEFAULT = "Default"


def find(tx: Connection, tenant: str, name: str) -> dict[str, Any] | None:
    """The experiment of this name, deleted ones too."""
    mine = sa.select(experiments).where(experiments.c.tenant == tenant, experiments.c.name == name)
    row = tx.execute(mine).mappings().first()
    return None if row is None else dict(row)


def get(tx: Connection, tenant: str, number: int) -> dict[str, Any] | None:
    """The experiment of this number, if it is the tenant's."""
    mine = sa.select(experiments).where(experiments.c.tenant == tenant, experiments.c.id == number)
    row = tx.execute(mine).mappings().first()
    return None if row is None else dict(row)


def create(tx: Connection, user: User, name: str, tags: dict[str, str] | None = None) -> int:
    """A new experiment; its number."""
    done = tx.execute(
        experiments.insert().values(
            tenant=user.tenant, name=name, deleted=False, tags=tags or {}, created_at=time.time()
        )
    )
    assert done.inserted_primary_key is not None
    number = int(done.inserted_primary_key[0])
    audit.note(tx, user.tenant, audit.user(user.name), "experiment.create", str(number), name=name)
    return number


def of_name(tx: Connection, user: User, name: str) -> int:
    """The number of an experiment, which is made if it is not there."""
    found = find(tx, user.tenant, name)
    return create(tx, user, name) if found is None else int(found["id"])


def begin(tx: Connection, user: User, experiment: str | int, run: str, name: str) -> None:
    """Begin a tracked run in an experiment, given by name or number.

    Raises:
        SubmittedBefore: This very run is there.
    """
    number = experiment if isinstance(experiment, int) else of_name(tx, user, experiment)
    spec = {"experiment": number}
    runs.create(tx, user, run=run, kind=runs.TRACKED, name=name, spec=spec, package=None)
    runs.running(tx, run)
    tx.execute(tracked.insert().values(run=run, experiment=number, deleted=False))
