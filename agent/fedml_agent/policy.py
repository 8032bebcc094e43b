# SPDX-License-Identifier: Apache-2.0
"""The machine owner's say: `policy.toml`, checked before anything runs.

No broker can change it or talk its way past it. `EXPLAINED` is the file with every setting in it,
`explain` holds every rule. Without a file the defaults of `Policy` hold: every kind of task from
every publisher, on all of the machine but the last 2 GB of disk; none of the machine's own files
or data sets, no network for federated workers.

A policy that cannot be read allows nothing. `load` raises `PolicyError`; `load_or_refuse` gives a
policy that refuses everything and says why. The daemon uses that one: it goes on running, and
refuses all offers with the reason, until the owner has mended the file.

All rules are pure, and one-way: tightening a setting never lets in what was refused before. What
a rule does not understand (an unknown kind, a mount with `..` in it) is refused.
"""

import dataclasses
import datetime
import functools
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from fedml_agent.errors import AgentError

KINDS = ("launch", "deploy", "federate", "analytics")
FEDERATED = frozenset({"federate", "analytics"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The settings; `EXPLAINED` says of each what it means. None stands for no limit.

    `hours` are windows of local time, as (first, end) minutes after midnight. `broken` says why
    the file cannot be used; while it is set, nothing is allowed.
    """

    kinds: tuple[str, ...] = KINDS
    commands: bool = True
    at_once: int | None = None
    run_time_s: int | None = None
    hours: tuple[tuple[int, int], ...] | None = None
    publishers: tuple[str, ...] = ("*",)
    publishers_denied: tuple[str, ...] = ()
    containers_only: bool = False
    images: tuple[str, ...] = ("*",)
    mounts: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[int | str, ...] | None = None
    cpus: float | None = None
    memory: int | None = None
    disk_reserve: int = 2_000_000_000
    secure_aggregation_only: bool = False
    max_epsilon: float | None = None
    federated_network: bool = False
    log_days: float = 7.0
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
    """What an offer asks for, and what the machine knows at that moment (up to `devices`).

    Attributes:
        kind: One of `KINDS`; anything else is refused.
        publisher: The user who launched it; `tenant` is where he belongs.
        at: Local time of day.
        disk_free: Bytes free where the task would write.
        epsilon_spent: Privacy that all former tasks together have cost this machine's data.
        devices: The machine's sound GPUs and MIG instances, each as all its names: index, UUID
            of the GPU, UUID of the instance.
        image: The container image, as it was asked for; None runs without a container.
        mounts: Absolute paths of this machine, links resolved; `:rw` at the end asks to write.
        gpus, cpus, memory, disk: What it needs for itself; bytes.
        deadline_s: Seconds that it may run; None: it names no limit.
        secure_aggregation: What leaves the machine is masked.
        epsilon: Privacy that it costs; None: it does not promise any.

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
    commands: bool = False
    image: str | None = None
    mounts: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    gpus: int = 0
    cpus: float = 0.0
    memory: int = 0
    disk: int = 0
    deadline_s: float | None = None
    secure_aggregation: bool = False
    epsilon: float | None = None
    network: bool = False

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

    `str()` of a refusal is the reason that the broker is told.
    """

    rule: str
    ok: bool
    asked: str
    allowed: str

    def __str__(self) -> str:
        said = "allowed" if self.ok else "refused"
        return f"{said} by this machine's owner ({self.rule}): {self.asked}; may be: {self.allowed}"


Refusal: TypeAlias = Ruling  # one that is not ok


class PolicyError(AgentError):
    """policy.toml cannot be used; the owner can mend it.

    Attributes:
        problems: All that is wrong, as (line, text); line 0 is the file as a whole.
    """

    def __init__(self, path: Path | str, *problems: tuple[int, str]) -> None:
        self.problems = tuple(sorted(problems))
        told = ((f":{line}" if line else "", text) for line, text in self.problems)
        text = "\n".join(f"{path}{line}: {text}" for line, text in told)
        super().__init__(text, "until it is mended, the agent refuses every task")


def check(policy: Policy, request: Request) -> Refusal | None:
    """Give the first rule that refuses the request; None lets it run."""
    return next((one for one in explain(policy, request) if not one.ok), None)


def explain(policy: Policy, request: Request) -> Iterator[Ruling]:
    """Ask every rule, in the order of the file; a broken policy has one rule, which refuses."""
    p, r = policy, request
    if p.broken is not None:
        yield Ruling("policy.toml", False, r.kind, f"nothing until it is mended: {p.broken}")
        return
    yield Ruling("tasks.kinds", r.kind in p.kinds, f"kind {r.kind}", _list(p.kinds))
    ok, asked = p.commands or not r.commands, "commands" if r.commands else "no commands"
    yield Ruling("tasks.commands", ok, asked, "commands" if p.commands else "no commands")
    yield _at_most("tasks.at_once", p.at_once, 1, r.held.tasks, "{:g} tasks".format)
    # A task that names no time is stopped after `time_limit_s`.
    yield _at_most("tasks.run_time", p.run_time_s, r.deadline_s or 0, 0, "{:g} s".format)
    ok = (left := _hours_left_s(p.hours, r.at)) is None or left > 0
    windows = ["always"] if p.hours is None else _window_texts(p.hours)
    yield Ruling("tasks.hours", ok, f"{r.at:%H:%M}", _list(windows))

    asked = f"publisher {r.tenant}/{r.publisher}"
    yield Ruling("publishers.allow", _names(p.publishers, r), asked, _list(p.publishers))
    yield Ruling("publishers.deny", not _names(p.publishers_denied, r), asked, "others")

    asked = "no container" if r.image is None else f"image {r.image}"
    ok = r.image is not None or not p.containers_only
    allowed = "images" if p.containers_only else "images, no container"
    yield Ruling("containers.required", ok, asked, allowed)
    ok = r.image is None or any(fnmatchcase(r.image, one) for one in p.images)
    yield Ruling("containers.images", ok, asked, _list(p.images))
    ok = all(any(_holds(allowed, one) for allowed in p.mounts) for one in r.mounts)
    yield Ruling("mounts.allow", ok, f"mounts {_list(r.mounts)}", _list(p.mounts))
    ok = all(one in p.data for one in r.data)
    yield Ruling("data", ok, f"data sets {_list(r.data)}", _list(sorted(p.data)))

    usable = sum(may_use(p, one) for one in r.devices)
    free = max(usable - r.held.gpus, 0)
    ok, allowed = r.gpus == 0 or r.gpus <= free, f"{free} now, {usable} when all are free"
    yield Ruling("resources.gpus", ok, f"{r.gpus} GPUs", allowed)
    yield _at_most("resources.cpus", p.cpus, r.cpus, r.held.cpus, "{:g} processors".format)
    yield _at_most("resources.memory", p.memory, r.memory, r.held.memory, _gb)
    left = max(r.disk_free - p.disk_reserve, 0)
    ok, allowed = r.disk <= left and r.disk_free >= p.disk_reserve, f"{_gb(left)} now"
    yield Ruling("resources.disk_reserve", ok, _gb(r.disk), allowed)

    local = r.kind in FEDERATED or bool(r.data) or bool(r.mounts)
    masked = r.kind in FEDERATED and r.secure_aggregation
    asked = "local data, masked" if masked else "local data in the clear" if local else "none"
    allowed = "local data, masked" if p.secure_aggregation_only else "local data in the clear"
    ok = masked or not local or not p.secure_aggregation_only
    yield Ruling("privacy.secure_aggregation_only", ok, asked, allowed)
    # Without a promise, local data costs more than any budget; 0.1 + 0.2 must fit into 0.3.
    cost = 0.0 if not local else math.inf if r.epsilon is None else r.epsilon
    most = None if p.max_epsilon is None else p.max_epsilon * (1 + 1e-9)
    yield _at_most("privacy.max_epsilon", most, cost, r.epsilon_spent, "epsilon {:g}".format)
    ok = p.federated_network or not (r.network and r.kind in FEDERATED)
    asked, allowed = ("network" if one else "none" for one in (r.network, p.federated_network))
    yield Ruling("network.federated", ok, asked, allowed)


def time_limit_s(policy: Policy, request: Request) -> float | None:
    """Give the seconds after which the task must be stopped, None for no limit.

    The least of its own deadline, the longest run time, and what is left of the hours.
    """
    limits = [request.deadline_s, policy.run_time_s, _hours_left_s(policy.hours, request.at)]
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
    return Ruling(rule, ok, write(asked), allowed)


def _names(patterns: Iterable[str], request: Request) -> bool:
    full = f"{request.tenant}/{request.publisher}"
    return any(fnmatchcase(full if "/" in one else request.publisher, one) for one in patterns)


def _holds(allowed: str, asked: str) -> bool:
    """Tell whether `asked` is the folder `allowed` or lies in it, and writes only if it may."""
    folder, wanted = _path(allowed.removesuffix(":rw")), _path(asked.removesuffix(":rw"))
    if folder is None or wanted is None or (asked.endswith(":rw") and not allowed.endswith(":rw")):
        return False
    return wanted.is_relative_to(folder)


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


def load(path: Path) -> Policy:
    """Read the policy; no file at all gives the defaults.

    Raises:
        PolicyError: There is a file, but it cannot be read, understood or trusted.
    """
    try:
        text = path.read_text(encoding="utf-8")
        open_to_all = path.stat().st_mode & 0o002
    except FileNotFoundError:
        if not path.is_symlink():
            return Policy()
        raise PolicyError(path, (0, "is a link to a file that does not exist")) from None
    except OSError as error:
        raise PolicyError(path, (0, f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise PolicyError(path, (0, f"is not UTF-8 text: {error}")) from error
    if open_to_all:
        raise PolicyError(path, (0, "every user may change it; run `chmod o-w` on it"))
    return parse(text, path)


def load_or_refuse(path: Path) -> Policy:
    """Read the policy; a file that cannot be used gives one that refuses everything."""
    try:
        return load(path)
    except PolicyError as error:
        return Policy(broken=str(error))


def parse(text: str, path: Path | str = "policy.toml") -> Policy:
    """Understand the text of a policy; `path` is only named in errors.

    Raises:
        PolicyError: With every problem found, its line, and the nearest setting where a name is
            not known.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        raise PolicyError(path, (line, f"is not TOML: {error}")) from error
    problems: list[tuple[int, str]] = []
    given: dict[str, Any] = {}
    for place, value in _leaves(tables):
        name = ".".join(place)
        try:
            if len(place) == 2 and place[0] == "data":
                given.setdefault("data", {})[place[1]] = _read_path(value)
            elif len(place) == 2 and name in _SETTINGS:
                field, kind = _SETTINGS[name]
                given[field] = kind.read(value)
            else:
                problems.append((_line(text, place), _unknown(place)))
        except ValueError as error:
            problems.append((_line(text, place), f"{name} must be {error}, not {value!r}"))
    if problems:
        raise PolicyError(path, *problems)
    return Policy(**given)


def _leaves(tables: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Go through the settings that stand in the file, or what stands in their place."""
    for section, content in tables.items():
        if section in _SECTIONS and isinstance(content, dict):
            for key, value in content.items():
                yield (section, key), value
        else:
            yield (section,), content


def _unknown(place: tuple[str, ...]) -> str:
    import difflib  # 0.4 MB, needed only here

    if len(place) == 1 and place[0] in _SECTIONS:
        return f"{place[0]} is a section: write [{place[0]}] on a line of its own"
    # A known key in a wrong section, or in none, is as frequent as a misspelt one.
    known = {one: f"[{one}]" for one in _SECTIONS if len(place) == 1}
    known |= {one.partition(".")[2]: one for one in _SETTINGS} | {one: one for one in _SETTINGS}
    near = difflib.get_close_matches(".".join(place), known, n=1, cutoff=0.7)
    near = near or difflib.get_close_matches(place[-1], known, n=1)
    hint = f"did you mean {known[near[0]]}?" if near else "`fedml-agent policy show` lists them all"
    return f"unknown setting {'.'.join(place)}; {hint}"


def _line(text: str, place: tuple[str, ...]) -> int:
    """Find a setting's first line: tomllib tells none, so it reads one line more each time."""
    lines, begin = text.split("\n"), 1
    for end in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a value of several lines
        for part in place:
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return begin
        begin = end + 1
    return 0


EXPLAINED = """\
# The machine owner's say: what may run here. A line behind a # is not in force.

[tasks]
# Kinds of task that may run.
kinds = ["launch", "deploy", "federate", "analytics"]
# May a task run shell commands?
commands = true
# How many tasks may run at the same time; not set: as many as fit.
at_once = 4
# How long one task may run. One that names no time is stopped then.
run_time = "12h"
# When tasks may run, in local time. What still runs at the end is stopped.
hours = ["22:00-06:00"]

[publishers]
# Whose tasks may run: user names, or tenant/user; * stands for anything.
allow = ["*"]
# Whose tasks never run, also if allowed above.
deny = ["mallory"]

[containers]
# Refuse tasks that do not run in a container?
required = false
# Images that may run, as a job names them; * stands for anything, slashes too.
images = ["*"]

[mounts]
# Folders of this machine that tasks may read, with all that is in them; :rw to write too.
allow = ["/srv/data", "/srv/scratch:rw"]

[data]
# Data sets that tasks may ask for by name, and where they are.
heart = "/srv/data/heart.csv"

[resources]
# GPUs and MIG instances that tasks may use; not set: all. A number may change when the machine
# boots, a UUID does not.
gpus = [0, "GPU-0f4b7c1e-5a0d-4a9b-8f6e-2c5a3d1b7e90"]
# Processors for all tasks together; not set: all.
cpus = 4.0
# Memory for all tasks together; not set: all.
memory = "16GB"
# Disk space that tasks must leave free.
disk_reserve = "2GB"

[privacy]
# Local data only under secure aggregation, where nobody sees the update of one machine?
# Refuses all that reads data sets or mounts in another way.
secure_aggregation_only = false
# How much privacy (epsilon) all tasks together may ever cost; after that, and to tasks without
# differential privacy, local data is closed.
max_epsilon = 2.0

[network]
# May federated workers, which read local data, use the network?
federated = false

[logs]
# Days that logs stay here.
keep_days = 7.0
"""


def describe(policy: Policy) -> str:
    """Write the policy as a file with comments: it reads back as the same policy."""
    if policy.broken is not None:
        lines = ["Nothing is allowed until this is mended:", *policy.broken.splitlines()]
        return "".join(f"# {line}\n" for line in lines)
    section, lines = "", []
    for line in EXPLAINED.splitlines():
        key, is_setting, _ = line.partition(" = ")
        if line.startswith("["):
            section = line[1:-1]
        if line.startswith("#") or not is_setting:
            lines.append(line)
        elif section == "data":
            entries = [f"{_toml(name)} = {_toml(path)}" for name, path in policy.data.items()]
            lines += entries or [f"# {line}"]
        else:
            field, kind = _SETTINGS[f"{section}.{key}"]
            value = getattr(policy, field)
            lines.append(f"# {line}" if value is None else f"{key} = {_toml(kind.write(value))}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's words are TOML's, but for DEL, which TOML wants escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


class _Kind(NamedTuple):
    """How a value is read from TOML and written back; `read` raises ValueError: what it must be."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def _must(
    test: Callable[[Any], object], be: str, make: Callable[[Any], Any] = lambda value: value
) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if test(value):
            return make(value)
        raise ValueError(be)

    return read


def _all(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(test(one) for one in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # not isinstance: True is an int


def _is_device(value: Any) -> bool:
    return _is_count(value) or (_is_text(value) and value.startswith(("GPU-", "MIG-")))


def _is_mount(value: Any) -> bool:
    return _is_text(value) and _path(value.removesuffix(":rw")) is not None


def _is_number(value: Any) -> bool:
    # TOML has nan and inf: the first compares as false with everything, the second is no limit.
    return type(value) in {int, float} and math.isfinite(value) and value >= 0


def _path(value: Any) -> PurePosixPath | None:
    path = PurePosixPath(value) if _is_text(value) and "\0" not in value else PurePosixPath()
    return path if path.is_absolute() and ".." not in path.parts else None


_read_path = _must(_path, "an absolute path without `..`")
_read_texts = _must(_all(_is_text), 'a list of texts, like ["one", "two"]', tuple)
_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _read_unit(units: Mapping[str, int], be: str, value: Any) -> int:
    found = _is_text(value) and re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", value, re.ASCII)
    if found and found[2] in units:
        return int(float(found[1]) * units[found[2]])
    raise ValueError(be)


def _write_unit(units: Mapping[str, int], value: int) -> str:
    """Write a number with the largest unit that loses nothing."""
    fits = (one for one, size in units.items() if value % size == 0 and value >= size)
    unit = max(fits, key=units.__getitem__, default=min(units, key=units.__getitem__))
    return f"{value // units[unit]}{unit}"


def _read_hours(value: Any) -> tuple[tuple[int, int], ...]:
    windows = []
    for text in [value] if isinstance(value, str) else _read_texts(value):
        found = re.fullmatch(r"(\d\d):([0-5]\d)-(\d\d):([0-5]\d)", text, re.ASCII)
        numbers = [int(one) for one in found.groups()] if found else [0, 0, 0, 0]
        first, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
        if first == end or first >= 1440 or end > 1440:
            raise ValueError('times of day like "22:00-06:00", or a list of them')
        windows.append((first, end))
    return tuple(windows)


def _window_texts(windows: Iterable[tuple[int, int]]) -> list[str]:
    return ["{:02}:{:02}-{:02}:{:02}".format(*divmod(a, 60), *divmod(b, 60)) for a, b in windows]


_BOOL = _Kind(_must(lambda value: isinstance(value, bool), "true or false"))
_COUNT = _Kind(_must(_is_count, "a whole number >= 0"))
_DEVICES = 'a list of GPU numbers and UUIDs, like [0, "GPU-…"]'
_KINDS = f"a list of some of {_list(KINDS)}"
_MOUNTS = "a list of absolute paths without `..`, `:rw` after those to write to"
_NUMBER = _Kind(_must(_is_number, "a number >= 0 (leave the line out for no limit)", float))
_SIZE = _Kind(
    functools.partial(_read_unit, _SIZES, 'a size like "16GB" or "512MiB"'),
    functools.partial(_write_unit, _SIZES),
)
_TEXTS = _Kind(_read_texts)
_TIME = _Kind(
    functools.partial(_read_unit, _TIMES, 'a time like "90m", "12h" or "2d"'),
    functools.partial(_write_unit, _TIMES),
)
_SETTINGS: Mapping[str, tuple[str, _Kind]] = {
    "tasks.kinds": ("kinds", _Kind(_must(_all(KINDS.__contains__), _KINDS, tuple))),
    "tasks.commands": ("commands", _BOOL),
    "tasks.at_once": ("at_once", _COUNT),
    "tasks.run_time": ("run_time_s", _TIME),
    "tasks.hours": ("hours", _Kind(_read_hours, _window_texts)),
    "publishers.allow": ("publishers", _TEXTS),
    "publishers.deny": ("publishers_denied", _TEXTS),
    "containers.required": ("containers_only", _BOOL),
    "containers.images": ("images", _TEXTS),
    "mounts.allow": ("mounts", _Kind(_must(_all(_is_mount), _MOUNTS, tuple))),
    "resources.gpus": ("gpus", _Kind(_must(_all(_is_device), _DEVICES, tuple))),
    "resources.cpus": ("cpus", _NUMBER),
    "resources.memory": ("memory", _SIZE),
    "resources.disk_reserve": ("disk_reserve", _SIZE),
    "privacy.secure_aggregation_only": ("secure_aggregation_only", _BOOL),
    "privacy.max_epsilon": ("max_epsilon", _NUMBER),
    "network.federated": ("federated_network", _BOOL),
    "logs.keep_days": ("log_days", _NUMBER),
}
_SECTIONS = {name.partition(".")[0] for name in _SETTINGS} | {"data"}
