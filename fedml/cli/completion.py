# SPDX-License-Identifier: Apache-2.0
"""`fedml completion SHELL`: one script for all three commands."""

import click
from click.shell_completion import get_completion_class

_PROGRAMS = ("fedml", "fedml-agent", "fedml-broker")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script for completion by TAB.

    It completes fedml, fedml-agent and fedml-broker in SHELL.

    \b
    Where it goes, once:
      echo 'eval "$(fedml completion bash)"' >> ~/.bashrc
      echo 'eval "$(fedml completion zsh)"' >> ~/.zshrc       # after compinit
      fedml completion fish > ~/.config/fish/conf.d/fedml.fish
    """
    found = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"this version of click does not know {shell}")
    for program in _PROGRAMS:
        variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
        # Only the names go into the script; it asks the program itself when TAB is pressed.
        command = click.Group(program)
        click.echo(found(command, {}, program, variable).source())
