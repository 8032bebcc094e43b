# SPDX-License-Identifier: Apache-2.0
"""The machine owner's say: `policy.toml`, checked before anything runs.

No broker can change it or talk its way past it. `explain` holds every rule; the file itself is
read in policy_file.py. Without a file the defaults of `Policy` hold: every kind of task from every
publisher, on all of the machine but the last 2 GB of disk, locked in so that it never sees the
agent's keys; no data sets, no network for federated workers.

All rules are pure, and one-way: tightening a setting never lets in what was refused before. What
a rule does not understand (an unknown kind) is refused.
"""

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from fedml_agent.namespaces import CGROUPS, HIDE, NETWORK, PIDS, READ_ONLY

KINDS = ("launch", "federate")
ENGINES = ("podman", "docker")  # the first that a machine has, unless its owner says which
REQUIRABLE = (HIDE, READ_ONLY, NETWORK, PIDS, CGROUPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The settings; `policy_file.EXPLAINED` says of each what it means. None stands for no limit.

    `hours` are windows of local time, as (first, end) minutes after midnight. `broken` says why
    the file cannot be used; while it is set, nothing is allowed.
    """

    kinds: tuple[str, ...] = KINDS
    commands: bool = True
    installs: bool = True
    at_once: int | None = None
    run_time_s: int | None = None
    hours: tuple[tuple[int, int], ...] | None = None
    publishers: tuple[str, ...] = ("*",)
    publishers_denied: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[int | str, ...] | None = None
    end_trespassers: bool = False
    cpus: float | None = None
    memory: int | None = None
    price_per_hour: float = 0.0
    processes: int = 4096
    disk_reserve: int = 2_000_000_000
    secure_aggregation_only: bool = False
    max_epsilon: float | None = None
    federated_network: bool = False
    jobs_network: bool = True
    services: bool = True
    containers: bool = False
    engine: str | None = None
    images: tuple[str, ...] = ("*",)
    mounts: tuple[str, ...] = ()
    require: tuple[str, ...] = (HIDE,)
    user: str | None = None
    log_days: float = 7.0
    log_disk: int = 1_000_000_000
    package_disk: int = 10_000_000_000
    environment_disk: int = 20_000_000_000
    log_hide: tuple[str, ...] = ()
    broken: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the tasks that run here already hold, all together; `memory` in bytes."""

    tasks: int = 0
    gpus: int = 0
    cpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an offer asks for, and what the machine knows at that moment (up to `cannot`).

    Attributes:
        kind: One of `KINDS`; anything else is refused.
        publisher: The user who launched it; `tenant` is where he belongs.
        at: Local time of day.
        disk_free: Bytes free where the task would write.
        epsilon_spent: Privacy that all former tasks together have cost this machine's data.
        devices: The machine's sound GPUs and MIG instances, each as all its names: index, UUID
            of the GPU, UUID of the instance.
        cannot: Protections that this machine cannot give (sandbox.py), each with its reason.
        gpus, cpus, memory, disk: What it needs for itself; bytes.
        deadline_s: Seconds that it may run; None: it names no limit.
        installs: Packages are installed for it, in an environment of its own.
        secure_aggregation: What leaves the machine is masked.
        epsilon: Privacy that it costs; None: it does not promise any.
        network: It is to have the network.
        serves: It is a service: it answers on a port of this machine.
        image: The container image that it runs in, with its registry; empty: none.
        mounts: What of the machine its container is to see, and whether it may write there.

    Raises:
        ValueError: A number is negative or not a number, or a name holds a slash.
    """

    kind: str
    publisher: str
    tenant: str
    at: datetime.time
    held: Held
    disk_free: int
    epsilon_spent: float
    devices: tuple[tuple[int | str | None, ...], ...] = ()
    cannot: Mapping[str, str] = field(default_factory=dict)
    commands: bool = False
    installs: bool = False
    gpus: int = 0
    cpus: float = 0.0
    memory: int = 0
    disk: int = 0
    deadline_s: float | None = None
    secure_aggregation: bool = False
    epsilon: float | None = None
    network: bool = False
    serves: bool = False
    image: str = ""
    mounts: tuple[tuple[str, bool], ...] = ()

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            # A negative demand would make room instead of taking it.
            if isinstance(value, int | float) and not value >= 0:
                raise ValueError(f"{each.name} must be a number >= 0, got {value}")
        if "/" in self.tenant + self.publisher:
            raise ValueError(f"no slash is allowed in {self.tenant!r} and {self.publisher!r}")


class Ruling(NamedTuple):
    """What one rule says of one request; `rule` names the setting, as ``resources.memory``.

    `str()` of a refusal is the reason that the broker is told. One that is `passing` may turn into
    an acceptance without a change of what is asked: at another hour, or when room is free.
    """

    rule: str
    ok: bool
    asked: str
    allowed: str
    passing: bool = False

    def __str__(self) -> str:
        said = "allowed" if self.ok else "refused"
        return f"{said} by this machine's owner ({self.rule}): {self.asked}; may be: {self.allowed}"


Refusal: TypeAlias = Ruling  # one that is not ok


def check(policy: Policy, request: Request) -> Refusal | None:
    """Give the first rule that refuses the request; None lets it run."""
    return next((one for one in explain(policy, request) if not one.ok), None)


def explain(policy: Policy, request: Request) -> Iterator[Ruling]:
    """Ask every rule, in the order of the file; a broken policy has one rule, which refuses."""
    p, r = policy, request
    if p.broken is not None:
        allowed = f"nothing until the file is mended: {p.broken}"
        yield Ruling("policy.toml", False, r.kind, allowed, passing=True)
        return
    yield Ruling("tasks.kinds", r.kind in p.kinds, f"kind {r.kind}", _list(p.kinds))
    ok, asked = p.commands or not r.commands, "commands" if r.commands else "no commands"
    yield Ruling("tasks.commands", ok, asked, "commands" if p.commands else "no commands")
    ok, asked = p.installs or not r.installs, "requirements" if r.installs else "no requirements"
    yield Ruling("tasks.installs", ok, asked, "requirements" if p.installs else "no requirements")
    yield _at_most("tasks.at_once", p.at_once, 1, r.held.tasks, "{:g} tasks".format)
    # A task that names no time is stopped after `time_limit_s`.
    yield _at_most("tasks.run_time", p.run_time_s, r.deadline_s or 0, 0, "{:g} s".format)
    ok = (left := _hours_left_s(p.hours, r.at)) is None or left > 0
    windows = ["always"] if p.hours is None else window_texts(p.hours)
    yield Ruling("tasks.hours", ok, f"{r.at:%H:%M}", _list(windows), passing=bool(p.hours))

    asked = f"publisher {r.tenant}/{r.publisher}"
    yield Ruling("publishers.allow", _names(p.publishers, r), asked, _list(p.publishers))
    yield Ruling("publishers.deny", not _names(p.publishers_denied, r), asked, "others")

    usable = sum(may_use(p, one) for one in r.devices)
    free = max(usable - r.held.gpus, 0)
    ok, allowed = r.gpus == 0 or r.gpus <= free, f"{free} now, {usable} when all are free"
    yield Ruling("resources.gpus", ok, f"{r.gpus} GPUs", allowed, passing=r.gpus <= usable)
    yield _at_most("resources.cpus", p.cpus, r.cpus, r.held.cpus, "{:g} processors".format)
    yield _at_most("resources.memory", p.memory, r.memory, r.held.memory, _gb)
    left = max(r.disk_free - p.disk_reserve, 0)
    ok, allowed = r.disk <= left and r.disk_free >= p.disk_reserve, f"{_gb(left)} now"
    yield Ruling("resources.disk_reserve", ok, _gb(r.disk), allowed, passing=True)

    # Launched jobs see no data set, as far as anything can be hidden from them here.
    federated = r.kind != "launch"
    local = federated or (bool(p.data) and HIDE in r.cannot)
    masked = federated and r.secure_aggregation
    asked = "local data, masked" if masked else "local data in the clear" if local else "none"
    if federated and not masked and p.secure_aggregation_only:
        asked += " (federated runs have no secure aggregation yet)"
    allowed = "local data, masked" if p.secure_aggregation_only else "local data in the clear"
    ok = masked or not local or not p.secure_aggregation_only
    yield Ruling("privacy.secure_aggregation_only", ok, asked, allowed)
    # Without a promise, local data costs more than any budget; 0.1 + 0.2 must fit into 0.3.
    cost = 0.0 if not local else math.inf if r.epsilon is None else r.epsilon
    most = None if p.max_epsilon is None else p.max_epsilon * (1 + 1e-9)
    yield _at_most("privacy.max_epsilon", most, cost, r.epsilon_spent, _epsilon)

    cuts = federated and not p.federated_network
    ok = not cuts or not (r.network or NETWORK in r.cannot)
    asked = "network" if r.network else "none"
    if cuts and not r.network and NETWORK in r.cannot:
        asked = f"none, but it cannot be cut off here: {r.cannot[NETWORK]}"
    allowed = "none" if cuts else "network"
    yield Ruling("network.federated", ok, asked, allowed, passing=cuts and not r.network)
    ok = federated or p.jobs_network or not r.network
    allowed = "network" if p.jobs_network else "none (`network: none` in the job file)"
    yield Ruling("network.jobs", ok, asked if federated or ok else "network", allowed)
    asked, allowed = (("a service" if one else "no service") for one in (r.serves, p.services))
    yield Ruling("network.services", p.services or not r.serves, asked, allowed)

    asked = f"a container of {r.image}" if r.image else "no container"
    allowed = "containers" if p.containers else "no container"
    yield Ruling("containers.allow", p.containers or not r.image, asked, allowed)
    ok = not r.image or any(fnmatchcase(r.image, one) for one in p.images)
    yield Ruling("containers.images", ok, asked, _list(p.images))
    refused = [
        f"{path} {'to write' if writes else 'to read'}"
        for path, writes in r.mounts
        if f"{path}:rw" not in p.mounts and (writes or path not in p.mounts)
    ]
    asked = f"a mount of {', '.join(refused)}" if refused else "no other mount"
    yield Ruling("containers.mounts", not refused, asked, _list(p.mounts))
    lacks = [f"no '{name}' ({r.cannot[name]})" for name in p.require if name in r.cannot]
    asked = "a task without protection: " + "; ".join(lacks) if lacks else "a protected task"
    allowed = f"only with {_list(p.require)}" if p.require else "any"
    yield Ruling("sandbox.require", not lacks, asked, allowed, passing=True)


def closed(policy: Policy, *, at: datetime.time, disk_free: int, cannot: Mapping[str, str]) -> str:
    """Say why no task at all would be taken now; empty: some would."""
    if policy.broken is not None:
        return f"its owner's policy file cannot be used until it is mended: {policy.broken}"
    if not policy.kinds or policy.at_once == 0:
        return "its owner takes no tasks (tasks.kinds, tasks.at_once)"
    lacks = [f"no '{name}': {cannot[name]}" for name in policy.require if name in cannot]
    if lacks:
        return (
            "it cannot lock tasks in as its owner requires (sandbox.require; there, "
            f"`fedml-agent diagnose` says what to do): {'; '.join(lacks)}"
        )
    if disk_free < policy.disk_reserve:
        keep = f"{_gb(policy.disk_reserve)} must stay free (resources.disk_reserve)"
        return f"its disk is low: {disk_free / 1e9:.1f} GB are free, {keep}"
    if _hours_left_s(policy.hours, at) == 0:
        windows = _list(window_texts(policy.hours or ()))
        return f"its owner takes tasks only at {windows} of its local time (tasks.hours)"
    return ""


def time_limit_s(
    policy: Policy, at: datetime.time, deadline_s: float | None = None
) -> float | None:
    """Give the seconds after which a task that begins now must be stopped, None for no limit.

    The least of its own deadline, the longest run time, and what is left of the hours.
    """
    limits = [deadline_s, policy.run_time_s, _hours_left_s(policy.hours, at)]
    return min((one for one in limits if one is not None), default=None)


def may_use(policy: Policy, device: Iterable[int | str | None]) -> bool:
    """Tell whether tasks may use a GPU or MIG instance, given all its names (see `Request`)."""
    return policy.gpus is None or any(name in policy.gpus for name in device)


def _at_most(
    rule: str, most: float | None, asked: float, held: float, write: Callable[[Any], str]
) -> Ruling:
    allowed = "no limit" if most is None else f"at most {write(most)}"
    if most is not None and held:
        allowed += f", {write(held)} of it taken"
    # Nothing asked is nothing taken, also where more is taken than is allowed by now.
    ok = most is None or asked == 0 or held + asked <= most
    return Ruling(rule, ok, write(asked), allowed, passing=most is not None and asked <= most)


def _epsilon(value: float) -> str:
    if math.isfinite(value):
        return f"epsilon {value:g}"
    return "no promise of differential privacy, which federated runs cannot give yet"


def _names(patterns: Iterable[str], request: Request) -> bool:
    full = f"{request.tenant}/{request.publisher}"
    return any(fnmatchcase(full if "/" in one else request.publisher, one) for one in patterns)


def _gb(size: float) -> str:
    return f"{size / 1e9:.6g} GB"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _hours_left_s(hours: tuple[tuple[int, int], ...] | None, at: datetime.time) -> float | None:
    """Give the seconds until tasks must not run; 0: not now, None: no end."""
    now, left = at.hour * 60 + at.minute, 0
    while hours is not None and any(
        (now + left - first) % 1440 < ((end - first) % 1440 or 1440) for first, end in hours
    ):
        left += 1
        if left == 1440:
            return None
    return None if hours is None else max(left * 60 - at.second - at.microsecond / 1e6, 0.0)


def window_texts(windows: Iterable[tuple[int, int]]) -> list[str]:
    return ["{:02}:{:02}-{:02}:{:02}".format(*divmod(a, 60), *divmod(b, 60)) for a, b in windows]
