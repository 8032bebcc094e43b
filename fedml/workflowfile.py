# SPDX-License-Identifier: Apache-2.0
"""Workflow files: jobs, federated runs and services that wait for each other, checked beforehand.

The tables below are the format. What is said of each key in docs/workflow.md is the same.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedml import jobfile, runfile
from fedml.errors import ConfigError
from fedml.launch import read_run
from fedml.yamlfile import Reader, Unfit, as_json, is_null, text, texts
from fedml_protocol.workflow import BadGraph, Graph, Node, When, check

_STEP_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
_REFERENCE = re.compile(r"\$\{\{(.*?)\}\}")
_WITHIN = re.compile(r"\s*steps\.([A-Za-z0-9_-]+)\.outputs\.[A-Za-z0-9_.-]+\s*")


def _file_or_mapping(loader: yaml.SafeLoader, node: yaml.Node) -> str | yaml.Node:
    """The name of a file, or what would stand in it."""
    if isinstance(node, yaml.MappingNode):
        return node
    if not (found := text(loader, node)):
        raise Unfit("must be the name of a file, or what would stand in it")
    return found


def _names(loader: yaml.SafeLoader, node: yaml.Node) -> list[str]:
    """Steps by name: a list, or one."""
    if is_null(node):
        return []
    if isinstance(node, yaml.SequenceNode):
        return [text(loader, one) for one in node.value]
    return [text(loader, node)]


def _when(loader: yaml.SafeLoader, node: yaml.Node) -> When:
    try:
        return When(text(loader, node))
    except ValueError:
        raise Unfit(f"must be {', '.join(When)}, and is {node.value!r}") from None


STEP_KEYS: dict[str, Any] = {
    "job": _file_or_mapping,
    "federate": _file_or_mapping,
    "deploy": _file_or_mapping,
    "needs": _names,
    "when": _when,
    "inputs": texts,
    "env": texts,
    "config": as_json,
}
KINDS = ("job", "federate", "deploy")
KEYS: dict[str, Any] = {"name": text, "steps": {"*": STEP_KEYS}}

# What `fedml workflow init` writes.
EXAMPLE = """\
# A workflow: jobs, federated runs and services that wait for each other.
# `fedml workflow run workflow.yaml`
# Every key: docs/workflow.md.  What it looks like: `fedml workflow show workflow.yaml`

steps:
  prepare:
    job:                                # what would stand in a job file; or the name of one
      job: |
        echo "rows=120" >> "$FEDML_OUTPUT"            # a value for other steps
        echo "some data" > "$FEDML_OUTPUT_DIR/data.txt"   # a file for other steps

  report:
    needs: [prepare]                    # begins when these have finished
    inputs:
      data.txt: prepare/data.txt        # path in the job's workspace: STEP, or STEP/FILE
    env:
      ROWS: ${{ steps.prepare.outputs.rows }}
    job:
      job: |
        echo "$ROWS rows, and: $(cat data.txt)"

#  train:
#    needs: [prepare]
#    federate: run.yaml                 # its model is the file model.safetensors for other steps
#    config:
#      rows: ${{ steps.prepare.outputs.rows }}

#  serve:                               # stays up; has finished when it answers
#    inputs:
#      model.safetensors: train/model.safetensors
#    deploy: serve.yaml                 # a job file with `service`, see docs/deploy.md

#  sorry:
#    needs: [report]
#    when: failed                       # or always; what is not said is finished
#    job: clean.yaml
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, checked.

    Attributes:
        kind: One of `KINDS`.
        file: The file that says what it does; the workflow's own where it stands in there.
        request: What the broker is asked; what its workspace holds is not there yet.
    """

    name: str
    kind: str
    file: Path
    needs: tuple[str, ...] = ()
    when: When = When.FINISHED
    inputs: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    workspace: Path | None = None


def read_workflow(file: Path) -> tuple[str, list[Step]]:
    """The name of a workflow and its steps; nothing is sent.

    Raises:
        ConfigError: Of this file or one that it names, with the line where one is to blame.
    """
    reader = Reader(file)
    found = reader.read(KEYS)
    if not found.get("steps"):
        raise ConfigError(f"{file}: there are no `steps`", "`fedml workflow init` writes some")
    steps = [_step(file, reader, name, said) for name, said in found["steps"].items()]
    try:
        check(graph_of(steps))
    except BadGraph as error:
        line = reader.line("steps", error.step, "needs")
        raise ConfigError(f"{file}, line {line}: {error}", error.hint) from error
    return found.get("name") or file.stem, steps


def graph_of(steps: list[Step]) -> Graph:
    """The steps, as the plan sees them."""
    return {step.name: Node(step.needs, step.when) for step in steps}


def _step(file: Path, reader: Reader, name: str, said: Mapping[str, Any]) -> Step:
    def wrong(what: str, *path: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{file}, line {reader.line('steps', name, *path)}: {what}", hint)

    if _STEP_NAME.fullmatch(name) is None:
        raise wrong(f"{name!r} is no name of a step: a-z, A-Z, 0-9, _ and -")
    kinds = [kind for kind in KINDS if kind in said]
    if len(kinds) != 1:
        raise wrong(f"the step {name} has one of `job`, `federate` and `deploy`")
    kind = kinds[0]
    if "env" in said and kind == "federate":
        raise wrong("`env` is for steps with `job` or `deploy`", "env")
    if "config" in said and kind != "federate":
        raise wrong("`config` is for steps with `federate`", "config")
    source = said[kind]
    path = file.parent / source if isinstance(source, str) else file
    if not path.is_file():
        raise wrong(f"there is no file {path}", kind)
    try:
        return make_step(
            name,
            kind,
            path,
            within=None if isinstance(source, str) else source,
            needs=said.get("needs", ()),
            when=said.get("when", When.FINISHED),
            inputs=said.get("inputs", {}),
            env=said.get("env", {}),
            config=json.loads(said.get("config", "{}")),
        )
    except BadReference as error:
        raise wrong(str(error), "config" if kind == "federate" else "env") from error
    except NoService as error:
        raise wrong(str(error), kind, hint=error.hint) from error


class BadReference(ValueError):
    """Something between ``${{`` and ``}}`` that means nothing."""


class NoService(ConfigError):
    """What is to be deployed ends by itself, or what is to end stays up."""


def make_step(
    name: str,
    kind: str,
    file: Path,
    *,
    within: yaml.Node | None = None,
    needs: Iterable[str] = (),
    when: When = When.FINISHED,
    inputs: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Step:
    """A step from its file; what it gets from another step, it needs.

    Args:
        kind: One of `KINDS`.
        within: What it does is not all of the file, but this mapping in it.
        env: More variables of a job.
        config: More of the configuration of a federated run.

    Raises:
        ConfigError: The file is wrong.
        BadReference: A reference to another step is.
        NoService: It is a job that stays up and is not deployed, or the other way round.
    """
    if kind == "job" and runfile.is_federated_job(file, within):
        kind = "federate"
    request, workspace = _read(kind, file, within)
    if kind == "federate":
        if env:
            raise BadReference(f"{file} is a federated job: its step takes no `env`")
        request["config"] = json.dumps(json.loads(request["config"]) | dict(config or {}))
        values = [request["config"]]
    else:
        _check_service(name, kind, file, request)
        request["env"] = request["env"] | dict(env or {})
        values = list(request["env"].values())
    sources = [source.partition("/")[0] for source in (inputs or {}).values()]
    return Step(
        name=name,
        kind=kind,
        file=file,
        needs=tuple(dict.fromkeys([*needs, *_referred(values), *sources])),
        when=when,
        inputs=inputs or {},
        request=request,
        workspace=workspace,
    )


def _read(kind: str, file: Path, within: yaml.Node | None) -> tuple[dict[str, Any], Path | None]:
    if kind != "federate":
        return jobfile.read_job(file, within=within)
    return read_run(file, within=within)


def _check_service(name: str, kind: str, file: Path, request: Mapping[str, Any]) -> None:
    if kind == "deploy" and "service" not in request:
        raise NoService(
            f"the step {name} has `deploy`, and {file} has no `service`: it would end by itself",
            "write `service: {readiness_probe: /ready}` there; what ends is a step with `job`",
        )
    if kind == "job" and "service" in request:
        raise NoService(
            f"the step {name} would never end: {file} has `service`",
            "write `deploy` in place of `job`: that step has finished when the service answers",
        )


def _referred(values: list[str]) -> Iterator[str]:
    """The steps whose values stand in texts.

    Raises:
        BadReference: It is none.
    """
    for value in values:
        for reference in _REFERENCE.finditer(value):
            within = _WITHIN.fullmatch(reference[1])
            if within is None:
                raise BadReference(
                    f"{reference[0]} means nothing: it is ${{{{ steps.NAME.outputs.VALUE }}}}"
                )
            yield within[1]
