# SPDX-License-Identifier: Apache-2.0
"""`FedMLRunner`: a FedML script's last line.

In a simulation its clients run in the script's own process, one after the other. As the server of
a cross-silo run the script is sent to the machines that have joined the broker, and trains there:
agents are the clients, so a script that was started as one has nothing to do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml import arguments, packed_script, script, translation
from fedml.core import ClientTrainer, ServerAggregator
from fedml.errors import ConfigError
from fedml.federate.application import Application
from fedml.script import Hooked, Script
from fedml.translation import scripts
from fedml.translation.keys import KEYS

if TYPE_CHECKING:
    from fedml.runs import Run
    from fedml.simulation.result import Result

_NO_CLIENTS = (
    "agents are the clients here: the server's process sends what is to be trained to machines",
    "`fedml-agent login KEY` and `fedml-agent run` on each machine, then start the server",
)

# What `mpirun` and its kin tell each process.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


class FedMLRunner:
    """Runs what a FedML script has put together."""

    def __init__(
        self,
        args: Any,
        device: Any,
        dataset: Any,
        model: Any,
        client_trainer: ClientTrainer | None = None,
        server_aggregator: ServerAggregator | None = None,
    ) -> None:
        """
        Args:
            args: From `fedml.init`.
            device: From `fedml.device.get_device`; the script's trainer gets it.
            dataset: The list of eight (`fedml.data.eight`).
            model: A torch module, or whatever the trainer takes.
            client_trainer: Trains; without one, the built-in training does.
            server_aggregator: Looks at each round's models and tests; without one, the algorithm
                is alone.
        """
        self.args, self.device, self.dataset, self.model = args, device, dataset, model
        self.client_trainer, self.server_aggregator = client_trainer, server_aggregator

    def run(self) -> Result | Run | None:
        """All rounds; how it ended, None in a process that `mpirun` started beside the first.

        Raises:
            ConfigError: It cannot be; the text says why and the hint what to change.
            RunFailed: It ended badly.
        """
        args = self.args
        parts = Script(
            args, self.device, self.dataset, self.model,
            self.client_trainer, self.server_aggregator,
        )  # fmt: skip
        packed_script.reached(parts)
        kind = str(getattr(args, "training_type", "simulation"))
        if kind == "simulation":
            return self._simulated(parts)
        if kind not in ("cross_silo", "cross_cloud", "cheetah"):
            raise ConfigError(
                f"`training_type`: {kind} does not run here; simulation and cross_silo do",
                "docs/fedml.md says what does",
            )
        _refuse_client(args)
        if hooks := script.own_hooks(self.server_aggregator):
            raise ConfigError(
                hooks, "a `defense_type` of docs/fedml.md, or training_type: simulation"
            )
        return _deployed(args, own=self.client_trainer is not None)

    def _simulated(self, parts: Script) -> Result | None:
        from fedml.simulation.plan import read
        from fedml.simulation.run import Simulation

        rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)
        if rank > 0:
            _say(f"process {rank} has nothing to do: the first one runs all clients")
            return None
        run = _translated(parts.args, own=self.client_trainer is not None, deployed=False)
        aggregator = self.server_aggregator
        each = aggregator is not None and script.sees_each(aggregator)
        if each and (run.get("treatment") or run.get("groups")):
            raise ConfigError(
                "the ServerAggregator and `defense_args`, `dp_args` or groups both want to combine "
                "updates",
                "switch one of them off",
            )
        file = _running_script() or Path(__file__)
        plan = read({**run, "workspace": str(file.parent), "app": file.name})
        functions = parts.functions(plan.config, each=each)
        application = Application.of(functions, Path(file.name), plan.config)
        simulation = Simulation(plan, listener=_listener(), application=application)
        if aggregator is not None:
            hooked: Any = Hooked(simulation.algorithm, parts)
            simulation.algorithm = hooked
        result = simulation.run()
        self._give_back(parts, result.model)
        return result

    def _give_back(self, parts: Script, arrays: Mapping[str, Any]) -> None:
        """The last model, wherever the script may look for it."""
        params = parts.to_params(arrays)
        for holder in (self.client_trainer, self.server_aggregator):
            if holder is not None:
                holder.set_model_params(params)
        if self.client_trainer is None:
            self.model.load_state_dict(params)


def run_simulation(backend: str = "sp") -> Result | None:
    """Simulate what the command line's configuration names; see docs/fedml.md."""
    from fedml.simulation import simulate

    args = arguments.init(arguments.load_arguments("simulation", backend))
    rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)
    if rank > 0:
        _say(f"process {rank} has nothing to do: the first one runs all clients")
        return None
    result: Result = simulate(sections_of(args), on_round=_listener().ended)
    return result


def run_cross_silo_server() -> Run:
    """Train what the command line's configuration names on the machines of the broker."""
    return _deployed(arguments.init(arguments.load_arguments("cross_silo", "MQTT_S3")), named=True)


def run_cross_silo_client() -> None:
    """Say what runs clients here; see docs/fedml.md.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(*_NO_CLIENTS)


def sections_of(args: Any) -> dict[str, dict[str, Any]]:
    """The configuration as a script has changed it; of other arguments, the keys that are known."""
    now = vars(args)
    found: dict[str, dict[str, Any]] = {
        name: {key: now.get(key, value) for key, value in section.items()}
        for name, section in now.get("sections", {}).items()
    }
    said = {key for section in found.values() for key in section}
    for name, keys in KEYS.items():
        for key in keys:
            if key in now and key not in said and key not in ("lr", "wd"):
                found.setdefault(name, {})[key] = now[key]
    return found


def _translated(args: Any, *, own: bool, deployed: bool) -> dict[str, Any]:
    """The run that a script asks for; its data, model and training are its own."""
    found = scripts.translate(sections_of(args), trainer=own, deployed=deployed)
    translation.tell(found.notes, "FedMLRunner")
    return {"name": "fedml", **found.run}


def _refuse_client(args: Any) -> None:
    if str(getattr(args, "role", "server")) == "client" and int(getattr(args, "rank", 0)) != 0:
        raise ConfigError(*_NO_CLIENTS)


def _deployed(args: Any, *, own: bool = False, named: bool = False) -> Run:
    """Submit the run, show its rounds, and wait for its end."""
    from fedml.runs import Run

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        if named:
            file.write_text(json.dumps(sections_of(args)))
        else:
            run = _translated(args, own=own, deployed=True)
            _pack(Path(folder) / "package", args)
            run |= {"workspace": "package", "app": packed_script.APP}
            file.write_text(json.dumps(run))
        found = Run.submit(file)
    _say(f"{found.id} is submitted; `fedml run logs -f {found.id}` shows it from elsewhere")
    return found.wait(check=True)


def _pack(folder: Path, args: Any) -> None:
    """A script's directory as a workspace, with the application that runs the script."""
    from fedml.package import files

    path = _running_script()
    if path is None:
        raise ConfigError(
            "there is no script file to send to the machines", "python main.py --cf FILE"
        )
    for file in files(path.parent):
        into = folder / file.relative_to(path.parent)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, into, follow_symlinks=False)
    for name, text in packed_script.packed([path.name], sections_of(args)).items():
        (folder / name).write_text(text)


def _running_script() -> Path | None:
    path = Path(sys.argv[0])
    return path.resolve() if path.is_file() and path.suffix == ".py" else None


def _listener() -> Any:
    from fedml.simulation.result import Listener, Round

    class Told(Listener):
        def say(self, text: str) -> None:
            _say(text)

        def ended(self, round_: Round) -> None:
            metrics = sorted(round_.metrics.items())
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in metrics if not k.endswith(".examples"))
            _say(f"round {round_.number}/{round_.rounds}  {numbers}")

    return Told()


def _say(text: str) -> None:
    """Talk, as the command's: to stderr."""
    sys.stderr.write(f"fedml: {text}\n")
