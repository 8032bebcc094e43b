# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent run`: the daemon in the foreground."""

import asyncio
import contextlib
import logging
import signal
from pathlib import Path

import click

from fedml_agent import hardware
from fedml_agent.cli.options import home_option
from fedml_agent.daemon import Daemon
from fedml_agent.home import Home
from fedml_agent.namespaces import harden_process
from fedml_agent.version import VERSION


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.option(
    "--metrics-port",
    metavar="N",
    type=click.IntRange(0, 65535),
    help="Numbers for Prometheus at http://127.0.0.1:N/metrics; this machine only.",
)
@click.option(
    "--metrics-file",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The same into a file ending in .prom, for node_exporter's textfile collector.",
)
@home_option
def run(verbose: bool, metrics_port: int | None, metrics_file: Path | None, home: Home) -> None:
    """Take tasks from the broker and see each to its end, until stopped.

    \b
    The first Ctrl-C (or SIGTERM) takes no more tasks and waits for those that run.
    The second one leaves them running: the next start takes them up again.

    \b
    Examples:
      fedml-agent run
      fedml-agent run --metrics-port 9464
      fedml-agent run --metrics-file /var/lib/node_exporter/fedml.prom
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    home.membership()  # says so at once when this machine has not joined
    # A task must not read our memory: the keys are in it.
    harden_process()
    with home.locked():
        asyncio.run(_serve(home, metrics_port, metrics_file))


async def _serve(home: Home, port: int | None, file: Path | None) -> None:
    daemon = Daemon(home, VERSION, nvml=hardware.nvml_of_this_process())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, daemon.stop)
    async with contextlib.AsyncExitStack() as stack:
        if port is not None or file is not None:
            from fedml_agent.metrics import Metrics  # few ask for it

            try:
                await stack.enter_async_context(Metrics(daemon, port=port, file=file).serving())
            except OSError as error:
                raise click.ClickException(f"the numbers for Prometheus: {error}") from error
        with contextlib.suppress(asyncio.CancelledError):  # the second stop
            await daemon.serve()
