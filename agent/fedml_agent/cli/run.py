# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent run`: the daemon in the foreground."""

import asyncio
import contextlib
import logging
import signal

import click

from fedml_agent import hardware
from fedml_agent.cli.options import home_option
from fedml_agent.daemon import Daemon
from fedml_agent.home import Home
from fedml_agent.namespaces import harden_process
from fedml_agent.version import VERSION


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@home_option
def run(verbose: bool, home: Home) -> None:
    """Take tasks from the broker and see each to its end, until stopped.

    \b
    The first Ctrl-C (or SIGTERM) takes no more tasks and waits for those that run.
    The second one leaves them running: the next start takes them up again.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    home.membership()  # says so at once when this machine has not joined
    # A task must not read our memory: the keys are in it.
    harden_process()
    with home.locked():
        asyncio.run(_serve(home))


async def _serve(home: Home) -> None:
    daemon = Daemon(home, VERSION, nvml=hardware.nvml_of_this_process())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, daemon.stop)
    with contextlib.suppress(asyncio.CancelledError):  # the second stop
        await daemon.serve()
