# SPDX-License-Identifier: Apache-2.0
"""What is to be simulated: a run file, checked as a whole, with what was said on the command line.

The same file runs on agents (`fedml federate`); only the section ``simulation`` is for here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml import runfile
from fedml.errors import ConfigError
from fedml.federate.algorithm import Algorithm, BadParameter, Kind, UnknownAlgorithm, create
from fedml.federate.hierarchical import Groups
from fedml.federate.round import check
from fedml.federate.treatment import Treatment
from fedml.simulation import accelerator
from fedml.simulation.devices import Devices
from fedml.simulation.liars import Liars

ENGINES = ("auto", "exact", "closed_form", "inplace", "stacked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One simulation, all values settled.

    Attributes:
        name: How it is called.
        app: The user's file.
        config: Handed to the user's functions.
        algorithm: By name, `algorithm_config` its parameters.
        treatment: What is done to updates beside the algorithm (`federate.treatment`).
        groups: How clients are grouped (`federate.hierarchical.Groups`).
        rounds: Rounds, or versions of the model where the algorithm is asynchronous.
        seed: Of everything that is drawn.
        clients: How many there are.
        per_round: Answers that a round takes; at work at a time, if asynchronous.
        over_select: How many more are asked, as a part of `per_round`. Only devices are late.
        minimum: With how many answers a round may close.
        deadline_s: Of one round, in simulated time; 0 waits.
        every: Rounds between evaluations.
        on_clients: Evaluate on the clients' data.
        on_central: Evaluate on central data.
        engine: One of `ENGINES`.
        device: Where to train: auto, cpu, cuda, cuda:N or mps (`accelerator`).
        workers: Processes; 0 is one for each core, or for each GPU, or with `ray` for each CPU of
            its cluster.
        ray: Address of a Ray cluster that has them; ``local`` starts one, empty needs none.
        checkpoint_s: Seconds between checkpoints.
        paths: Where data sets are, by name: what a machine's owner lists under ``[data]``.
        attack: How some clients lie (`simulation.liars`).
        devices: How fast and reliable clients are; None leaves time out.
    """

    name: str
    app: Path
    rounds: int
    clients: int
    config: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str = "fedavg"
    algorithm_config: Mapping[str, Any] = field(default_factory=dict)
    treatment: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    per_round: int = 0
    over_select: float = 0.0
    minimum: int = 0
    deadline_s: float = 0.0
    every: int = 1
    on_clients: bool = True
    on_central: bool = True
    engine: str = "auto"
    device: str = "auto"
    workers: int = 0
    ray: str = ""
    checkpoint_s: float = 30.0
    paths: Mapping[str, str] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    devices: Devices | None = None

    def __post_init__(self) -> None:
        per_round = self.per_round or self.clients
        wrong = [
            text
            for good, text in (
                (self.rounds >= 1, f"rounds must be >= 1, got {self.rounds}"),
                (self.clients >= 1, f"clients.count must be >= 1, got {self.clients}"),
                (
                    0 <= self.per_round <= self.clients,
                    f"clients.per_round is {self.per_round}, there are {self.clients} clients",
                ),
                (
                    0 <= self.minimum <= per_round,
                    f"clients.minimum is {self.minimum}, {per_round} take part in a round",
                ),
                (0 <= self.over_select <= 10, "clients.over_select must be in [0, 10]"),
                (self.deadline_s >= 0, "clients.deadline_s must be >= 0"),
                (self.every >= 1, f"evaluate.every must be >= 1, got {self.every}"),
                (self.seed >= 0, f"seed must be >= 0, got {self.seed}"),
                (self.workers >= 0, f"workers must be >= 0, got {self.workers}"),
                (
                    self.engine in ENGINES,
                    f"there is no engine {self.engine!r}; there are {', '.join(ENGINES)}",
                ),
                (
                    accelerator.is_name(self.device),
                    f"there is no device {self.device!r}; there are auto, cpu, cuda, cuda:N, mps",
                ),
                (
                    not self.ray or self.device in ("auto", "cpu"),
                    f"Ray's actors train on processors, and device {self.device} was asked for: "
                    "leave out one of ray and device",
                ),
            )
            if not good
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))
        object.__setattr__(self, "per_round", per_round)
        object.__setattr__(self, "minimum", self.minimum or per_round)

    def processes(self, devices: Sequence[str]) -> int:
        """How many train: as asked, or one on each of these devices; on processors, one a core."""
        return self.workers or (_cores() if tuple(devices) == accelerator.CPU else len(devices))

    def create_algorithm(self) -> Algorithm:
        """The algorithm, its parameters checked.

        Raises:
            ConfigError: It is unknown, a parameter is wrong, or it cannot go with the rest.
        """
        try:
            algorithm = create(self.algorithm, self.algorithm_config)
        except (UnknownAlgorithm, BadParameter, TypeError) as error:
            raise ConfigError(str(error)) from error
        if algorithm.kind is Kind.ASYNCHRONOUS and (self.over_select or self.deadline_s):
            raise ConfigError(
                f"{algorithm.name} has no rounds to over-select for or to close at a deadline",
                "leave out clients.over_select and clients.deadline_s, or choose fedavg",
            )
        return algorithm

    def create_treatment(self) -> Treatment:
        """What is done to updates.

        Raises:
            ConfigError: A part of it is wrong.
        """
        try:
            return Treatment.parse(json.dumps(self.treatment))
        except (BadParameter, TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error

    def create_groups(self, algorithm: Algorithm, treatment: Treatment) -> Groups | None:
        """How clients are grouped, and the check that all of it goes together.

        Raises:
            ConfigError: A part of it is wrong, or cannot go with the rest.
        """
        try:
            groups = Groups.parse(json.dumps(self.groups))
            check(
                algorithm,
                treatment,
                groups,
                self.clients,
                per_round=self.per_round,
                minimum=self.minimum,
            )
        except (BadParameter, TypeError) as error:
            raise ConfigError(str(error)) from error
        return groups

    def create_liars(self, algorithm: Algorithm, groups: Groups | None = None) -> Liars | None:
        """Who lies and how, checked against the rest; None where nobody does.

        Raises:
            ConfigError: A part of it is wrong, or cannot go with the rest.
        """
        if not self.attack:
            return None
        try:
            liars = Liars.read(self.attack, self.clients, self.seed, algorithm)
        except BadParameter as error:
            raise ConfigError(f"simulation.attack: {error}") from error
        if liars.forges and groups is not None and not groups.relay:
            raise ConfigError(
                f"simulation.attack: {liars.kind} forges updates where the server sees them, and "
                "groups with rounds of their own send it none of a client",
                "kind: label_flip, or let groups only add up (groups.rounds: 1)",
            )
        return liars

    def check(self) -> None:
        """Refuse what cannot go together, before anything is loaded.

        Raises:
            ConfigError: With the ways out.
        """
        algorithm = self.create_algorithm()
        groups = self.create_groups(algorithm, self.create_treatment())
        self.create_liars(algorithm, groups)

    def identity(self) -> str:
        """What must be the same for a run to be resumed, as JSON."""
        free = {"rounds", "workers", "ray", "checkpoint_s", "name", "engine", "device", "paths"}
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        kept["app"] = self.app.name  # a workspace may be moved, and its code mended
        return json.dumps(kept, sort_keys=True, default=str)


def read(
    source: Path | str | Mapping[str, Any],
    *,
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """A plan from a run file, or from a mapping of the same keys.

    Args:
        source: The file; a mapping's ``workspace`` is relative to the current directory.
        changes: What a sweep varies: ``lr`` (a key of ``config``), or a path to any other key
            such as ``algorithm_config.server_lr``, ``clients.per_round`` or ``seed``.
        **settings: Attributes of `Plan` that are said elsewhere; None says nothing.

    Raises:
        ConfigError: With what is wrong in the file or between its keys.
    """
    if isinstance(source, Mapping):
        found, workspace = _read_mapping(source)
    else:
        found, workspace = runfile.read_simulated(Path(source))
    _unfold(found)
    for path, value in (changes or {}).items():
        _change(found, path, value)
    if changes:  # they must be what a file may say
        found, workspace = _read_mapping({**found, "workspace": str(workspace)})
        _unfold(found)
    for key in ("app", "clients", "rounds"):
        if key not in found and settings.get(key) is None:
            raise ConfigError(f"{_called(source)}: there is no `{key}`")
    clients, evaluate = found["clients"], found.get("evaluate") or {}
    simulation = found.get("simulation") or {}
    if "count" not in clients:
        raise ConfigError(f"{_called(source)}: there is no `clients.count`")
    # Devices draw from it too, so it is settled before them.
    given = settings.get("seed")
    seed = found.get("seed", 0) if given is None else given
    values: dict[str, Any] = {
        "name": found.get("name", "simulation"),
        "app": workspace / found["app"],
        "rounds": found.get("rounds"),
        "clients": clients["count"],
        "seed": seed,
        "every": evaluate.get("every"),
        "on_clients": evaluate.get("devices"),
        "on_central": evaluate.get("central"),
        "devices": Devices.read(simulation["devices"] or {}, workspace, seed)
        if "devices" in simulation
        else None,
    }
    values["paths"] = {
        name: str(workspace / Path(path).expanduser())
        for name, path in (simulation.get("data") or {}).items()
    }
    for key in ("config", "algorithm", "algorithm_config", "treatment", "groups"):
        values[key] = found.get(key)
    for key in ("per_round", "over_select", "minimum", "deadline_s"):
        values[key] = clients.get(key)
    for key in ("engine", "device", "workers", "checkpoint_s", "attack"):
        values[key] = simulation.get(key)
    values |= {key: value for key, value in settings.items() if value is not None}
    if not values["app"].is_file():
        raise ConfigError(f"there is no {values['app'].name} in {values['app'].parent}")
    plan = Plan(**{key: value for key, value in values.items() if value is not None})
    plan.check()
    return plan


def _read_mapping(source: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The same checks as for a file, by way of one."""
    whole = {**source, "workspace": str(Path(source.get("workspace", ".")).resolve())}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "simulation.yaml"
        file.write_text(json.dumps(whole, default=_native))
        try:
            return runfile.read_simulated(file)
        except ConfigError as error:
            text = str(error).replace(f"{file}, line 1", "the run").replace(str(file), "the run")
            raise ConfigError(text, error.hint) from None


def _unfold(found: dict[str, Any]) -> None:
    """What is read as JSON, as mappings."""
    for key in ("config", "algorithm_config", "treatment"):
        value = found.get(key) or {}
        found[key] = json.loads(value) if isinstance(value, str) else dict(value)
    if "attack" in (found.get("simulation") or {}):
        value = found["simulation"]["attack"]
        found["simulation"]["attack"] = json.loads(value) if isinstance(value, str) else value


def _native(value: Any) -> Any:
    """NumPy's numbers as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _change(found: dict[str, Any], path: str, value: Any) -> None:
    first, _, rest = path.partition(".")
    scalars = ("algorithm", "rounds", "seed", "name")
    sections = (
        "config",
        "algorithm_config",
        "treatment",
        "groups",
        "clients",
        "evaluate",
        "simulation",
    )
    if not rest:
        if first in sections:
            raise ConfigError(f"{path} is a section: say which of its keys, as {path}.KEY")
        where = runfile.sections_with(first)
        if where and first not in scalars and first not in found["config"]:
            raise ConfigError(
                f"{path} alone is a key of `config`, which has none of this name",
                f"{where[0]}.{path}; or config.{path}, if that is what you mean",
            )
        (found if first in scalars else found["config"])[first] = value
        return
    if first not in sections:
        raise ConfigError(f"{path}: there is no section {first!r} to change")
    inside = found.setdefault(first, {})
    *between, last = rest.split(".")
    for part in between:
        inside = inside.setdefault(part, {})
        if not isinstance(inside, dict):
            raise ConfigError(f"{path}: `{part}` is {inside!r} and has no keys in it")
    inside[last] = value


def _called(source: Any) -> str:
    return "the run" if isinstance(source, Mapping) else str(source)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
