# SPDX-License-Identifier: Apache-2.0
"""FedML's federated configurations (`fedml_config.yaml`) into run files of ours.

    run = translation.accept(Path("fedml_config.yaml"))     # a mapping; warnings say what differs

Nothing is dropped without a word: a key either becomes something (`keys.KEYS` says what), or a
warning names it with the reason. What would protect somebody and is not there (secure aggregation,
an unknown defence) is refused where real machines take part, and named where all is simulated.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

import fedml.named
from fedml import runfile, yamlfile
from fedml.data.errors import DataError, DatasetMissing
from fedml.data.stand_in import is_here, nearest
from fedml.errors import ConfigError, DataUnavailable
from fedml.federate.application import ApplicationError
from fedml.translation.algorithms import (
    Flat,
    algorithm_of,
    attack_of,
    groups_of,
    in_the_clear,
    listed,
    number,
    treatment_of,
    whole,
)
from fedml.translation.keys import BY_NAME, SWITCHES, Unused

Sections = Mapping[str, Mapping[str, Any]]

_PAGE = "docs/fedml.md has every key"
_WORKSPACE = Path(fedml.named.__file__).parent
_OURS = str(_WORKSPACE.parent)
SGD, OPTIMIZER = "sgd.py", "optimizer.py"  # the user files in there


class Differs(UserWarning):
    """Something in a configuration has no effect here, or another one than in FedML."""


class Kind(StrEnum):
    """What a note is about; `--strict` lets only the first pass."""

    NO_EFFECT = "no effect"
    INSTEAD = "instead"


@dataclass(frozen=True, slots=True)
class Note:
    """One thing to tell the person."""

    kind: Kind
    text: str


@dataclass(slots=True)
class Notes:
    """What there is to tell, in order."""

    said: list[Note] = field(default_factory=list)

    def no_effect(self, text: str) -> None:
        """Something is left aside, and the model is the same."""
        self.said.append(Note(Kind.NO_EFFECT, text))

    def instead(self, text: str) -> None:
        """Something else is done than was asked for."""
        self.said.append(Note(Kind.INSTEAD, text))


@dataclass(frozen=True, slots=True)
class Translation:
    """A run of ours, and what differs from what was asked for.

    Attributes:
        run: The keys of a run file.
        notes: For people.
    """

    run: Mapping[str, Any]
    notes: tuple[Note, ...]


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The sections of a configuration.

    Raises:
        ConfigError: The file is no YAML, or a section is not a mapping.
    """
    try:
        found = yaml.load(file.read_text(), yamlfile.Loader)  # noqa: S506 - a safe one
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{file}: a mapping of sections is expected")
    return _sections(found, str(file))


def _sections(found: Mapping[Any, Any], called: str) -> dict[str, dict[str, Any]]:
    for name, section in found.items():
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError(f"{called}: the section `{name}` must be a mapping", _PAGE)
    return {str(name): dict(section or {}) for name, section in found.items()}


def accept(source: Any, *, deployed: bool = False, strict: bool = False) -> Any:
    """A run file for whatever may be a configuration of FedML; anything else as it is.

    Args:
        source: A file, or a mapping.
        deployed: It is for real machines.
        strict: Refuse where something else would be done than was asked for.

    Raises:
        ConfigError: It cannot be translated, or `strict` forbids it.
        DataUnavailable: Neither its data set nor anything near it is here.
    """
    if isinstance(source, Mapping):
        if not runfile.has_fedml_sections(source):
            return source
        called = "the configuration"
        sections = _sections(source, called)
    else:
        called = str(source)
        if not runfile.is_fedml(Path(source)):
            return source
        sections = read(Path(source))
    try:
        translation = translate(sections, deployed=deployed)
    except ConfigError as error:
        raise ConfigError(f"{called}: {error}", error.hint) from error
    settle(translation.notes, called, strict=strict)
    return {"name": Path(called).stem if called == str(source) else "fedml", **translation.run}


def settle(notes: Sequence[Note], called: str, *, strict: bool) -> None:
    """Warn of each note.

    Raises:
        ConfigError: `strict`, and something else would be done than was asked for.
    """
    other = [note.text for note in notes if note.kind is Kind.INSTEAD]
    if strict and other:
        raise ConfigError(f"{called}: {'; '.join(other)}", "leave out --strict to run it so")
    tell(notes, called)


def tell(notes: Iterable[Note], called: str) -> None:
    """Warn of each, as of the line of the user's that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    for note in notes:
        warnings.warn(f"{called}: {note.text}", Differs, stacklevel=level)


def flatten(sections: Sections) -> dict[str, Any]:
    """All keys in one mapping, as FedML has them.

    `train_args` come last: `fhe_args` has a `batch_size` too.
    """
    flat: dict[str, Any] = {}
    for name in sorted(sections, key=lambda name: name == "train_args"):
        flat |= sections[name]
    return flat


def translate(
    sections: Sections,
    *,
    deployed: bool = False,
    by_name: bool = True,
    present: Callable[[str], bool] | None = None,
    gpus: Callable[[], int] | None = None,
) -> Translation:
    """A run of ours for a configuration; pure but for the questions what is on this machine.

    Args:
        sections: By name, as `read` gives them.
        deployed: It is for real machines.
        by_name: Data set and model are those it names; False where a script brings its own.
        present: Whether a data set of ours is on this machine.
        gpus: How many GPUs torch sees.

    Raises:
        ConfigError: A value makes no sense, or there is nothing like it here.
        DataUnavailable: Neither its data set nor anything near it is here.
    """
    flat, notes = Flat(flatten(sections)), Notes()
    algorithm, parameters = algorithm_of(flat, notes, deployed=deployed)
    clients = _clients(flat, notes, deployed=deployed)
    config = _training(flat, notes, algorithm, needed=by_name)
    if by_name:
        config |= _named(flat, notes, present or is_here, deployed=deployed)
    every = whole(flat, "frequency_of_the_test", 1)
    rounds = whole(flat, "comm_round")
    run: dict[str, Any] = {
        "workspace": str(_WORKSPACE),
        "app": OPTIMIZER if "client_optimizer" in config else SGD,
        "algorithm": algorithm,
        "rounds": rounds,
        "seed": whole(flat, "random_seed", 0),
        "clients": clients,
        # Agents hold the data; the broker's machine may not.
        "evaluate": {
            "every": every if every > 0 else max(rounds, 1),
            "devices": deployed,
            "central": not deployed,
        },
        "config": config,
    }
    if parameters:
        run["algorithm_config"] = parameters
    if deployed:
        config["local_test"] = True
    name = flat.get("run_name") or flat.get("name")
    if name:
        run["name"] = str(name)
    taking_part = clients.get("per_round") or clients["count"]
    treatment = treatment_of(flat, notes, run, taking_part, deployed=deployed)
    if treatment:
        run["treatment"] = treatment
    groups = groups_of(flat, notes)
    if groups:
        run["groups"] = groups
    simulation: dict[str, Any] = {}
    attack = attack_of(flat, notes, clients["count"], deployed=deployed)
    if attack:
        simulation["attack"] = attack
    if by_name and flat.get("using_gpu"):
        device = _device(flat, notes, gpus or _gpus, deployed=deployed, each=bool(treatment))
        if device:
            simulation["device"] = device
            config["torch"] = True  # models in NumPy stay on processors
    if simulation:
        run["simulation"] = simulation
    _without_effect(sections, flat, notes, deployed=deployed, by_name=by_name)
    return Translation(run, tuple(notes.said))


def _clients(flat: Flat, notes: Notes, *, deployed: bool) -> dict[str, int]:
    ids = listed(flat.get("client_id_list"))
    total = whole(flat, "client_num_in_total", len(ids) or None)
    per_round = whole(flat, "client_num_per_round", total)
    if deployed and ids and len(ids) != total:
        notes.instead(
            f"`client_num_in_total`: {total} clients on {len(ids)} machines (`client_id_list`): "
            f"the data is divided among the {len(ids)} machines, one client each"
        )
        total = len(ids)
    if per_round > total:
        notes.instead(
            f"`client_num_per_round`: {per_round} of {total} clients cannot be: all take part"
        )
        per_round = total
    return {"count": total, "per_round": per_round}


def _training(flat: Flat, notes: Notes, algorithm: str, *, needed: bool) -> dict[str, Any]:
    """How clients train; without `needed`, a script may do it without a learning rate of ours."""
    batch = whole(flat, "batch_size", 32)
    config: dict[str, Any] = {
        "batch_size": batch if batch > 0 else 2**30,
        "epochs": whole(flat, "epochs", 1),
        "weight_decay": number(flat, "weight_decay", flat.get("wd", 0.0)),
        "momentum": number(flat, "momentum", 0.0),
    }
    if needed or "learning_rate" in flat or "lr" in flat:
        config["lr"] = number(flat, "learning_rate", flat.get("lr"))
    return config | _optimizer(flat, notes, algorithm)


def _named(
    flat: Flat, notes: Notes, present: Callable[[str], bool], *, deployed: bool
) -> dict[str, Any]:
    """What `fedml.named` is told."""
    dataset = _dataset(flat, notes, present, deployed=deployed)
    model = str(flat.need("model")).lower()
    try:
        family = fedml.named.check(dataset, model)
    except ApplicationError as error:
        raise ConfigError(f"`model`: {error}") from error
    if family.note:
        notes.instead(f"`model`: {model}: {family.note}")
    config: dict[str, Any] = {
        "dataset": dataset,
        "model": model,
        "partition": method_of(flat, notes),
        "alpha": number(flat, "partition_alpha", 0.5),
        "partition_seed": whole(flat, "random_seed", 0),
    }
    if str(flat.get("federated_optimizer")).lower() == "mime":
        config["torch"] = True  # it needs gradients at an anchor
    if flat.get("fedml_compat") == "exact" and model == "lr":
        config["exact"] = True
    return config


def method_of(flat: Flat, notes: Notes) -> str:
    """The way that data is divided."""
    method = str(flat.get("partition_method", "hetero"))
    if method in ("hetero", "homo", "uniform"):
        return method
    notes.instead(f"`partition_method`: {method} is not known here; hetero is used")
    return "hetero"


def of_dataset(sections: Sections, *, deployed: bool) -> tuple[Note, ...]:
    """What there is to tell of the data set that a configuration names.

    Raises:
        ConfigError: It names none.
        DataUnavailable: Neither it nor anything near it is here.
    """
    notes = Notes()
    _dataset(Flat(flatten(sections)), notes, is_here, deployed=deployed)
    return tuple(notes.said)


def _dataset(flat: Flat, notes: Notes, present: Callable[[str], bool], *, deployed: bool) -> str:
    """The one of ours that stands for the one that is named."""
    named = str(flat.need("dataset"))
    try:
        try:
            dataset, note, differs = nearest(named, present)
        except DatasetMissing:
            if not deployed:
                raise
            # This machine need not have it: those that train must, and say so where they do not.
            dataset, note, differs = nearest(named, lambda name: True)
    except DataError as error:
        text = str(error).removesuffix(f"; {error.hint}")
        raise DataUnavailable(f"`dataset`: {text}", error.hint.removeprefix("run: ")) from error
    if note:
        (notes.instead if differs else notes.no_effect)(f"`dataset`: {note}")
    return dataset


def _device(
    flat: Flat, notes: Notes, gpus: Callable[[], int], *, deployed: bool, each: bool
) -> str:
    """The GPU to train on; empty where it cannot be."""
    if deployed:
        notes.no_effect("`using_gpu` has no effect: machines train by name on CPUs")
        return ""
    if each:
        notes.instead("`using_gpu`: updates are treated one by one, and CPUs train where they are")
        return ""
    number, count = whole(flat, "gpu_id", 0), gpus()
    if number >= count:
        seen = f"torch sees {count} GPUs, there is no number {number}"
        notes.instead(f"`using_gpu`: {seen if count else 'torch sees no GPU here'}; CPUs train")
        return ""
    return f"cuda:{number}" if "gpu_id" in flat else "cuda"


def _gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _optimizer(flat: Flat, notes: Notes, algorithm: str) -> dict[str, Any]:
    """What plain SGD cannot do; nothing where it will do."""
    known = fedml.named.OPTIMIZERS
    name = str(flat.get("client_optimizer", "sgd")).lower()
    if name not in known:
        notes.instead(f"`client_optimizer`: {name} is none of {', '.join(known)}; sgd is used")
        name = "sgd"
    extra = {key: flat[key] for key in ("nesterov", "clip_grad_norm") if flat.get(key)}
    if whole(flat, "gradient_accumulation_steps", 1) > 1:
        extra["gradient_accumulation_steps"] = whole(flat, "gradient_accumulation_steps")
    if name == "sgd" and not extra:
        return {}
    if algorithm in _PLAIN_SGD:
        asked = name if name != "sgd" else ", ".join(extra)
        notes.instead(f"`client_optimizer`: {algorithm} is made for plain SGD, not for {asked}")
        return {}
    return {"client_optimizer": name, "torch": True, **extra}


# They ask for full gradients, or divide by the rate of the local steps.
_PLAIN_SGD = ("fedsgd", "mime", "mimelite", "qfedavg", "scaffold", "fednova")


def _without_effect(
    sections: Sections, flat: Flat, notes: Notes, *, deployed: bool, by_name: bool
) -> None:
    """Name every key that asks for something and has no effect, those of one reason together."""
    for switch, what in (("enable_sa", "secure aggregation"), ("enable_fhe", "encryption")):
        if not flat.get(switch):
            continue
        if deployed:
            raise in_the_clear(f"`{switch}`", what, f"{switch}: false")
        notes.no_effect(
            f"`{switch}` has no effect: in a simulation nobody is to be kept from the updates, "
            "and their mean is the same"
        )
    reasons: dict[str, list[str]] = {}
    for name, section in sections.items():
        if name in SWITCHES and not section.get(SWITCHES[name]):
            continue
        for key, value in section.items():
            if value in (None, "", False) or value == {} or value == []:
                continue  # it asks for nothing
            meaning = BY_NAME.get(key)
            if meaning is None and not by_name:
                continue  # the script's own
            if meaning is None:
                near = difflib.get_close_matches(key, BY_NAME, n=1, cutoff=0.8)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                notes.no_effect(f"`{key}` has no effect: training by name does not know it{hint}")
            elif isinstance(meaning, Unused) and (by_name or not meaning.by_name):
                reasons.setdefault(meaning.reason, []).append(key)
    for reason, keys in reasons.items():
        have = "has" if len(keys) == 1 else "have"
        notes.no_effect(f"{', '.join(f'`{key}`' for key in keys)} {have} no effect: {reason}")
