# SPDX-License-Identifier: Apache-2.0
"""A command that takes a file, and has verbs of its own beside that: `fedml launch init`."""

from typing import Any

import click
from click.shell_completion import CompletionItem


class FileOrVerb(click.Group):
    """A command of its own whose first word may be a verb instead of a file.

    A file that is called like a verb is written as `./init`.
    """

    allow_interspersed_args = True

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """As click does; a verb gets its context without the arguments of the command."""
        if not args or args[0] not in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        # Not of this command itself: its FILE would stand in the usage of the verb.
        own = click.Context(click.Group(self.name), info_name=info_name, parent=parent)
        return self.commands[args[0]].make_context(args[0], args[1:], own, **extra)


def complete(context: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    """The verbs, and files."""
    verbs = context.command.commands if isinstance(context.command, click.Group) else {}
    return [
        *(CompletionItem(verb) for verb in verbs if verb.startswith(begun)),
        CompletionItem(begun, type="file"),
    ]
