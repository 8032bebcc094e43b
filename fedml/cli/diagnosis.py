# SPDX-License-Identifier: Apache-2.0
"""`fedml diagnosis`."""

import dataclasses
from pathlib import Path

import click

from fedml.cli.options import home_option, json_option
from fedml.cli.tables import print_json
from fedml.diagnosis import NOTE, OK, WRONG, Finding, findings

_COLOURS = {OK: "green", NOTE: "yellow", WRONG: "red"}


@click.command()
@home_option
@json_option
def diagnosis(home: Path, as_json: bool) -> None:
    """Look at everything between here and your runs: each line is ok, or says what to do next.

    Versions, disk, login, the way to the broker (DNS, TCP, TLS and its CA, HTTPS), the clock, your
    token, and whether a machine is there. Nothing is changed. On a machine that runs jobs,
    `fedml-agent diagnose` looks at what the agent needs.

    Exit code 0: you can work; 1: something is not ok.

    \b
    Examples:
      fedml diagnosis
      fedml diagnosis --json | jq -r '.checks[] | select(.state == "not ok") | .next'
    """
    found: list[Finding] = []
    for finding in findings(home):
        found.append(finding)
        if not as_json:
            show(finding)
    ok = all(finding.state != WRONG for finding in found)
    if as_json:
        print_json({"ok": ok, "checks": [dataclasses.asdict(finding) for finding in found]})
    if not ok:
        raise SystemExit(1)


def show(finding: Finding) -> None:
    """One line, or two."""
    mark = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
    click.echo(f"{finding.name:<14}{mark}{finding.text}")
    if finding.next:
        click.echo(f"{'':<14}next: {finding.next}")
