# SPDX-License-Identifier: Apache-2.0
"""`fedml build`, `fedml train build` and `fedml federate build`: a package that starts nothing."""

from pathlib import Path

import click

from fedml import launch as submit
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_json, size, transfer
from fedml.launch import Kind


def build_command(kind: Kind | None, what: str, example: str) -> click.Command:
    """The verb `build` for one kind of file; None: either."""

    @click.command("build")
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
    @click.option(
        "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where it goes."
    )
    @click.option(
        "-d",
        "--dest-folder",
        type=click.Path(file_okay=False, path_type=Path),
        help="The folder where NAME.tar.gz goes.",
    )
    @click.option("--upload", is_flag=True, help="Store it at the broker instead.")
    @click.option("--name", default="", help="Under which it is stored (packages/NAME).")
    @home_option
    @json_option
    def build(
        file: Path,
        output: Path | None,
        dest_folder: Path | None,
        upload: bool,
        name: str,
        home: Path,
        as_json: bool,
    ) -> None:
        if upload and (output or dest_folder):
            raise click.UsageError("--upload stores it at the broker: no --output")
        if upload:
            with transfer("workspace") as told:
                found = submit.store(connect(home), file, name, kind=kind, told=told)
            said, told_of = found["name"], f"{size(found['size'])} stored at the broker"
            facts = {"name": said, "sha256": found["sha256"], "size": found["size"]}
        else:
            into = output or (dest_folder or Path()) / f"{file.stem}.tar.gz"
            into.parent.mkdir(parents=True, exist_ok=True)
            count = submit.build(file, into, kind=kind)
            said, told_of = str(into), f"{count} files, {size(into.stat().st_size)}"
            facts = {"file": said, "files": count, "size": into.stat().st_size}
        if as_json:
            print_json(facts)
        else:
            click.echo(said)
            click.echo(told_of, err=True)

    build.help = f"""Make the package of {what} without starting it.

    It goes to a file, or with --upload to the broker; its place is printed. The files in it are
    those that would be sent: ignore files count.

    \b
    Examples:
      {example} build FILE                       # NAME.tar.gz, here
      {example} build FILE --output /tmp/x.tar.gz
      {example} build FILE --upload              # as packages/NAME at the broker
      {"fedml federate" if kind == "federate" else "fedml launch"} FILE --package packages/NAME
    """
    return build


build = build_command(None, "a job or run FILE", "fedml")


@click.group()
def train() -> None:
    """Packages of training jobs, as FedML spells it. `fedml launch` runs them.

    \b
    Examples:
      fedml train build job.yaml
      fedml launch job.yaml --package job.tar.gz
    """


train.add_command(build_command("launch", "a job FILE", "fedml train"))
