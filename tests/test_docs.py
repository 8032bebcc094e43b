# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: every command has help and a page that names it.

What README and pages show as commands or files is run by `tests/end_to_end/test_docs.py`.
"""

import contextlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fedml.cli import command as fedml
from fedml.jobkeys import ALIASES, FEDERATED, KEYS
from fedml.workflowfile import STEP_KEYS
from fedml_agent.cli import command as fedml_agent
from fedml_broker.cli import command as fedml_broker

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text()

# The page of each word. What is not here may stand on any page.
PAGE_OF = {
    "fedml-agent": "agent.md",
    "fedml-broker": "broker.md",
    "fedml launch": "launch.md",
    "fedml run": "launch.md",
    "fedml device": "launch.md",
    "fedml federate": "federate.md",
    "fedml data": "data.md",
    "fedml storage": "storage.md",
    "fedml workflow": "workflow.md",
}


def _walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for verb in command.list_commands(context):
            found = command.get_command(context, verb)
            assert found is not None, f"{name} {verb} is listed and not there"
            yield from _walk(f"{name} {verb}", found)


COMMANDS = dict(
    found
    for name, command in (
        ("fedml", fedml),
        ("fedml-agent", fedml_agent),
        ("fedml-broker", fedml_broker),
    )
    for found in _walk(name, command)
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help, f"`{name}` says nothing of itself"
    first = command.help.partition("\n\n")[0]
    assert re.search(r"[.:]", first), f"`{name}`: a sentence comes first, not {first!r}"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"`{name} {parameter.opts[0]}` has no help"


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.hidden])
def test_every_command_has_examples_that_it_understands(name: str) -> None:
    text = inspect.cleandoc(COMMANDS[name].help or "")
    found = re.split(r"\n\x08\n[A-Z][^\n]*:\n", text + "\n")
    assert len(found) > 1, f"`{name}` has no examples"
    shown = [words for block in found[1:] for words in _commands(block.partition("\n\n")[0])]
    assert any(" ".join(words).startswith(name) for words in shown), (
        f"`{name}` does not show itself"
    )
    for words in shown:
        known = words.pop(0)
        while words and f"{known} {words[0]}" in COMMANDS:
            known = f"{known} {words.pop(0)}"
        command = COMMANDS[known]
        taken = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        assert {*options} <= taken, f"`{name} --help` shows `{known} {' '.join(words)}`"
        is_group = isinstance(command, click.Group) and not _takes_words(command)
        assert not (is_group and words and words[0] not in taken), f"{known} has no {words[0]}"


def _commands(block: str) -> Iterator[list[str]]:
    """Ours, in lines of shell: without comments, and one for each part of a pipe."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"\$\(|\||&&|;|\)|<", line.partition("  #")[0]):
            with contextlib.suppress(ValueError):  # half of a quoted text
                words = shlex.split(part)
                if words and words[0] in ("fedml", "fedml-agent", "fedml-broker"):
                    yield words


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if not isinstance(c, click.Group)])
def test_every_command_is_named_on_its_page(name: str) -> None:
    word = next((w for w in (" ".join(name.split()[:2]), name.split()[0]) if w in PAGE_OF), None)
    pages = [PAGE_OF[word]] if word else list(PAGES)
    named = re.compile(rf"\b{re.escape(name)}\b")
    assert any(named.search(PAGES[page]) for page in pages), f"`{name}` is not in {pages}"


def _takes_words(command: click.Command) -> bool:
    return any(isinstance(parameter, click.Argument) for parameter in command.params)


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_no_page_shows_a_command_that_does_not_exist(page: str) -> None:
    text = README if page == "README.md" else PAGES[page]
    word = "[a-z]+(?:-[a-z]+)*"
    shown = re.findall(rf"(?:^|`|\$\()(fedml(?:-agent|-broker)?(?: {word})*)", text, re.M)
    for words in {tuple(found.split()) for found in shown if " " in found}:
        known = words[0]
        for word in words[1:]:
            # `fedml launch` is a group that takes a file, too.
            if isinstance(COMMANDS[known], click.Group) and not _takes_words(COMMANDS[known]):
                assert f"{known} {word}" in COMMANDS, f"{page} shows `{' '.join(words)}`"
                known = f"{known} {word}"


def test_the_table_of_algorithms_is_that_of_the_code() -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], check=True)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = (
        ROOT / page
        if page.isupper() or page.endswith(("README.md", "CONTRIBUTING.md"))
        else (ROOT / "docs" / page)
    )
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_page_names_every_key_that_is_otherwise_in_a_federated_job() -> None:
    section = PAGES["fedml.md"].partition("## Federated jobs")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", section)) | set(
        re.findall(r"^([a-z_]+):", section, re.M)
    )
    other = {name for name, kind in FEDERATED.items() if KEYS[name] is not kind}
    assert other <= named


def test_the_page_says_of_every_key_of_a_job_file_whether_it_is_honoured() -> None:
    keys: dict[str, str] = {}
    for name, kind in KEYS.items():
        within = {f"{name}.{k}": v for k, v in kind.items()} if isinstance(kind, dict) else None
        keys |= {k: _standing(v) for k, v in (within or {name: kind}).items()}
    rows = re.findall(r"^\| (`[^|]+`) \| (honoured|warned) \|", PAGES["launch.md"], re.M)
    told = {key: is_ for names, is_ in rows for key in re.findall(r"`([^`]+)`", names)}
    assert told == keys
    for alias in ALIASES:
        assert re.search(rf"(S: |Also )`{alias}`", PAGES["launch.md"]), alias


def test_the_page_of_workflows_has_every_key() -> None:
    rows = re.findall(r"^\| `([a-zA-Z.]+)` \| ", PAGES["workflow.md"], re.M)
    assert {*STEP_KEYS, "name", "steps.NAME"} <= {*rows}


def _standing(kind: object) -> str:
    return "warned" if isinstance(kind, str) else "honoured"


def test_the_tables_of_options_match_what_the_commands_have() -> None:
    """`docs/broker.md` says what an option is unless given; so does `--help`."""
    up = {o.opts[0]: o for o in COMMANDS["fedml-broker up"].params if isinstance(o, click.Option)}
    rows = re.findall(r"^\| `(--[a-z-]+)[^`]*` \| ([\d.]+) \|", PAGES["broker.md"], re.M)
    assert rows
    for name, default in rows:
        assert float(default) == up[name].default, name
