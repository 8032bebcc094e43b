# SPDX-License-Identifier: Apache-2.0
"""Workflow files: what is read of them; mistakes are named with their line."""

import json
from pathlib import Path

import pytest

from fedml.cli.graph import drawn
from fedml.errors import ConfigError
from fedml.workflowfile import EXAMPLE, read_workflow
from fedml_protocol.workflow import When


def write(folder: Path, text: str) -> Path:
    file = folder / "flow.yaml"
    file.write_text(text)
    return file


def wrong(folder: Path, text: str) -> tuple[str, str]:
    """What is said of a file that is wrong, without its folder; and the hint."""
    with pytest.raises(ConfigError) as told:
        read_workflow(write(folder, text))
    return str(told.value).replace(f"{folder}/", ""), told.value.hint


def test_jobs_and_runs_are_read_from_files_and_from_within(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: echo $A $B\nenvironment_variables: {A: a, B: b}\n")
    (tmp_path / "app.py").touch()
    name, steps = read_workflow(
        write(
            tmp_path,
            "name: heart\n"
            "steps:\n"
            "  one: {job: job.yaml, env: {B: x, C: y}}\n"
            "  two:\n"
            "    needs: one\n"
            "    when: always\n"
            "    federate: {app: app.py, rounds: 3, clients: {count: 2}, config: {a: 1, b: 2}}\n"
            "    config: {b: 3}\n",
        )
    )
    assert name == "heart"
    one, two = steps
    assert one.request["env"] == {"A": "a", "B": "x", "C": "y"}
    assert (one.kind, one.file, one.workspace) == ("job", tmp_path / "job.yaml", None)
    assert (two.needs, two.when, two.workspace) == (("one",), When.ALWAYS, tmp_path.resolve())
    assert json.loads(two.request["config"]) == {"a": 1, "b": 3}


def test_what_a_step_gets_from_others_it_needs(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "job: echo\nenvironment_variables: {X: '${{steps.a.outputs.x}}'}\n"
    )
    _, steps = read_workflow(
        write(
            tmp_path,
            "steps:\n"
            "  a: {job: {job: echo}}\n"
            "  b: {job: {job: echo}}\n"
            "  c: {needs: [b], inputs: {in: d/file}, job: job.yaml}\n"
            "  d: {job: {job: echo}}\n",
        )
    )
    assert steps[2].needs == ("b", "a", "d")


def test_the_example_is_a_workflow(tmp_path: Path) -> None:
    name, steps = read_workflow(write(tmp_path, EXAMPLE))
    assert (name, [step.name for step in steps]) == ("flow", ["prepare", "report"])
    switched_on = EXAMPLE.replace("\n#  ", "\n  ")
    (tmp_path / "run.yaml").write_text("app: app.py\nrounds: 1\nclients: {count: 1}\n")
    (tmp_path / "app.py").touch()
    (tmp_path / "clean.yaml").write_text("job: echo\n")
    (tmp_path / "serve.yaml").write_text("job: echo\nservice: {}\n")
    steps = read_workflow(write(tmp_path, switched_on))[1]
    assert [step.name for step in steps] == ["prepare", "report", "train", "serve", "sorry"]


def test_mistakes_are_named_with_their_lines(tmp_path: Path) -> None:
    job = "job: {job: echo}"
    for text, said, hint in (
        (
            "steps:\n  a:\n    jobb: x\n",
            "line 3: unknown key `steps.a.jobb`; did you mean `job`?",
            "",
        ),
        ("steps:\n  a: {needs: []}\n", "line 2: the step a has one of `job`, `federate`", ""),
        (f"steps:\n  a b: {{{job}}}\n", "line 2: 'a b' is no name of a step", ""),
        (
            f"steps:\n  train: {{{job}}}\n  b:\n    needs: [trian]\n    {job}\n",
            "line 4: the step b needs trian, which is no step",
            "did you mean train?",
        ),
        (
            f"steps:\n  a: {{needs: b, {job}}}\n"
            f"  b: {{needs: [c], {job}}}\n  c: {{needs: a, {job}}}\n",
            "line 2: steps need each other in a circle: a → b → c → a",
            "",
        ),
        (
            "steps:\n  a:\n    deploy: {job: echo}\n",
            "line 3: the step a has `deploy`, and",
            "write `service: {readiness_probe: /ready}` there; what ends is a step with `job`",
        ),
        (
            "steps:\n  a:\n    job: {job: echo, service: {}}\n",
            "line 3: the step a would never end",
            "write `deploy` in place of `job`: that step has finished when the service answers",
        ),
        ("steps:\n  a:\n    job: gone.yaml\n", "line 3: there is no file gone.yaml", ""),
        (f"steps:\n  a: {{when: sometimes, {job}}}\n", "must be finished, failed, always", ""),
        (
            f"steps:\n  a:\n    config: {{x: 1}}\n    {job}\n",
            "line 3: `config` is for steps with",
            "",
        ),
        (
            f"steps:\n  a:\n    env: {{X: '${{{{ b.x }}}}'}}\n    {job}\n",
            "line 3: ${{ b.x }} means nothing",
            "",
        ),
        (
            "steps:\n  a:\n    job:\n      job: echo\n      prioritty: 3\n",
            "line 5: unknown key",
            "",
        ),
        ("name: x\n", "there are no `steps`", "`fedml workflow init` writes some"),
    ):
        told, next_step = wrong(tmp_path, text)
        assert said in told
        assert told.startswith("flow.yaml")
        assert next_step == hint or not hint


def test_a_mistake_in_a_file_that_is_named_is_told_of_that_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: echo\nlables: {}\n")
    told, _ = wrong(tmp_path, "steps:\n  a: {job: job.yaml}\n")
    assert told == "job.yaml, line 2: unknown key `lables`; did you mean `labels`?"


def test_a_graph_is_drawn_with_a_line_for_each_step_and_lanes_that_meet() -> None:
    needs = {
        "load": [],
        "left": ["load"],
        "right": ["load"],
        "alone": [],
        "join": ["left", "right"],
        "end": ["join", "alone"],
    }
    assert [f"{line:<7}{name}".rstrip() for line, name in drawn(needs)] == [
        "●      load",
        "├─╮",
        "● │    left",
        "│ ●    right",
        "│ │ ●  alone",
        "├─╯ │",
        "●   │  join",
        "├───╯",
        "●      end",
    ]
