# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent diagnose`."""

import dataclasses
import json

import click

from fedml_agent import hardware
from fedml_agent.cli.options import home_option, json_option
from fedml_agent.diagnose import NOTE, OK, WRONG, Diagnosis, Finding
from fedml_agent.home import Home

_COLOURS = {OK: "green", NOTE: "yellow", WRONG: "red"}


@click.command()
@home_option
@json_option
def diagnose(home: Home, as_json: bool) -> None:
    """Look at everything that the agent needs: each line is ok, or says what to do next.

    Home, login, policy, the way to the broker (DNS, TCP, TLS, HTTPS, MQTT), the clock, disk,
    journal, GPUs, and what tasks can be locked into. Nothing is changed, and a running agent keeps
    its connection.

    Exit code 0: the agent can work here; 1: something is not ok.

    \b
    Examples:
      fedml-agent diagnose
      fedml-agent diagnose --json | jq -r '.checks[] | select(.state == "not ok") | .next'
    """
    found: list[Finding] = []
    for finding in Diagnosis(home, nvml=hardware.nvml_of_this_process()).findings():
        found.append(finding)
        if not as_json:
            _show(finding)
    ok = all(finding.state != WRONG for finding in found)
    if as_json:
        checks = [dataclasses.asdict(finding) for finding in found]
        click.echo(json.dumps({"ok": ok, "checks": checks}))
    if not ok:
        raise SystemExit(1)


def _show(finding: Finding) -> None:
    mark = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
    click.echo(f"{finding.name:<19}{mark}{finding.text}")
    if finding.next:
        click.echo(f"{'':<19}next: {finding.next}")
