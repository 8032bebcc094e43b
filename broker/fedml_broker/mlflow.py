# SPDX-License-Identifier: Apache-2.0
"""Tracked runs as MLflow clients see them: experiments, runs, metrics, parameters, tags.

An MLflow run is a run of kind `tracked`; its id is ours. Experiment 0 is `Default`, as clients
expect. Runs of other kinds can be read as runs of that experiment, not written to.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit, experiments, runs
from fedml_broker.accounts import User
from fedml_broker.problems import Problem
from fedml_broker.tables import artifacts, metrics, params, tags, tracked
from fedml_broker.tables import experiments as experiment_table
from fedml_broker.tables import runs as run_table
from fedml_broker.tracking import set_params
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.records import MAX_NAME
from fedml_protocol.tasks import TaskState

MISSING, TAKEN, INVALID = (
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_PARAMETER_VALUE",
)
# The tag under which a client keeps the name of its run.
RUN_NAME = "mlflow.runName"

_STATUS = {"QUEUED": "SCHEDULED", "STOPPED": "KILLED", "LOST": "FAILED"}
_STATE = {"FINISHED": TaskState.FINISHED, "FAILED": TaskState.FAILED, "KILLED": TaskState.STOPPED}
_MOST_RUNS = 1000


def missing(what: str) -> Problem:
    """There is no such thing here."""
    return Problem(404, MISSING, what)


# ---------------------------------------------------------------------- experiments


def experiment(tx: Connection, user: User, given: object) -> dict[str, Any]:
    """An experiment by the number that clients give; number 0 is made when it is asked for.

    Raises:
        Problem: 404.
    """
    text = str(given)
    if text == "0":
        number = experiments.of_name(tx, user, experiments.DEFAULT)
    elif text.isascii() and text.isdigit() and len(text) < 18:
        number = int(text)
    else:
        raise Problem(400, INVALID, f"{text!r} is not the id of an experiment")
    found = experiments.get(tx, user.tenant, number)
    if found is None:
        raise missing(f"no experiment {text!r}")
    return found


def shown_experiment(row: dict[str, Any]) -> dict[str, Any]:
    """As the API shows it."""
    number = _number(row)
    made = int(row["created_at"] * 1000)
    return {
        "experiment_id": number,
        "name": row["name"],
        "artifact_location": f"mlflow-artifacts:/{number}",
        "lifecycle_stage": "deleted" if row["deleted"] else "active",
        "creation_time": made,
        "last_update_time": made,
        "tags": _pairs(row["tags"]),
    }


def _number(row: dict[str, Any]) -> str:
    return "0" if row["name"] == experiments.DEFAULT else str(row["id"])


def create_experiment(tx: Connection, user: User, name: str, said: dict[str, str]) -> str:
    """A new experiment; the id for clients."""
    _check_name("name", name)
    if experiments.find(tx, user.tenant, name) is not None:
        raise Problem(400, TAKEN, f"there is an experiment {name!r}; it may be deleted")
    number = experiments.create(tx, user, name, said)
    return "0" if name == experiments.DEFAULT else str(number)


def search_experiments(
    tx: Connection, user: User, said: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """Experiments that fit, and the token of the next page."""
    experiments.of_name(tx, user, experiments.DEFAULT)
    query = (
        sa.select(experiment_table)
        .where(experiment_table.c.tenant == user.tenant)
        .order_by(experiment_table.c.id.desc())
    )
    found = [shown_experiment(dict(row)) for row in tx.execute(query).mappings()]
    found = _alive(found, said.get("view_type"), lambda one: str(one["lifecycle_stage"]))
    fits = _filter(str(said.get("filter") or ""), _of_experiment)
    return _page([one for one in found if fits(one)], said)


def change_experiment(tx: Connection, user: User, given: object, **values: Any) -> None:
    """Rename, delete or restore an experiment, or set its tags."""
    row = experiment(tx, user, given)
    if "name" in values:
        _check_name("new_name", values["name"])
    if values.get("deleted") and row["name"] == experiments.DEFAULT:
        raise Problem(400, INVALID, "the experiment Default stays")
    tx.execute(experiment_table.update().where(experiment_table.c.id == row["id"]).values(**values))
    what = ", ".join(sorted(values))
    who = audit.user(user.name)
    audit.note(tx, user.tenant, who, "experiment.change", str(row["id"]), what=what)


# ---------------------------------------------------------------------- runs


def create_run(tx: Connection, user: User, said: dict[str, Any]) -> str:
    """Begin a run; its id."""
    row = experiment(tx, user, said.get("experiment_id", "0"))
    if row["deleted"]:
        raise Problem(400, INVALID, f"the experiment {row['name']!r} is deleted")
    tagged = named(said.get("tags"))
    name = str(said.get("run_name") or tagged.get(RUN_NAME) or "run")[:MAX_NAME]
    run = runs.new_id()
    experiments.begin(tx, user, int(row["id"]), run, name)
    set_tags(tx, run, {**tagged, RUN_NAME: name})
    return run


def update_run(tx: Connection, user: User, run: str, said: dict[str, Any]) -> None:
    """Its status or its name."""
    status = said.get("status")
    if status == "RUNNING":
        runs.reopen(tx, run, user.name)
    elif status in _STATE:
        bad = status == "FAILED"
        cause = Cause(fault=Fault.TASK, message="its program says so") if bad else None
        runs.end(tx, run, _STATE[status], cause=cause)
    elif status not in (None, "SCHEDULED"):
        raise Problem(400, INVALID, f"status: {status!r}")
    if said.get("run_name"):
        set_tags(tx, run, {RUN_NAME: str(said["run_name"])})


def hide_run(tx: Connection, user: User, run: str, *, deleted: bool) -> None:
    """Delete a run for MLflow clients, or bring it back; `fedml` goes on showing it."""
    tx.execute(tracked.update().where(tracked.c.run == run).values(deleted=deleted))
    action = "run.hide" if deleted else "run.unhide"
    audit.note(tx, user.tenant, audit.user(user.name), action, run)


def writable(tx: Connection, user: User, run: str) -> None:
    """Refuse runs that are not there, of others, or no tracked ones."""
    row = tx.execute(sa.select(run_table).where(run_table.c.id == run)).first()
    if row is None or row.tenant != user.tenant:
        raise missing(f"no run {run!r}")
    if row.kind != runs.TRACKED:
        text = f"{run} is a {row.kind} run: its tasks record with fedml.mlops"
        raise Problem(400, INVALID, text)


def log_batch(tx: Connection, run: str, said: dict[str, Any]) -> None:
    """Keep metrics, parameters and tags. A metric that came before, to the digit, is a repeat."""
    rows = [_metric_row(run, one) for one in said.get("metrics") or []]
    for row in rows:
        same = [metrics.c[name] == value for name, value in row.items()]
        if tx.execute(sa.select(metrics.c.id).where(*same).limit(1)).first() is None:
            tx.execute(metrics.insert().values(**row))
    _set_params_once(tx, run, named(said.get("params") or []))
    set_tags(tx, run, named(said.get("tags") or []))


def _metric_row(run: str, said: dict[str, Any]) -> dict[str, Any]:
    name = said.get("key", "")
    _check_name("key", name)
    try:
        value = float(said["value"])
        step, at = int(said.get("step") or 0), int(said.get("timestamp") or 0) / 1000
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(400, INVALID, f"the metric {name!r}: {error}") from error
    finite = value if value - value == 0.0 else None
    return {"run": run, "source": "", "name": name, "step": step, "value": finite, "at": at}


def _set_params_once(tx: Connection, run: str, said: dict[str, str]) -> None:
    """As MLflow has it, a parameter keeps its first value."""
    query = sa.select(params.c.name, params.c.value).where(params.c.run == run)
    known = {row.name: row.value for row in tx.execute(query)}
    for name, value in said.items():
        _check_name("key", name)
        if known.get(name, value) != value:
            text = f"the parameter {name!r} of {run} is {known[name]!r} and stays so"
            raise Problem(400, INVALID, text)
    set_params(tx, run, "", {n: v for n, v in said.items() if n not in known})


def set_tags(tx: Connection, run: str, said: dict[str, str]) -> None:
    """Keep tags; the later one counts. One of them is the run's name."""
    for name, value in said.items():
        _check_name("key", name)
        tx.execute(tags.delete().where(tags.c.run == run, tags.c.name == name))
        tx.execute(tags.insert().values(run=run, name=name, value=value))
        if name == RUN_NAME and value:
            tx.execute(
                run_table.update().where(run_table.c.id == run).values(name=value[:MAX_NAME])
            )


def delete_tag(tx: Connection, run: str, name: str) -> None:
    """Forget a tag."""
    if not tx.execute(tags.delete().where(tags.c.run == run, tags.c.name == name)).rowcount:
        raise missing(f"no tag {name!r} of {run}")


def shown_runs(tx: Connection, wanted: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of runs as the API shows them, each metric with its value at the last step."""
    ids = [row.id for row in wanted]
    rank = sa.func.row_number().over(
        partition_by=(metrics.c.run, metrics.c.name),
        order_by=(metrics.c.step.desc(), metrics.c.at.desc(), metrics.c.id.desc()),
    )
    ranked = sa.select(metrics, rank.label("rank")).where(metrics.c.run.in_(ids)).subquery()
    data: dict[str, dict[str, list[Any]]] = {
        run: {"metrics": [], "params": [], "tags": []} for run in ids
    }
    for row in tx.execute(sa.select(ranked).where(ranked.c.rank == 1)):
        data[row.run]["metrics"].append(_shown_metric(row))
    for table, name in ((params, "params"), (tags, "tags")):
        for row in tx.execute(sa.select(table).where(table.c.run.in_(ids))):
            data[row.run][name].append({"key": row.name, "value": row.value})
    return [{"info": _info(row), "data": data[row.id], "inputs": {}} for row in wanted]


def _info(row: Any) -> dict[str, Any]:
    number = "0" if row.experiment_name in (None, experiments.DEFAULT) else str(row.experiment)
    info = {
        "run_id": row.id,
        "run_uuid": row.id,
        "run_name": row.name,
        "experiment_id": number,
        "user_id": row.user,
        "status": _STATUS.get(row.state, row.state),
        "start_time": int((row.started_at or row.created_at) * 1000),
        "artifact_uri": f"mlflow-artifacts:/{number}/{row.id}/artifacts",
        "lifecycle_stage": "deleted" if row.deleted else "active",
    }
    return info if row.ended_at is None else {**info, "end_time": int(row.ended_at * 1000)}


def _shown_metric(row: Any) -> dict[str, Any]:
    value = "NaN" if row.value is None else row.value
    return {"key": row.name, "value": value, "timestamp": int(row.at * 1000), "step": row.step}


def _runs(tenant: str) -> Any:
    joined = run_table.outerjoin(tracked, tracked.c.run == run_table.c.id).outerjoin(
        experiment_table, experiment_table.c.id == tracked.c.experiment
    )
    named = experiment_table.c.name.label("experiment_name")
    columns = (run_table, tracked.c.experiment, tracked.c.deleted, named)
    return sa.select(*columns).select_from(joined).where(run_table.c.tenant == tenant)


def get_run(tx: Connection, user: User, run: str) -> dict[str, Any]:
    """One run."""
    row = tx.execute(_runs(user.tenant).where(run_table.c.id == run)).first()
    if row is None:
        raise missing(f"no run {run!r}")
    return shown_runs(tx, [row])[0]


def search_runs(
    tx: Connection, user: User, said: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """Runs that fit, and the token of the next page."""
    numbers = [experiment(tx, user, one)["id"] for one in said.get("experiment_ids") or []]
    query = _runs(user.tenant).where(tracked.c.experiment.in_(numbers))
    rows = tx.execute(query.order_by(run_table.c.created_at.desc(), run_table.c.id)).all()
    found = shown_runs(tx, rows)
    view = said.get("run_view_type")
    found = _alive(found, view, lambda one: str(one["info"]["lifecycle_stage"]))
    fits = _filter(str(said.get("filter") or ""), _of_run)
    found = [one for one in found if fits(one)]
    for text in reversed(said.get("order_by") or []):
        key, _, direction = text.strip().partition(" ")
        kind, name = _key(key)
        known = [one for one in found if _of_run(one, kind, name) is not None]
        rest = [one for one in found if _of_run(one, kind, name) is None]
        down = direction.strip().upper() == "DESC"
        known.sort(key=lambda one: _of_run(one, kind, name), reverse=down)
        found = known + rest
    return _page(found, said)


def history(tx: Connection, user: User, run: str, name: str) -> list[dict[str, Any]]:
    """Every value of one metric."""
    get_run(tx, user, run)
    query = sa.select(metrics).where(metrics.c.run == run, metrics.c.name == name)
    return [_shown_metric(row) for row in tx.execute(query.order_by(metrics.c.step, metrics.c.id))]


def files(tx: Connection, run: str, folder: str) -> list[dict[str, Any]]:
    """What lies directly in a directory of a run's artifacts; paths from the run's own root."""
    query = sa.select(artifacts.c.name, artifacts.c.size).where(artifacts.c.run == run)
    before = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for row in tx.execute(query.order_by(artifacts.c.name)):
        if row.name.startswith(before):
            part, deeper, _ = row.name[len(before) :].partition("/")
            path = before + part
            found[path] = {"path": path, "is_dir": bool(deeper)}
            if not deeper:
                found[path]["file_size"] = row.size
    return list(found.values())


# ---------------------------------------------------------------------- searching

_TERM = re.compile(
    r"""\s*(?P<key>(?:\w+\.)?(?:`[^`]*`|"[^"]*"|[\w./-]+))\s*
    (?P<how>!=|<=|>=|=|<|>|I?LIKE\b|NOT\s+IN\b|IN\b)\s*
    (?P<value>'[^']*'|"[^"]*"|\([^)]*\)|-?[\w.+-]+)\s*(?:AND\b|$)""",
    re.IGNORECASE | re.VERBOSE,
)
_KINDS = {
    "metric": "metrics",
    "metrics": "metrics",
    "param": "params",
    "params": "params",
    "parameter": "params",
    "parameters": "params",
    "tag": "tags",
    "tags": "tags",
    "attribute": "info",
    "attributes": "info",
    "attr": "info",
    "run": "info",
}
_Look = Callable[[dict[str, Any], str, str], Any]


def _key(text: str) -> tuple[str, str]:
    kind, dot, name = text.partition(".")
    if not dot or kind.lower() not in _KINDS:
        kind, name = "info", text
    return _KINDS.get(kind.lower(), "info"), name.strip('`"')


def _filter(text: str, look: _Look) -> Callable[[dict[str, Any]], bool]:
    """What a filter says, as a function.

    Raises:
        Problem: 400 for what is none.
    """
    terms = []
    at = 0
    while text[at:].strip():
        found = _TERM.match(text, at)
        if found is None:
            raise Problem(400, INVALID, f"not a filter: {text[at:]!r}")
        kind, name = _key(found["key"])
        terms.append((kind, name, " ".join(found["how"].upper().split()), found["value"]))
        at = found.end()
    return lambda one: all(_holds(look(one, k, n), how, v) for k, n, how, v in terms)


def _holds(value: Any, how: str, said: str) -> bool:
    if value is None:
        return False
    if how in ("IN", "NOT IN"):
        listed = [part.strip().strip("'\"") for part in said.strip("()").split(",")]
        return (str(value) in listed) is (how == "IN")
    quoted = said[:1] in "'\""
    text = said[1:-1] if quoted else said
    if how in ("LIKE", "ILIKE"):
        pattern = re.escape(text).replace("%", ".*").replace("_", ".")
        flags = re.DOTALL | (re.IGNORECASE if how == "ILIKE" else 0)
        return re.fullmatch(pattern, str(value), flags) is not None
    try:
        other: Any = float(text) if isinstance(value, int | float) else text
    except ValueError:
        return False
    orders = {
        "=": value == other,
        "!=": value != other,
        "<": value < other,
        "<=": value <= other,
        ">": value > other,
        ">=": value >= other,
    }
    return bool(orders[how])


def _of_run(one: dict[str, Any], kind: str, name: str) -> Any:
    if kind != "info":
        value = next((p["value"] for p in one["data"][kind] if p["key"] == name), None)
        return None if value == "NaN" and kind == "metrics" else value
    also = {"Run ID": "run_id", "created": "start_time", "Created": "start_time"}
    return one["info"].get(also.get(name, name))


def _of_experiment(one: dict[str, Any], kind: str, name: str) -> Any:
    if kind == "tags":
        return next((p["value"] for p in one["tags"] if p["key"] == name), None)
    return one.get(name)


def _alive(
    found: list[dict[str, Any]], view: object, stage: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    if view == "ALL":
        return found
    wanted = "deleted" if view == "DELETED_ONLY" else "active"
    return [one for one in found if stage(one) == wanted]


def _page(found: list[dict[str, Any]], said: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    token = str(said.get("page_token") or "0")
    if not (token.isascii() and token.isdigit() and len(token) < 18):
        raise Problem(400, INVALID, f"page_token: {token!r}")
    start, most = int(token), int(said.get("max_results") or _MOST_RUNS)
    end = start + max(most, 1)
    return found[start:end], str(end) if end < len(found) else ""


def named(said: Any) -> dict[str, str]:
    """A list of ``{"key", "value"}`` as a mapping."""
    try:
        return {str(one["key"]): str(one.get("value", "")) for one in said or []}
    except (KeyError, TypeError, AttributeError) as error:
        raise Problem(400, INVALID, "a list of {key, value} is expected") from error


def _pairs(said: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": name, "value": value} for name, value in said.items()]


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise Problem(400, INVALID, f"{what}: 1 to {MAX_NAME} characters, got {name!r:.80}")
