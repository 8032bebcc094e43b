# SPDX-License-Identifier: Apache-2.0
"""The machine owner's say: what each setting refuses, that it is never silently wider."""

import dataclasses
import datetime
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_agent.policy import (
    ENGINES,
    KINDS,
    REQUIRABLE,
    Held,
    Policy,
    Request,
    check,
    closed,
    explain,
    may_use,
    time_limit_s,
)
from fedml_agent.policy_file import (
    EXPLAINED,
    PolicyError,
    describe,
    load,
    load_or_refuse,
    parse,
)

NOON = datetime.time(12, 0)
GB = 10**9


def asked(**more: Any) -> Request:
    plain: dict[str, Any] = {
        "kind": "launch",
        "publisher": "ada",
        "tenant": "acme",
        "at": NOON,
        "held": Held(),
        "disk_free": 100 * GB,
        "epsilon_spent": 0.0,
        "devices": ((0, "GPU-a"), (1, "GPU-b", "MIG-b1"), (1, "GPU-b", "MIG-b2")),
    }
    return Request(**plain | more)


def refused_by(policy: Policy, **more: Any) -> str | None:
    refusal = check(policy, asked(**more))
    return None if refusal is None else refusal.rule


# ---- what each setting refuses

TABLE: list[tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = [
    # rule, settings, a request that passes (None: none does), a request that is refused
    ("tasks.kinds", {"kinds": ("federate",)}, {"kind": "federate"}, {"kind": "launch"}),
    ("tasks.kinds", {}, {"kind": "federate"}, {"kind": "mine-bitcoin"}),
    ("tasks.commands", {"commands": False}, {}, {"commands": True}),
    ("tasks.installs", {"installs": False}, {}, {"installs": True}),
    ("tasks.at_once", {"at_once": 2}, {"held": Held(tasks=1)}, {"held": Held(tasks=2)}),
    ("tasks.run_time", {"run_time_s": 60}, {"deadline_s": 60.0}, {"deadline_s": 61.0}),
    (
        "tasks.hours",
        {"hours": ((22 * 60, 6 * 60),)},
        {"at": datetime.time(22, 0)},
        {"at": datetime.time(6, 0)},
    ),
    (
        "tasks.hours",
        {"hours": ((22 * 60, 6 * 60),)},
        {"at": datetime.time(5, 59, 59)},
        {"at": datetime.time(21, 59, 59)},
    ),
    ("tasks.hours", {"hours": ()}, None, {}),
    ("publishers.allow", {"publishers": ("a*",)}, {}, {"publisher": "bob"}),
    ("publishers.allow", {"publishers": ("acme/*",)}, {}, {"tenant": "evil", "publisher": "acme"}),
    ("publishers.allow", {"publishers": ("ada",)}, {}, {"publisher": "Ada"}),
    ("publishers.deny", {"publishers_denied": ("mal*",)}, {}, {"publisher": "mallory"}),
    ("publishers.deny", {"publishers_denied": ("evil/*",)}, {}, {"tenant": "evil"}),
    ("resources.gpus", {}, {"gpus": 3}, {"gpus": 4}),
    ("resources.gpus", {"gpus": (0,)}, {"gpus": 1}, {"gpus": 2}),
    ("resources.gpus", {"gpus": ("GPU-b",)}, {"gpus": 2}, {"gpus": 3}),
    ("resources.gpus", {"gpus": ("MIG-b1", 0)}, {"gpus": 2}, {"gpus": 3}),
    ("resources.gpus", {"gpus": (0, "GPU-a")}, {"gpus": 1}, {"gpus": 2}),
    ("resources.gpus", {"gpus": ()}, {"gpus": 0}, {"gpus": 1}),
    ("resources.gpus", {}, {"gpus": 1, "held": Held(gpus=2)}, {"gpus": 1, "held": Held(gpus=3)}),
    ("resources.gpus", {}, {"devices": ()}, {"gpus": 1, "devices": ()}),
    ("resources.cpus", {"cpus": 2.0}, {"cpus": 2.0}, {"cpus": 1.0, "held": Held(cpus=1.5)}),
    (
        "resources.memory",
        {"memory": 4 * GB},
        {"memory": GB, "held": Held(memory=3 * GB)},
        {"memory": GB + 1, "held": Held(memory=3 * GB)},
    ),
    ("resources.disk_reserve", {}, {"disk": 98 * GB}, {"disk": 98 * GB + 1}),
    ("resources.disk_reserve", {}, {"disk_free": 2 * GB}, {"disk_free": 2 * GB - 1}),
    (
        "privacy.secure_aggregation_only",
        {"secure_aggregation_only": True},
        {"kind": "federate", "secure_aggregation": True},
        {"kind": "federate"},
    ),
    (
        "privacy.secure_aggregation_only",
        {"secure_aggregation_only": True, "data": {"heart": "/x"}, "require": ()},
        {},
        # Where data cannot be hidden from a launched task, it is as good as one that reads it; and
        # it has nobody to add up with: what it says of itself does not count.
        {"cannot": {"hide": "no"}, "secure_aggregation": True},
    ),
    (
        "privacy.max_epsilon",
        {"max_epsilon": 0.3},
        {"kind": "federate", "epsilon": 0.2, "epsilon_spent": 0.1},
        {"kind": "federate", "epsilon": 0.2, "epsilon_spent": 0.11},
    ),
    (
        "privacy.max_epsilon",
        {"max_epsilon": 100.0},
        {"epsilon_spent": 100.0},
        {"kind": "federate", "epsilon": None},
    ),
    (
        "network.federated",
        {},
        {"kind": "launch", "network": True},
        {"kind": "federate", "network": True},
    ),
    (
        "network.federated",
        {},
        {"kind": "launch", "cannot": {"network": "no"}},
        {"kind": "federate", "cannot": {"network": "no"}},
    ),
    (
        "network.jobs",
        {"jobs_network": False},
        {"network": False},
        {"network": True},
    ),
    (
        "network.services",
        {"services": False},
        {"network": True},
        {"network": True, "serves": True},
    ),
    ("containers.allow", {}, {}, {"image": "docker.io/library/python:3"}),
    (
        "containers.images",
        {"containers": True, "images": ("docker.io/library/*", "localhost/*")},
        {"image": "docker.io/library/python:3"},
        {"image": "docker.io/mallory/python:3"},
    ),
    (
        "containers.mounts",
        {"containers": True, "mounts": ("/srv/scans", "/scratch:rw")},
        {"image": "a", "mounts": (("/srv/scans", False), ("/scratch", True), ("/scratch", False))},
        {"image": "a", "mounts": (("/srv/scans", True),)},
    ),
    (
        "containers.mounts",
        {"containers": True, "mounts": ("/srv/scans",)},
        {"image": "a"},
        {"image": "a", "mounts": (("/srv/scans/x", False),)},  # it may be a link by then
    ),
    ("sandbox.require", {}, {"cannot": {"pids": "no"}}, {"cannot": {"hide": "no"}}),
    ("sandbox.require", {"require": ("pids",)}, {}, {"cannot": {"pids": "no"}}),
]


@pytest.mark.parametrize(("rule", "set_to", "passes", "refused"), TABLE)
def test_each_setting_refuses_what_it_says_and_nothing_else(
    rule: str, set_to: dict[str, Any], passes: dict[str, Any] | None, refused: dict[str, Any]
) -> None:
    policy = Policy(**set_to)
    if passes is not None:
        assert refused_by(policy, **passes) is None
    assert refused_by(policy, **refused) == rule


def test_the_table_above_covers_every_rule() -> None:
    assert {row[0] for row in TABLE} == {one.rule for one in explain(Policy(), asked())}


def test_the_defaults_let_an_ordinary_task_run() -> None:
    for kind in KINDS:
        assert refused_by(Policy(), kind=kind, commands=True, gpus=1) is None


def test_an_owner_can_give_federated_workers_the_network() -> None:
    assert refused_by(Policy(federated_network=True), kind="federate", network=True) is None


def test_a_task_that_asks_for_nothing_runs_beside_those_that_hold_too_much_by_now() -> None:
    held = Held(gpus=3, cpus=3.0, memory=80)
    tightened = Policy(gpus=(), cpus=1.0, memory=10, max_epsilon=1.0)
    assert refused_by(tightened, held=held, epsilon_spent=2.0) is None
    assert refused_by(tightened, held=held, memory=1) == "resources.memory"


def test_a_refusal_says_which_rule_what_was_asked_and_what_may_be() -> None:
    refusal = check(
        Policy(memory=4 * GB), asked(memory=3 * GB, held=Held(memory=2 * GB), commands=True)
    )
    assert str(refusal) == (
        "refused by this machine's owner (resources.memory): 3 GB; "
        "may be: at most 4 GB, 2 GB of it taken"
    )


@pytest.mark.parametrize(
    ("set_to", "more", "passing"),
    [
        ({"broken": "line 3"}, {}, True),
        ({"kinds": ()}, {}, False),
        ({"commands": False}, {"commands": True}, False),
        ({"publishers": ()}, {}, False),
        ({"run_time_s": 60}, {"deadline_s": 61.0}, False),
        ({"hours": ((0, 60),)}, {}, True),
        ({"hours": ()}, {}, False),
        ({"at_once": 1}, {"held": Held(tasks=1)}, True),
        ({"at_once": 0}, {}, False),
        ({}, {"gpus": 1, "held": Held(gpus=3)}, True),
        ({}, {"gpus": 4}, False),
        ({"memory": GB}, {"memory": GB, "held": Held(memory=1)}, True),
        ({"memory": GB}, {"memory": GB + 1}, False),
        ({"cpus": 1.0}, {"cpus": 1.0, "held": Held(cpus=0.5)}, True),
        ({}, {"disk_free": GB}, True),
        ({"secure_aggregation_only": True}, {"kind": "federate"}, False),
        ({"max_epsilon": 1.0}, {"kind": "federate"}, False),
        ({}, {"kind": "federate", "network": True}, False),
        ({}, {"kind": "federate", "cannot": {"network": "no"}}, True),
        ({}, {"cannot": {"hide": "no"}}, True),
    ],
)
def test_a_refusal_knows_whether_waiting_may_help(
    set_to: dict[str, Any], more: dict[str, Any], passing: bool
) -> None:
    refusal = check(Policy(**set_to), asked(**more))
    assert refusal is not None
    assert refusal.passing is passing


@pytest.mark.parametrize(
    ("set_to", "says"),
    [
        ({"secure_aggregation_only": True}, "federated runs have no secure aggregation yet"),
        ({"max_epsilon": 2.0}, "differential privacy, which federated runs cannot give yet"),
    ],
)
def test_a_floor_that_nothing_can_meet_yet_says_so(set_to: dict[str, Any], says: str) -> None:
    assert says in str(check(Policy(**set_to), asked(kind="federate")))
    assert check(Policy(**set_to), asked(kind="launch", commands=True)) is None


@pytest.mark.parametrize(
    ("set_to", "more", "says"),
    [
        ({}, {}, ""),
        ({"broken": "policy.toml:3: no"}, {}, "policy file cannot be used until it is mended: pol"),
        ({"kinds": ()}, {}, "its owner takes no tasks"),
        ({"at_once": 0}, {}, "its owner takes no tasks"),
        ({}, {"cannot": {"hide": "no namespaces"}}, "no 'hide': no namespaces"),
        ({}, {"cannot": {"pids": "no namespaces"}}, ""),
        ({"require": ()}, {"cannot": {"hide": "no namespaces"}}, ""),
        ({}, {"disk_free": GB}, "its disk is low: 1.0 GB are free, 2 GB must stay free"),
        ({"hours": ((0, 60),)}, {}, "takes tasks only at 00:00-01:00 of its local time"),
        ({"hours": ((0, 780),)}, {}, ""),
    ],
)
def test_what_closes_the_whole_machine_is_said_before_anybody_asks(
    set_to: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    told = closed(Policy(**set_to), **{"at": NOON, "disk_free": 9 * GB, "cannot": {}} | more)
    assert (says in told) if says else told == ""


def test_explain_lists_every_rule_with_its_verdict() -> None:
    policy = Policy(commands=False, gpus=())
    rulings = {one.rule: one.ok for one in explain(policy, asked(commands=True, gpus=1))}
    assert len(rulings) == 21
    assert {rule for rule, ok in rulings.items() if not ok} == {"tasks.commands", "resources.gpus"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpus": -1},
        {"memory": -1},
        {"epsilon": -5.0},
        {"epsilon": float("nan")},
        {"epsilon_spent": float("nan")},
        {"deadline_s": -1.0},
        {"tenant": "acme/ada"},
        {"publisher": "acme/ada"},
    ],
)
def test_a_request_that_makes_no_sense_is_not_even_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be a number|no slash"):
        asked(**wrong)


# ---- limits that hold while a task runs


@pytest.mark.parametrize(
    ("set_to", "at", "deadline_s", "limit"),
    [
        ({}, NOON, None, None),
        ({}, NOON, 5.0, 5.0),
        ({"run_time_s": 60}, NOON, None, 60),
        ({"run_time_s": 60}, NOON, 30.0, 30.0),
        ({"hours": ((22 * 60, 6 * 60),)}, datetime.time(23, 0), None, 7 * 3600),
        ({"hours": ((22 * 60, 6 * 60),)}, datetime.time(5, 59, 30), None, 30),
        ({"hours": ((22 * 60, 1440), (0, 6 * 60))}, datetime.time(23, 0), None, 7 * 3600),
        ({"hours": ((0, 1440),)}, NOON, None, None),
        ({"hours": ((0, 720), (720, 1440))}, NOON, 7.0, 7.0),
        ({"hours": ()}, NOON, None, 0),
        ({"hours": ((780, 840),)}, NOON, None, 0),
    ],
)
def test_a_task_is_stopped_at_the_first_limit(
    set_to: dict[str, Any], at: datetime.time, deadline_s: float | None, limit: float | None
) -> None:
    assert time_limit_s(Policy(**set_to), at, deadline_s) == limit


@given(
    st.lists(st.tuples(st.integers(0, 1439), st.integers(0, 1440)).filter(lambda w: w[0] != w[1])),
    st.times(),
)
def test_hours_are_open_exactly_within_a_window(
    windows: list[tuple[int, int]], at: datetime.time
) -> None:
    minute = at.hour * 60 + at.minute
    is_open = any(
        first <= minute < end if first < end else minute >= first or minute < end
        for first, end in windows
    )
    refused = refused_by(Policy(hours=tuple(windows)), at=at)
    assert refused == (None if is_open else "tasks.hours")


@pytest.mark.parametrize(
    ("gpus", "usable"),
    [
        (None, [True, True, True]),
        ((), [False, False, False]),
        ((0,), [True, False, False]),
        (("GPU-b",), [False, True, True]),
        (("MIG-b2",), [False, False, True]),
    ],
)
def test_a_gpu_may_be_named_by_number_uuid_or_instance(
    gpus: tuple[int | str, ...] | None, usable: list[bool]
) -> None:
    assert [may_use(Policy(gpus=gpus), one) for one in asked().devices] == usable


def test_a_gpu_without_a_readable_uuid_can_only_be_named_by_number() -> None:
    assert may_use(Policy(gpus=(3,)), (3, None))
    assert not may_use(Policy(gpus=("GPU-a",)), (3, None))


# ---- the law: tighter never lets more in

names = st.sampled_from(["ada", "bob", "acme", "a"])
patterns = st.sampled_from(["*", "a*", "ada", "acme/*", "*/bob", "bob", "x"])
windows = st.tuples(st.integers(0, 1439), st.integers(1, 1440)).filter(lambda w: w[0] != w[1])
gpu_names = st.sampled_from([0, 1, "GPU-a", "GPU-b", "MIG-b1"])


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=4, unique=True).map(tuple)


policies = st.builds(
    Policy,
    kinds=some(st.sampled_from(KINDS)),
    commands=st.booleans(),
    installs=st.booleans(),
    at_once=st.none() | st.integers(0, 5),
    run_time_s=st.none() | st.integers(0, 100),
    hours=st.none() | some(windows),
    publishers=some(patterns),
    publishers_denied=some(patterns),
    data=st.dictionaries(names, st.just("/x")),
    gpus=st.none() | some(gpu_names),
    end_trespassers=st.booleans(),
    cpus=st.none() | st.floats(0, 4),
    memory=st.none() | st.integers(0, 100),
    processes=st.integers(1, 100),
    disk_reserve=st.integers(0, 100),
    secure_aggregation_only=st.booleans(),
    max_epsilon=st.none() | st.floats(0, 2),
    federated_network=st.booleans(),
    jobs_network=st.booleans(),
    services=st.booleans(),
    containers=st.booleans(),
    engine=st.sampled_from([None, *ENGINES]),
    images=some(st.sampled_from(["*", "a*", "b"])),
    mounts=some(st.sampled_from(["/a", "/a:rw", "/b"])),
    require=some(st.sampled_from(REQUIRABLE)),
    user=st.none() | st.just("tasks"),
    log_days=st.floats(0, 100),
    log_disk=st.integers(0, 100),
    package_disk=st.integers(0, 100),
    environment_disk=st.integers(0, 100),
    log_hide=some(patterns),
)
requests = st.builds(
    Request,
    kind=st.sampled_from([*KINDS, "other"]),
    publisher=names,
    tenant=names,
    at=st.times(),
    held=st.builds(
        Held,
        tasks=st.integers(0, 4),
        gpus=st.integers(0, 2),
        cpus=st.floats(0, 3),
        memory=st.integers(0, 80),
    ),
    disk_free=st.integers(0, 200),
    epsilon_spent=st.floats(0, 2),
    devices=some(st.sampled_from(asked().devices)),
    cannot=st.dictionaries(st.sampled_from(REQUIRABLE), st.just("no")),
    commands=st.booleans(),
    installs=st.booleans(),
    gpus=st.integers(0, 3),
    cpus=st.floats(0, 3),
    memory=st.integers(0, 80),
    disk=st.integers(0, 150),
    deadline_s=st.none() | st.floats(0, 150),
    secure_aggregation=st.booleans(),
    epsilon=st.none() | st.floats(0, 2),
    network=st.booleans(),
    serves=st.booleans(),
    image=st.sampled_from(["", "a", "b"]),
    mounts=some(st.tuples(st.sampled_from(["/a", "/b"]), st.booleans())),
)


def fewer(draw: Any, value: Any) -> Any:
    """Some of a list's entries, in the same order."""
    return tuple(one for one in value if draw(st.booleans()))


def lower(draw: Any, value: Any) -> Any:
    if value is None:
        value = 5
    return draw(st.integers(0, value) if isinstance(value, int) else st.floats(0, value))


def narrower(draw: Any, value: Any) -> Any:
    """Windows within windows; from `always`, any."""
    if value is None:
        return draw(some(windows))
    kept = []
    for first, end in fewer(draw, value):
        length = (end - first) % 1440 or 1440
        skip = draw(st.integers(0, length - 1))
        left = draw(st.integers(1, length - skip))
        start = (first + skip) % 1440
        kept.append((start, (start + left) % 1440 or 1440))
    return tuple(one for one in kept if one[0] != one[1])


TIGHTER: dict[str, Callable[[Any, Any], Any]] = {
    "kinds": fewer,
    "commands": lambda _, value: False,
    "installs": lambda _, value: False,
    "at_once": lower,
    "run_time_s": lower,
    "hours": narrower,
    "publishers": fewer,
    "publishers_denied": lambda draw, value: (*value, *draw(some(patterns))),
    # More data sets: more that is to be kept from tasks.
    "data": lambda draw, value: {**value, **draw(st.dictionaries(names, st.just("/y")))},
    "gpus": lambda draw, value: draw(some(gpu_names)) if value is None else fewer(draw, value),
    "end_trespassers": lambda _, value: True,
    "cpus": lower,
    "memory": lower,
    "processes": lambda draw, value: draw(st.integers(1, value)),
    "disk_reserve": lambda draw, value: value + draw(st.integers(0, 50)),
    "secure_aggregation_only": lambda _, value: True,
    "max_epsilon": lower,
    "federated_network": lambda _, value: False,
    "jobs_network": lambda _, value: False,
    "services": lambda _, value: False,
    "containers": lambda _, value: False,
    "engine": lambda draw, _: draw(st.sampled_from([None, *ENGINES])),  # as strict as another
    "images": fewer,
    "mounts": fewer,
    "require": lambda draw, value: (*value, *draw(some(st.sampled_from(REQUIRABLE)))),
    "user": lambda _, value: "tasks",
    "log_days": lower,
    "log_disk": lower,
    "package_disk": lower,
    "environment_disk": lower,
    "log_hide": lambda draw, value: (*value, *draw(some(patterns))),
    "broken": lambda _, value: "the file is broken",
}


def test_every_setting_has_a_way_to_be_tightened_here() -> None:
    # A price refuses nothing: it is said, for jobs that name the most that they pay.
    assert set(TIGHTER) | {"price_per_hour"} == {one.name for one in dataclasses.fields(Policy)}


@pytest.mark.parametrize("setting", TIGHTER)
@settings(max_examples=50)
@given(data=st.data())
def test_tightening_never_turns_a_refusal_into_an_acceptance(
    setting: str, data: st.DataObject
) -> None:
    policy, request = data.draw(policies), data.draw(requests)
    # Start from a policy that is open but for this setting, half of the time: a refusal by
    # another rule would hide what this one does.
    if data.draw(st.booleans()):
        policy = dataclasses.replace(Policy(), **{setting: getattr(policy, setting)})
    tight = dataclasses.replace(
        policy, **{setting: TIGHTER[setting](data.draw, getattr(policy, setting))}
    )
    before = {one.rule: one.ok for one in explain(policy, request)}
    after = {one.rule: one.ok for one in explain(tight, request)}
    if tight.broken is None:
        # Rule by rule, which is stronger than for the verdict as a whole.
        assert all(before[rule] or not ok for rule, ok in after.items())
    if check(policy, request) is not None:
        assert check(tight, request) is not None
    limit, tight_limit = (time_limit_s(p, request.at, request.deadline_s) for p in (policy, tight))
    assert limit is None or (tight_limit is not None and tight_limit <= limit)


@given(policies, requests)
def test_check_refuses_exactly_when_explain_does(policy: Policy, request: Request) -> None:
    refusals = [one for one in explain(policy, request) if not one.ok]
    assert check(policy, request) == (refusals[0] if refusals else None)


# ---- the file


def test_no_file_is_the_documented_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "policy.toml") == Policy()


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(EXPLAINED)
    assert load(file) == Policy(
        at_once=4,
        run_time_s=12 * 3600,
        hours=((22 * 60, 6 * 60),),
        publishers_denied=("mallory",),
        data={"heart": "/srv/data/heart.csv"},
        gpus=(0, "GPU-0f4b7c1e-5a0d-4a9b-8f6e-2c5a3d1b7e90"),
        cpus=4.0,
        memory=16 * GB,
        price_per_hour=0.5,
        max_epsilon=2.0,
        log_hide=("SITE_LOGIN", "CORP_*"),
        user="fedml-task",
        engine="podman",
        images=("docker.io/library/*",),
        mounts=("/srv/scans", "/scratch:rw"),
    )


def test_the_example_of_the_documentation_is_a_policy() -> None:
    page = (Path(__file__).parents[2] / "docs" / "agent.md").read_text()
    example = page.partition("```toml\n")[2].partition("```")[0]
    shown = {section: set(table) for section, table in tomllib.loads(example).items()}
    known = {section: set(table) for section, table in tomllib.loads(EXPLAINED).items()}
    assert parse(example).kinds == ("federate",)
    known["privacy"].discard("max_epsilon")  # these stand there as comments
    known["sandbox"].discard("user")
    known["containers"].discard("engine")
    assert shown == known


def test_the_explained_file_shows_the_true_defaults() -> None:
    shown, example = describe(Policy()), parse(EXPLAINED)
    assert parse(shown) == Policy()
    # What is not in force stands there as a comment, so that removing `# ` puts it in force.
    for setting in (
        "at_once",
        "run_time",
        "hours",
        "gpus",
        "cpus",
        "memory",
        "max_epsilon",
        "engine",
        "user",
    ):
        line = next(one for one in EXPLAINED.splitlines() if one.startswith(f"{setting} = "))
        assert f"# {line}" in shown.splitlines()
    assert example.disk_reserve == Policy().disk_reserve
    assert example.log_days == Policy().log_days
    assert example.log_disk == Policy().log_disk
    assert example.package_disk == Policy().package_disk
    assert example.environment_disk == Policy().environment_disk
    assert example.require == Policy().require


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    policies,
    st.dictionaries(texts, texts.filter(lambda one: "\0" not in one).map(lambda one: f"/x{one}")),
    some(texts),
    st.integers(0, 10**15),
)
def test_what_describe_writes_reads_back_as_the_same_policy(
    policy: Policy, data: dict[str, str], publishers: tuple[str, ...], memory: int
) -> None:
    data = {name: path for name, path in data.items() if "/../" not in f"{path}/"}
    policy = dataclasses.replace(policy, data=data, publishers=publishers, memory=memory)
    assert parse(describe(policy)) == policy


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('resources.memory = "512MiB"', "memory", 512 << 20),
        ("resources.processes = 9", "processes", 9),
        ('resources.memory = "1.5 GB"', "memory", 1_500_000_000),
        ('resources.disk_reserve = "0B"', "disk_reserve", 0),
        ('tasks.run_time = "90m"', "run_time_s", 5400),
        ('tasks.run_time = "2d"', "run_time_s", 172800),
        ('tasks.hours = "09:00-17:30"', "hours", ((540, 1050),)),
        ('tasks.hours = ["22:00-24:00", "00:00-06:00"]', "hours", ((1320, 1440), (0, 360))),
        ("tasks.hours = []", "hours", ()),
        ("tasks = {at_once = 3}", "at_once", 3),
        ("privacy.max_epsilon = 2", "max_epsilon", 2.0),
    ],
)
def test_values_are_read_as_people_write_them(line: str, field: str, value: object) -> None:
    assert parse(line) == dataclasses.replace(Policy(), **{field: value})


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[tasks\n", 1, "is not TOML"),
        ("[tasks]\n\nat_once =\n", 3, "is not TOML"),
        ("[tasks]\nat_once = 1\nat_once = 2\n", 3, "is not TOML"),
        ("[tasks]\nkinds = [", 2, "is not TOML"),
        ("[taks]\nat_once = 1\n", 1, "unknown setting taks; did you mean [tasks]?"),
        ("\n\n[tasks]\nat_onec = 1\n", 4, "did you mean tasks.at_once?"),
        ("max_epsilon = 2\n", 1, "did you mean privacy.max_epsilon?"),
        ("[network]\nmax_epsilon = 2\n", 2, "did you mean privacy.max_epsilon?"),
        ("[publishers]\nwhitelist = []\n", 2, "`fedml-agent policy show` lists them all"),
        ("# first\ntasks = 3\n", 2, "tasks is a section: write [tasks]"),
        ("[[tasks]]\nat_once = 1\n", 1, "tasks is a section"),
        ('"tasks.at_once" = 9\n', 1, "unknown setting tasks.at_once"),
        ("[tasks]\ncommands = 0\n", 2, "tasks.commands must be true or false, not 0"),
        ("[tasks]\nat_once = true\n", 2, "must be a whole number >= 0, not True"),
        ("[tasks]\nat_once = -1\n", 2, "must be a whole number"),
        ("[tasks]\nat_once = 1.5\n", 2, "must be a whole number"),
        ('[tasks]\nkinds = [\n "launch",\n "lanch",\n]\n', 2, "a list of some of launch, federate"),
        ('[tasks]\nkinds = "launch"\n', 2, "a list of some of launch, federate"),
        ("[tasks]\nkinds = [[]]\n", 2, "a list of some of launch, federate"),
        ('x = """\n[tasks]\nat_once = "a"\n"""\n[tasks]\nat_once = "a"\n', 6, "tasks.at_once must"),
        ('tasks.run_time = "-1h"\n', 1, 'must be a time like "90m"'),
        ("tasks.run_time = 60\n", 1, 'must be a time like "90m"'),
        ('containers.engine = "dokcer"\n', 1, "must be podman or docker (did you mean docker?)"),
        ("containers.engine = []\n", 1, "must be podman or docker, not []"),
        ('containers.mounts = ["scans"]\n', 1, "a list of absolute paths"),
        ("resources.processes = 0\n", 1, "a whole number > 0"),
        ('tasks.hours = "22-6"\n', 1, "must be times of day"),
        ('tasks.hours = "24:00-06:00"\n', 1, "must be times of day"),
        ('tasks.hours = "08:00-08:00"\n', 1, "must be times of day"),
        ('tasks.hours = "08:00-24:01"\n', 1, "must be times of day"),
        ('tasks.hours = ["08:00-09:00", ""]\n', 1, "must be times of day"),
        ("tasks.hours = 8\n", 1, "must be a list of texts"),
        ("publishers.allow = [1]\n", 1, "must be a list of texts"),
        ('publishers.allow = "ada"\n', 1, "must be a list of texts"),
        ('[mounts]\nallow = ["/srv"]\n', 1, "unknown setting mounts"),
        ("containers.required = true\n", 1, "unknown setting containers"),
        (
            'sandbox.require = ["hid"]\n',
            1,
            "must be a list of some of hide, read_only, network, pids",
        ),
        ('sandbox.require = "hide"\n', 1, "must be a list of some of hide"),
        ("logs.keep_disk = 1\n", 1, 'must be a size like "16GB"'),
        ("[data]\nok = '/x'\nheart = 'heart.csv'\n", 3, "data.heart must be an absolute path"),
        ("[data]\nheart.x = '/x'\n", 2, "data.heart must be an absolute path"),
        ("data = 3\n", 1, "data is a section"),
        ("resources.gpus = [-1]\n", 1, "must be a list of GPU numbers and UUIDs"),
        ("resources.gpus = [true]\n", 1, "must be a list of GPU numbers and UUIDs"),
        ('resources.gpus = ["0"]\n', 1, "must be a list of GPU numbers and UUIDs"),
        ("resources.gpus = 0\n", 1, "must be a list of GPU numbers and UUIDs"),
        ('resources.memory = "16"\n', 1, 'must be a size like "16GB"'),
        ('resources.memory = "16gb"\n', 1, 'must be a size like "16GB"'),
        ("resources.memory = 16\n", 1, 'must be a size like "16GB"'),
        ("privacy.max_epsilon = nan\n", 1, "must be a number >= 0"),
        ("privacy.max_epsilon = inf\n", 1, "must be a number >= 0 (leave the line out"),
        ("privacy.max_epsilon = -1.0\n", 1, "must be a number >= 0"),
        ('privacy.max_epsilon = "2"\n', 1, "must be a number >= 0"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_what_to_write(text: str, line: int, says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text, "/etc/policy.toml")
    found_line, found = caught.value.problems[-1]
    assert found_line == line
    assert says in found
    assert f"/etc/policy.toml:{line}: " in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        parse("[privacy]\nmax_epsilon = nan\n[taks]\n[tasks]\ncommands = 1\n")
    assert [line for line, _ in caught.value.problems] == [2, 3, 5]
    assert len(str(caught.value).splitlines()) == 3


# ---- a policy that cannot be used allows nothing


def broken_files(tmp_path: Path) -> dict[str, Path]:
    names = ("syntax", "meaning", "bytes", "folder", "link", "loop", "under-a-file", "open")
    files = {name: tmp_path / f"{name}.toml" for name in names}
    files["syntax"].write_text("[tasks")
    files["meaning"].write_text("[tasks]\ncomands = false\n")
    files["bytes"].write_bytes(b"# \xff\n")
    files["folder"].mkdir()
    files["link"].symlink_to(tmp_path / "gone.toml")
    files["loop"].symlink_to(files["loop"])
    files["under-a-file"] = files["syntax"] / "policy.toml"
    files["open"].write_text("")
    files["open"].chmod(0o666)
    return files


@pytest.mark.parametrize(
    "name", ["syntax", "meaning", "bytes", "folder", "link", "loop", "under-a-file", "open"]
)
def test_a_file_that_cannot_be_used_refuses_every_offer_with_the_reason(
    tmp_path: Path, name: str
) -> None:
    file = broken_files(tmp_path)[name]
    with pytest.raises(PolicyError) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert caught.value.hint == "until it is mended, the agent refuses every task"

    policy = load_or_refuse(file)
    for kind in KINDS:
        refusal = check(policy, asked(kind=kind))
        assert refusal is not None
        assert refusal.rule == "policy.toml"
        assert str(caught.value) in str(refusal)
    assert str(caught.value).splitlines()[0] in describe(policy)


def test_a_mended_file_counts_at_the_next_reading(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[tasks\n")
    assert check(load_or_refuse(file), asked()) is not None
    file.write_text("[tasks]\n")
    assert check(load_or_refuse(file), asked()) is None
