# SPDX-License-Identifier: Apache-2.0
"""A FedML script as a run of ours: its data, model and training are its own.

What must be known of it before it runs is read, not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedml import translation
from fedml.errors import ConfigError
from fedml.translation import Kind, Note, Sections, Translation

# What a script calls that only names its data and its model.
_BY_NAME = {
    "fedml.init",
    "fedml.device.get_device",
    "fedml.data.load",
    "fedml.model.create",
    "fedml.FedMLRunner",
    "fedml.run_cross_silo_client",
    "fedml.run_cross_silo_server",
    "fedml.run_hierarchical_cross_silo_client",
    "fedml.run_hierarchical_cross_silo_server",
    "fedml.run_cross_cloud_client",
    "fedml.run_cross_cloud_server",
}
# What brings the data set of the configuration, or the nearest one.
_LOADERS = ("fedml.data.load", "fedml.data.MNIST.data_loader.load_partition_data_mnist")
_TRAINER = 4  # its place among the arguments of FedMLRunner

# What the training of their clients would have to do or say; a script's own decides for itself.
_STEP = "with another local step, which your ClientTrainer takes"
_BY_TRAINING = {
    "fedprox": _STEP,
    "feddyn": _STEP,
    "fednova": "where all take equally many local steps, and your ClientTrainer says no number",
}


def translate(
    sections: Sections, *, trainer: bool, deployed: bool, loads: bool = False
) -> Translation:
    """The run that a script asks for.

    Args:
        sections: Its configuration.
        trainer: It has a ClientTrainer of its own.
        deployed: It is for real machines.
        loads: It will load the data set that the configuration names, and it is not known yet
            which one that is.

    Raises:
        ConfigError: A value makes no sense, or there is nothing like it here.
        DataUnavailable: There is no data set that could stand for its own.
    """
    found = translation.translate(sections, by_name=False, deployed=deployed)
    notes, run = list(found.notes), dict(found.run)
    if loads:
        notes = [*translation.of_dataset(sections, deployed=deployed), *notes]
    if trainer and run["algorithm"] in _BY_TRAINING:
        text = f"{run['algorithm']} is FedAvg {_BY_TRAINING[run['algorithm']]}"
        notes.append(Note(Kind.INSTEAD, f"`federated_optimizer`: {text}"))
        run["algorithm"] = "fedavg"
        run.pop("algorithm_config", None)
    return Translation(run, tuple(notes))


@dataclass(frozen=True, slots=True)
class Look:
    """What a script says of itself.

    Attributes:
        by_name: It names its data set and its model, and has nothing of its own.
        trainer: It gives a ClientTrainer to its runner.
        loads: It has the data set that the configuration names.
    """

    by_name: bool
    trainer: bool
    loads: bool


def look(file: Path) -> Look:
    """Read a script.

    Raises:
        ConfigError: It is no Python.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{file} is no Python script: {error}") from error
    names = dict(_imported(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    runners = [call for call in calls if _name(call.func, names) == "fedml.FedMLRunner"]
    given = [one for call in runners if (one := _trainer(call)) is not None]
    trainer = any(not (isinstance(one, ast.Constant) and one.value is None) for one in given)
    return Look(
        by_name=_is_by_name(tree, calls, runners, names),
        trainer=trainer,
        loads=any(_loads(call, names) for call in calls),
    )


def _is_by_name(
    tree: ast.Module, calls: list[ast.Call], runners: list[ast.Call], names: dict[str, str]
) -> bool:
    """Whether nothing is done in it but what stands in `_BY_NAME`."""
    for node in ast.walk(tree):
        own = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.AsyncFunctionDef)
        changes = isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(
            node.ctx, ast.Load
        )
        if own or changes:
            return False
    if any(not full.startswith("fedml.") and full != "fedml" for full in names.values()):
        return False
    if any(len(call.args) + len(call.keywords) > _TRAINER for call in runners):
        return False
    return bool(calls) and all(_is_ours(call, names) for call in calls)


def _is_ours(call: ast.Call, names: dict[str, str]) -> bool:
    if _name(call.func, names) in _BY_NAME:
        return True
    return isinstance(call.func, ast.Attribute) and call.func.attr == "run" and not call.args


def _loads(call: ast.Call, names: dict[str, str]) -> bool:
    """Whether it brings what the configuration names, and not what stands in its own brackets."""
    return _name(call.func, names) in _LOADERS and not isinstance(
        next(iter(call.args), None), ast.Constant
    )


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that an import brings, with its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"


def _name(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what is called; empty: it has none."""
    if isinstance(node, ast.Attribute):
        inner = _name(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def _trainer(call: ast.Call) -> ast.expr | None:
    if len(call.args) > _TRAINER:
        return call.args[_TRAINER]
    return next((k.value for k in call.keywords if k.arg == "client_trainer"), None)
