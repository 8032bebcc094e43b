# SPDX-License-Identifier: Apache-2.0
"""A FedML script on machines: its directory is packed, with functions of ours as the application.

There the script runs up to `FedMLRunner.run()`, which hands over what it was given instead of
running.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedml.federate.algorithm import Correction
from fedml.federate.application import ApplicationError
from fedml.script import Script, own_hooks

APP = "fedml_script.py"  # in the package


class _Reached(BaseException):
    """A script came to its runner; no `except Exception` of its own shall stop this."""

    def __init__(self, script: Script) -> None:
        self.script = script


_capturing = False


def reached(script: Script) -> None:
    """Called by the runner: hand over, if the script is run for its parts."""
    if _capturing:
        raise _Reached(script)


def capture(path: Path, args: Any, words: Sequence[str] = ()) -> Script:
    """Run a script up to its runner, as ``python main.py WORDS`` does; what it gave.

    The command line stays: its trainer may look at it later.

    Raises:
        ApplicationError: It ended without one, or its aggregator wants what only simulations have.
    """
    from fedml import arguments

    global _capturing
    _capturing = True
    folder = str(path.parent)
    sys.argv = [str(path), *words]
    if folder not in sys.path:  # what lies beside the script is imported by it
        sys.path.insert(0, folder)
    try:
        with arguments.giving(args):
            runpy.run_path(str(path), run_name="__main__")
    except _Reached as at:
        if hooks := own_hooks(at.script.aggregator):
            raise ApplicationError(hooks) from None
        return at.script
    finally:
        _capturing = False
    raise ApplicationError(f"{path.name} ended without FedMLRunner(…).run()")


def packed(
    client: Sequence[str],
    sections: Mapping[str, Mapping[str, Any]],
    *,
    server: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The files that make a directory of scripts an application; their text by name.

    Args:
        client: A script in the directory, and the words of its command line.
        sections: The configuration.
        server: The same of rank 0, which makes the first model; the client's unless given.
        env: Variables that the scripts find.
    """
    said = {"client": client, "server": server or client, "sections": sections, "env": env or {}}
    application = f'''"""The script {client[0]}, as an application of ours; written by fedml."""

from pathlib import Path

from fedml.packed_script import of_package

model, data, train, evaluate = of_package(Path(__file__).parent)
'''
    return {APP: application, "fedml_script.json": json.dumps(said)}


def of_package(folder: Path) -> tuple[Callable[..., Any], ...]:
    """`model`, `data`, `train` and `evaluate` of a script that `packed` has packed.

    It is run when the first of them is called, in the directory that was packed. A machine's sees
    itself as FedML's client of its number, the broker's as the server.
    """
    from fedml import arguments

    said = json.loads((folder / "fedml_script.json").read_text())
    known: dict[int, Script] = {}

    def script(rank: int | None = None) -> Script:
        if rank is None and known:
            return next(iter(known.values()))
        rank = rank or 0
        if rank not in known:
            known.clear()
            role = "server" if rank == 0 else "client"
            os.environ.update(said["env"], FEDML_CLIENT_RANK=str(rank))
            file, *written = said[role]
            words = [os.path.expandvars(word) for word in written]
            args = arguments.Arguments(
                said["sections"], **arguments.command_line(words) | {"rank": rank, "role": role}
            )
            with _inside(folder):
                known[rank] = capture(folder / file, args, words)
        return known[rank]

    def train(
        model: Any, data: Any, config: Any, rng: Any, correction: Correction | None = None
    ) -> Any:
        its = script()
        if correction is not None and its.trainer is not None:
            raise ApplicationError(
                "this algorithm changes every local step, which your ClientTrainer takes: "
                "`federated_optimizer: FedAvg`"
            )
        extra = {} if correction is None else {"correction": correction}
        return its.functions(config).train(model, data, config, rng, **extra)

    return (
        lambda config: script().model(config),
        lambda client, config: script(client.index + 1).data(client, config),
        train,
        lambda model, data, config: script().evaluate(model, data, config),
    )


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In the script's own directory, where its relative paths lead."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
