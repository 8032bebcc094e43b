# SPDX-License-Identifier: Apache-2.0
"""FedML's job files of `job_type: federate`: a federated run whose parts stand in a workspace.

`job` and `server_job` start scripts with a configuration (`--cf`). Here agents are the clients, and
what the scripts do by hand the broker does: the configuration becomes a run as `fedml federate`
makes one of it. Scripts with data, model or training of their own go along and run up to their
`FedMLRunner` (`packed_script.py`); those that only name these are not needed.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedml import jobfile, package, packed_script, runfile, translation
from fedml.errors import ConfigError
from fedml.jobkeys import FEDERATED
from fedml.translation import Notes, scripts
from fedml.yamlfile import workspace_of

_CONFIG = ("--cf", "--yaml_config_file")
_NAME = "fedml_config.yaml"


def read(
    file: Path, within: yaml.Node | None = None, *, strict: bool = False
) -> tuple[dict[str, Any], Path]:
    """What a federated job asks for, and its workspace.

    Beside what the broker is asked there are `data` (stored objects by the path that they get) and
    `files` (texts by name), which `fedml.launch` adds to the package.

    Args:
        within: The job is not all of the file, but this mapping in it.
        strict: Refuse where something else would be done than it asks for.

    Raises:
        ConfigError: It is wrong, or `strict` forbids it.
        DataUnavailable: Neither its data set nor anything near it is here.
    """
    found, env = jobfile.read_keys(file, FEDERATED, within)
    env |= found.get("environment_variables", {})
    workspace = workspace_of(file, found)
    sent = package.files(workspace)
    started = {key: Started.of(found.get(key, "")) for key in ("job", "server_job")}
    for key, one in started.items():
        if one.script and workspace / one.script[0] not in sent:
            raise ConfigError(
                f"{file}: `{key}` starts {one.script[0]}, which is not in the workspace "
                f"{workspace}, or an ignore file leaves it out"
            )
    config = _config(file, workspace, sent, [*started.values()])
    sections = translation.read(config)
    client, server = (one.script for one in started.values())
    looks = [scripts.look(workspace / script[0]) for script in (client, server) if script]
    notes = Notes()
    own = not all(look.by_name for look in looks)
    if not looks:
        notes.instead("`job` starts no Python script: data set and model are those of the names")
    _left_out(found, env, notes, own=own)
    try:
        if own:
            trainer = any(look.trainer for look in looks)
            loads = any(look.loads for look in looks)
            translated = scripts.translate(sections, trainer=trainer, deployed=True, loads=loads)
        else:
            translated = translation.translate(sections, deployed=True)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}", error.hint) from error
    translation.settle(notes.said, str(file), strict=strict)
    translation.settle(translated.notes, str(config), strict=strict)
    run = dict(translated.run)
    files: dict[str, str] = {}
    if own:
        files = packed_script.packed(client or server, sections, server=server, env=env)
        run = {k: v for k, v in run.items() if k != "workspace"} | {"app": packed_script.APP}
    request, by_name = runfile.read_mapping(run, config, files)
    request |= {"name": found.get("job_name") or run.get("name") or file.stem}
    request |= _machines(file, found)
    request["clients"]["labels"] = found.get("labels", {})
    if not own:
        return request, by_name
    return request | {"data": found.get("data", {}), "files": files}, workspace


@dataclass(frozen=True, slots=True)
class Started:
    """What shell lines start.

    Attributes:
        script: A Python script and the words of its command line; empty: there is none.
        config: The configuration that is named; empty: none is.
    """

    script: tuple[str, ...] = ()
    config: str = ""

    @classmethod
    def of(cls, lines: str) -> "Started":
        """Of several commands, the last that names a configuration, else the last script."""
        found = cls()
        for words in _commands(lines):
            at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
            script = () if at is None else tuple(words[at:])
            config = _value(words)
            if (config and (script or not found.script)) or (script and not found.config):
                found = cls(script, config)
        return found


def _commands(lines: str) -> Iterator[list[str]]:
    """The words of each command, as a shell takes them apart; what it would put in stays."""
    for line in lines.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation over several lines: no command of ours
            continue
        command: list[str] = []
        for word in words:
            if not set(word) <= set("();<>|&"):
                command.append(word)
                continue
            if word[0] in "<>" and command and command[-1].isdigit():
                command.pop()  # of `2>`
            yield command
            command = []
        yield command


def _value(words: Sequence[str]) -> str:
    """What follows `--cf`; empty: nothing does."""
    for n, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in _CONFIG:
            return value if equals else next(iter(words[n + 1 :]), "")
    return ""


def _config(file: Path, workspace: Path, sent: Sequence[Path], started: Sequence[Started]) -> Path:
    """The configuration that the lines name, or else the only one of the workspace."""
    named = list(dict.fromkeys(one.config for one in started if one.config))
    if len(named) > 1:
        raise ConfigError(
            f"{file}: `job` names the configuration {named[0]}, and `server_job` {named[1]}",
            "one run has one configuration: name the same after --cf in both",
        )
    if named:
        if not (workspace / named[0]).is_file():
            raise ConfigError(
                f"{file}: there is no {named[0]}, which --cf names, in the workspace {workspace}"
            )
        return workspace / named[0]
    there = [path for path in sent if path.name == _NAME]
    if len(there) == 1:
        return there[0]
    many = ", ".join(str(path.relative_to(workspace)) for path in there)
    raise ConfigError(
        f"{file}: no line of `job` and `server_job` names a configuration, and the workspace has "
        + (f"several: {many}" if many else f"no {_NAME}"),
        "write `python3 main.py --cf config/fedml_config.yaml`",
    )


def _left_out(found: Mapping[str, Any], env: Mapping[str, str], notes: Notes, *, own: bool) -> None:
    """Name what a federated run has nothing for; a script of one's own might miss it."""
    say = notes.instead if own else notes.no_effect
    installs = "a federated run installs nothing on machines: what it imports must be there"
    for key, reason in (
        ("bootstrap", installs),
        ("requirements", installs),
        ("secrets", "a federated run hands none to its machines"),
    ):
        if found.get(key):
            say(f"`{key}` has no effect: {reason}")
    if own:
        return
    by_name = "the scripts only name data set and model, and are not run"
    for key in ("data", "environment_variables"):
        if found.get(key):
            notes.no_effect(f"`{key}` has no effect: {by_name}")
    for key in found:
        if key.endswith(("_args", "_params")) and found[key]:
            notes.no_effect(f"`{key}` has no effect: {by_name}; the configuration has `train_args`")


def _machines(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of each machine."""
    computing = found.get("computing", {})
    needs, optional = jobfile.needs_of(file, computing)
    asked: dict[str, Any] = {"needs": jobfile.without_gpus(needs) if optional else needs}
    if found.get("cluster"):
        asked["cluster"] = found["cluster"]
    if "maximum_cost_per_hour" in computing:
        asked["max_price_per_hour"] = computing["maximum_cost_per_hour"]
    return asked
