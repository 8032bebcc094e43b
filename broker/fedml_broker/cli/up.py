# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker up`: the broker in the foreground."""

import asyncio
import fcntl
import gc
import json
import logging
import os
import resource
import signal
import socket
from pathlib import Path

import click
import sqlalchemy as sa

from fedml_broker.accounts import User
from fedml_broker.app import HTTPS_PORT, MQTTS_PORT, Broker, PortInUse, Settings
from fedml_broker.audit import CLI
from fedml_broker.cli.client import CommandFailed, home_option, json_option
from fedml_broker.identity import IdentityUnusable
from fedml_broker.leases import Timing
from fedml_broker.tables import DEFAULT_TENANT

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--name", help="Under which machines reach it; goes into keys and certificate.")
@click.option(
    "--https-port",
    default=HTTPS_PORT,
    show_default=True,
    type=click.IntRange(0, 65535),
    metavar="N",
    help="0 chooses one and keeps it.",
)
@click.option(
    "--mqtt-port",
    default=MQTTS_PORT,
    show_default=True,
    type=click.IntRange(0, 65535),
    metavar="N",
    help="0 chooses one and keeps it.",
)
@click.option(
    "--mqtt",
    "external",
    default="",
    metavar="URL",
    help="Another MQTT 5 broker: mqtts://HOST:PORT.",
)
@click.option(
    "--forward-mlflow",
    default="",
    metavar="URL",
    help="An MLflow server that gets all that runs record too; see docs/mlops.md.",
)
@click.option(
    "--heartbeat",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    metavar="SECONDS",
    help="Between two heartbeats of a machine.",
)
@click.option(
    "--lease",
    show_default="45, or 4.5 heartbeats if that is more",
    type=click.FloatRange(0.1, 7 * 86400),
    metavar="SECONDS",
    help="Until a silent machine's tasks go elsewhere; at least two heartbeats.",
)
@click.option(
    "--disk-reserve-gb",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="GB",
    help="Uploads stop before less is left.",
)
@click.option("--oidc-issuer", metavar="URL", help="People may sign in with this provider.")
@click.option("--oidc-client-id", default="", metavar="ID", help="This broker's name there.")
@click.option(
    "--oidc-client-secret-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Holds the secret that the provider has given for it.",
)
@click.option(
    "--oidc-grant",
    "oidc_grants",
    multiple=True,
    metavar="GROUP=ROLE[@TENANT]",
    help="The role of a group of the provider's; '*' is everybody.",
)
@click.option(
    "--oidc-group-claim", default="groups", show_default=True, help="Where its groups stand."
)
@click.option(
    "--oidc-name-claim",
    default="preferred_username",
    show_default=True,
    help="Where a person's name stands.",
)
@click.option("--oidc-known-only", is_flag=True, help="Only users whom an admin has made.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@home_option
@json_option
def up(
    host: str,
    name: str | None,
    https_port: int,
    mqtt_port: int,
    external: str,
    forward_mlflow: str,
    heartbeat: float,
    lease: float | None,
    disk_reserve_gb: float,
    oidc_issuer: str | None,
    oidc_client_id: str,
    oidc_client_secret_file: Path | None,
    oidc_grants: tuple[str, ...],
    oidc_group_claim: str,
    oidc_name_claim: str,
    oidc_known_only: bool,
    verbose: bool,
    home: Path,
    as_json: bool,
) -> None:
    """Start the broker: MQTT over TLS, HTTPS, store and blobs, all in this process. Ctrl-C ends it.

    TLS and authentication are always on. It listens on this machine only until you say otherwise.
    The dashboard is at its HTTPS address.

    \b
    Examples:
      fedml-broker up
      fedml-broker up --host 0.0.0.0 --name broker.example.org
      fedml-broker up --home ./trial --https-port 0 --mqtt-port 0
      fedml-broker up --mqtt mqtts://mqtt.example.org:8883
      fedml-broker up --oidc-issuer https://id.example.org --oidc-client-id fedml \\
        --oidc-client-secret-file secret.txt --oidc-grant 'ml-team=member'
    """
    if lease is None:
        lease = max(45.0, 4.5 * heartbeat)
    if lease < 2 * heartbeat:
        # Each machine would count as lost between two heartbeats.
        raise click.BadParameter(
            f"{lease:g} s are less than two heartbeats of {heartbeat:g} s", param_hint="--lease"
        )
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    provider = None
    if oidc_issuer:
        from fedml_broker.oidc import Provider, parse_grants

        secret = oidc_client_secret_file
        try:
            provider = Provider(
                issuer=oidc_issuer,
                client_id=oidc_client_id,
                secret="" if secret is None else secret.read_text().strip(),
                grants=parse_grants(oidc_grants),
                group_claim=oidc_group_claim,
                name_claim=oidc_name_claim,
                known_only=oidc_known_only,
            )
        except ValueError as error:
            raise CommandFailed(str(error), "docs/sign-in.md has examples", 2) from error
    settings = Settings(
        home=home,
        host=host,
        name=name or ("localhost" if host in _LOOPBACK else socket.getfqdn()),
        https_port=https_port,
        mqtt_port=mqtt_port,
        external_mqtt=external,
        forward_mlflow=forward_mlflow,
        timing=Timing(heartbeat_s=heartbeat, lease_s=lease, offer_s=min(30.0, max(lease, 2.0))),
        disk_reserve_bytes=int(disk_reserve_gb * 1e9),
        provider=provider,
    )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CommandFailed(
                f"another broker works on {home}", "stop it, or give this one its own --home"
            ) from error
        _collect_rarely()
        # Each machine is an open file; services and shells are given 1,024 and may have more.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            asyncio.run(_serve(settings, as_json))
        except (PortInUse, IdentityUnusable, ValueError) as error:
            raise CommandFailed(str(error)) from error
        except sa.exc.DatabaseError as error:
            raise CommandFailed(
                f"the store {home / 'broker.db'} cannot be opened: {error.orig}",
                "`fedml-broker doctor`; restore a backup if it is damaged",
            ) from error


def _collect_rarely() -> None:
    """Have Python look for circular garbage rarely: we make little of it.

    A full look walks over everything that lives, 0.3 s with ten thousand machines, in which nobody
    is served. What was loaded by now stays for ever and is left out.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)


async def _serve(settings: Settings, as_json: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Broker.running(settings) as broker:
        key = await _first_keys(broker)
        if as_json:
            found = {
                "url": broker.url,
                "dashboard": f"{broker.url}/",
                "mqtt": broker.mqtt_url,
                "login_key": key,
            }
            click.echo(json.dumps({**found, "admin_key_file": str(settings.home / "admin.key")}))
        else:
            _welcome(broker, key)
        await stop.wait()
        click.echo("stopping; runs go on at the next start", err=True)


async def _first_keys(broker: Broker) -> str | None:
    """At the first start: an admin with a token in a file, and a key for the first machines."""
    admin_file = broker.config.home / "admin.key"
    # The address may have changed since: the file is made anew, its old token stays good. Or that
    # was revoked: whoever may write here is the admin.
    known = admin_file.read_text() if admin_file.exists() else ""
    first = not await broker.accounts.list_users(DEFAULT_TENANT)
    if first:
        await broker.accounts.create_user("admin", "admin", by=CLI)
    if await broker.accounts.still_fits(known):
        return None
    token = await broker.accounts.create_token("admin", by=CLI)
    number = os.open(admin_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(number, "w") as file:
        file.write(token)
    admin = User("admin", DEFAULT_TENANT, "admin")
    _, key = await broker.accounts.create_key(admin, uses=10, days=1, labels={})
    return key


def _welcome(broker: Broker, key: str | None) -> None:
    home = broker.config.home
    click.secho(f"fedml-broker {broker.version} serves {broker.url}", fg="green", err=True)
    click.echo(f"  dashboard   {broker.url}/   (sign in with the admin key)", err=True)
    click.echo(f"  MQTT        {broker.mqtt_url}", err=True)
    click.echo(
        f"  admin key   {home / 'admin.key'}   (`fedml login - < FILE` on your machine)", err=True
    )
    if key is None:
        click.echo("  login keys  `fedml-broker keys create`", err=True)
    else:
        click.echo("  next, on each machine (good for 10 machines and one day):", err=True)
        click.echo(f"    fedml-agent login {key}", err=True)
        click.echo("    fedml-agent run", err=True)
    if broker.config.host in _LOOPBACK:
        click.echo(
            "  Only this machine can reach it; for others: --host 0.0.0.0 --name HOST", err=True
        )
