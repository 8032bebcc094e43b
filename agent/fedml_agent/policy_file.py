# SPDX-License-Identifier: Apache-2.0
"""The machine owner's file, `policy.toml`: read, explained, written.

`EXPLAINED` is the file with every setting in it. A file that cannot be read allows nothing: `load`
raises `PolicyError`; `load_or_refuse` gives a policy that refuses everything and says why. The
daemon uses that one: it goes on running, and refuses all offers with the reason, until the owner
has mended the file, which it reads again by itself.
"""

import functools
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fedml_agent.errors import AgentError
from fedml_agent.policy import ENGINES, KINDS, REQUIRABLE, Policy, window_texts


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
kinds = ["launch", "federate"]
# May a task run shell commands?
commands = true
# May packages be installed for a job, into a virtual environment apart from all else?
installs = true
# How many tasks may run at the same time; not set: as many as fit.
at_once = 4
# How long one task (a job, or one stage of a federated run) may run. It is stopped then.
run_time = "12h"
# When tasks may run, in local time. What still runs at the end is stopped.
hours = ["22:00-06:00"]

[publishers]
# Whose tasks may run: user names, or tenant/user; * stands for anything.
allow = ["*"]
# Whose tasks never run, also if allowed above.
deny = ["mallory"]

[data]
# Data sets that federated runs find by name, and where they are. Launched jobs do not see them.
heart = "/srv/data/heart.csv"

[resources]
# GPUs and MIG instances that tasks may use; not set: all. A number may change when the machine
# boots, a UUID does not.
gpus = [0, "GPU-0f4b7c1e-5a0d-4a9b-8f6e-2c5a3d1b7e90"]
# End a launched job that computes on a GPU that it does not hold? It is named in any case.
end_trespassers = false
# Processors that all tasks together may ask for, and on which they run; not set: all.
cpus = 4.0
# Memory that all tasks together may ask for; not set: all. For one that names none, this is the
# limit of each of its processes.
memory = "16GB"
# What an hour of this machine costs, in whatever money you count: jobs may name the most that they
# pay. Nothing is billed.
price_per_hour = 0.5
# Processes and threads of each task; a task that forks without end stops there.
processes = 4096
# With less disk space free than this, no task begins.
disk_reserve = "2GB"

[privacy]
# Local data only under secure aggregation, where nobody sees the update of one machine? There is
# none yet: true refuses every federated task, and says so.
secure_aggregation_only = false
# Local data only under differential privacy, and how much of it (epsilon) all tasks together may
# ever cost. Federated runs cannot promise any yet: a number refuses them all, and says so.
max_epsilon = 2.0

[network]
# May federated workers, which read local data, use the network?
federated = false
# May launched jobs use it? If not, only those that ask for none (`network: none`) run.
jobs = true
# May they be services (`service` in a job file), which stay up and answer on a port of this
# machine? Any job that has the network can open a port: who reaches it is your firewall's to say.
services = true

[containers]
# May jobs bring a container image, which Podman or Docker runs here?
allow = false
# Which of the two runs them; not set: Podman, or Docker where there is no Podman.
engine = "podman"
# Which images: names with their registry; * stands for anything.
images = ["docker.io/library/*"]
# What of this machine containers may see when a job asks for it, exactly these paths: to read, or
# with `:rw` behind to write too.
mounts = ["/srv/scans", "/scratch:rw"]

[sandbox]
# Protections without which no task runs here: "hide" (the agent's keys, other tasks), "read_only"
# (all other files), "network" (where it is cut off), "pids" (other processes), "cgroups" (limits
# of the task as a whole). `fedml-agent diagnose` says which of them this machine can give. Without
# "hide" in this list, tasks may be able to read the agent's key, and to act as this machine.
require = ["hide"]
# The user that launched jobs run as, where the agent is root; not set: as the agent.
user = "fedml-task"

[logs]
# Days that logs of finished tasks stay here; the broker has them too.
keep_days = 7.0
# Disk space for them all; the oldest go first.
keep_disk = "1GB"
# Variables whose values logs never show, * allowed; beside those whose names look secret, such as
# HF_TOKEN, and those that a job declares.
hide = ["SITE_LOGIN", "CORP_*"]

[cache]
# Disk space for files of workspaces, so that the next launch does not bring them again; those that
# nobody has used for longest go first.
packages = "10GB"
# Disk space for virtual environments of jobs, in the same way.
environments = "20GB"
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


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


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


def _read_engine(value: Any) -> str:
    if value in ENGINES:
        return str(value)
    import difflib  # as in `_unknown`

    near = difflib.get_close_matches(value.lower() if _is_text(value) else "", ENGINES, n=1)
    raise ValueError(" or ".join(ENGINES) + (f" (did you mean {near[0]}?)" if near else ""))


_BOOL = _Kind(_must(lambda value: isinstance(value, bool), "true or false"))
_COUNT = _Kind(_must(_is_count, "a whole number >= 0"))
_DEVICES = 'a list of GPU numbers and UUIDs, like [0, "GPU-…"]'
_KINDS = f"a list of some of {', '.join(KINDS)}"
_NUMBER = _Kind(_must(_is_number, "a number >= 0 (leave the line out for no limit)", float))
_SIZE = _Kind(
    functools.partial(_read_unit, _SIZES, 'a size like "16GB" or "512MiB"'),
    functools.partial(_write_unit, _SIZES),
)
_MOUNTS = 'a list of absolute paths, like ["/srv/scans", "/scratch:rw"]'
_REQUIRABLE = f"a list of some of {', '.join(REQUIRABLE)}"
_TEXTS = _Kind(_read_texts)
_TIME = _Kind(
    functools.partial(_read_unit, _TIMES, 'a time like "90m", "12h" or "2d"'),
    functools.partial(_write_unit, _TIMES),
)
_SETTINGS: Mapping[str, tuple[str, _Kind]] = {
    "tasks.kinds": ("kinds", _Kind(_must(_all(KINDS.__contains__), _KINDS, tuple))),
    "tasks.commands": ("commands", _BOOL),
    "tasks.installs": ("installs", _BOOL),
    "tasks.at_once": ("at_once", _COUNT),
    "tasks.run_time": ("run_time_s", _TIME),
    "tasks.hours": ("hours", _Kind(_read_hours, window_texts)),
    "publishers.allow": ("publishers", _TEXTS),
    "publishers.deny": ("publishers_denied", _TEXTS),
    "resources.gpus": ("gpus", _Kind(_must(_all(_is_device), _DEVICES, tuple))),
    "resources.end_trespassers": ("end_trespassers", _BOOL),
    "resources.cpus": ("cpus", _NUMBER),
    "resources.memory": ("memory", _SIZE),
    "resources.price_per_hour": ("price_per_hour", _NUMBER),
    "resources.processes": ("processes", _Kind(_must(_is_positive, "a whole number > 0"))),
    "resources.disk_reserve": ("disk_reserve", _SIZE),
    "privacy.secure_aggregation_only": ("secure_aggregation_only", _BOOL),
    "privacy.max_epsilon": ("max_epsilon", _NUMBER),
    "network.federated": ("federated_network", _BOOL),
    "network.jobs": ("jobs_network", _BOOL),
    "network.services": ("services", _BOOL),
    "containers.allow": ("containers", _BOOL),
    "containers.engine": ("engine", _Kind(_read_engine)),
    "containers.images": ("images", _TEXTS),
    "containers.mounts": ("mounts", _Kind(_must(_all(_is_mount), _MOUNTS, tuple))),
    "sandbox.require": (
        "require",
        _Kind(_must(_all(REQUIRABLE.__contains__), _REQUIRABLE, tuple)),
    ),
    "sandbox.user": ("user", _Kind(_must(_is_text, "the name of a user"))),
    "logs.keep_days": ("log_days", _NUMBER),
    "logs.keep_disk": ("log_disk", _SIZE),
    "cache.packages": ("package_disk", _SIZE),
    "cache.environments": ("environment_disk", _SIZE),
    "logs.hide": ("log_hide", _TEXTS),
}
_SECTIONS = {name.partition(".")[0] for name in _SETTINGS} | {"data"}
