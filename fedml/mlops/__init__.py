# SPDX-License-Identifier: Apache-2.0
"""Log metrics, parameters, files and models from inside a run.

    from fedml import mlops

    mlops.log({"loss": 0.25, "accuracy": 0.9}, step=3)
    mlops.log_params({"lr": 0.1})
    mlops.log_artifact("plots/roc.png")
    mlops.log_model("classifier", "model.safetensors")

In a launched job or a federated worker nothing has to be set up: records go into a file of the
task, and its agent sends them on. A call costs microseconds, needs no network, and what it has
recorded survives the process, the agent and the broker. Elsewhere (a notebook, `fedml simulate`)
records go into a directory here, or to the broker after `mlops.start()`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml.mlops.recorder import Recorder, name_of, number
from fedml_protocol.records import ENV

if TYPE_CHECKING:
    from fedml.mlops.machine import Sampler
    from fedml.mlops.shipping import Shipment

__all__ = [
    "event",
    "finish",
    "log",
    "log_aggregated_model_info",
    "log_aggregation_failed_status",
    "log_aggregation_finished_status",
    "log_aggregation_status",
    "log_artifact",
    "log_endpoint",
    "log_llm_record",
    "log_metric",
    "log_model",
    "log_params",
    "log_round_info",
    "log_sys_perf",
    "log_training_failed_status",
    "log_training_finished_status",
    "log_training_status",
    "start",
    "stop_sys_perf",
]


class _State:
    """Where this process records, and what it has not committed yet."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.recorder: Recorder | None = None
        self.shipment: Shipment | None = None
        self.sampler: Sampler | None = None
        self.step = 0
        self.waiting: dict[str, float | None] = {}


_state = _State()


def start(name: str = "", *, experiment: str = "Default", home: Path | str | None = None) -> str:
    """Outside any task: record to the broker that this home is logged in at; the run's id.

    What cannot be sent now is kept below HOME/mlops and sent by the next `start`. In a task this
    does nothing: its records reach the broker anyway.

    Raises:
        NotLoggedIn: `fedml login KEY` first.
        BrokerUnreachable: The run could not be made: there is no id to keep records under.
    """
    if os.environ.get(ENV):
        return os.environ.get("FEDML_CURRENT_RUN_ID", "")
    from fedml.mlops.shipping import Shipment

    with _state.lock:
        if _state.shipment is None:
            _close()
            _state.shipment = Shipment.begin(name, experiment, home)
            _use(_state.shipment.folder)
            _notice(f"records go to the broker as {_state.shipment.run}")
        return _state.shipment.run


def finish(*, failed: bool = False, message: str = "") -> None:
    """End what `start` has begun; waits at most 30 s for the broker. Done by itself at exit."""
    with _state.lock:
        _close()
        shipment, _state.shipment = _state.shipment, None
    if shipment is not None and not shipment.end(failed=failed, message=message):
        _notice(f"the broker does not answer: {shipment.run} is sent by the next mlops.start()")


def log(
    metrics: Mapping[str, Any],
    step: int | None = None,
    customized_step_key: str | None = None,
    commit: bool = True,
) -> None:
    """Log numbers; nested mappings become `outer/inner`.

    Args:
        step: Where on the axis; None counts the calls that commit.
        customized_step_key: The metric whose value is the step.
        commit: False keeps them for the next call that commits, as one step.

    Raises:
        TypeError: A value is no number.
        ValueError: A name is empty or too long, or the step is not whole.
    """
    flat = _flat(metrics, "")
    if step is None and customized_step_key is not None:
        step = _whole(customized_step_key, flat.get(customized_step_key))
    with _state.lock:
        if not commit or _state.waiting:
            _state.waiting |= flat
            flat = _state.waiting
        if not commit:
            return
        _state.waiting = {}
        if step is None:
            step = _state.step
        _state.step = int(step) + 1
        if flat:
            _recorder().write("metrics", step=int(step), metrics=flat)


def log_metric(
    metrics: Mapping[str, Any],
    step: int | None = None,
    customized_step_key: str | None = None,
    commit: bool = True,
) -> None:
    """The same as `log`."""
    log(metrics, step, customized_step_key, commit)


def log_params(params: Mapping[str, Any]) -> None:
    """Log what was chosen before: numbers, text, anything that has a text."""
    said = {name_of(str(name)): str(value) for name, value in params.items()}
    _recorder().write("params", params=said)


def log_artifact(
    path: Path | str, name: str | None = None, version: str | None = None, **_: Any
) -> None:
    """Keep a file, or every file of a directory; what has its name already is replaced.

    Args:
        path: What is there now: later changes do not count.
        name: Under which it is found; its own name by default. May contain slashes.
        version: Put before the name, where there is one.

    Raises:
        OSError: It cannot be read, or there is no room for it.
    """
    _keep(Path(path), "/".join(filter(None, (version, name or Path(path).name))), "artifact")


def log_model(name: str, path: Path | str, version: str | None = None, **_: Any) -> None:
    """Keep a model, which is a file or a directory of files; see `log_artifact`."""
    source = Path(path)
    parts = [version, name] if source.is_dir() else [version, name, source.name]
    _keep(source, "/".join(filter(None, parts)), "model")


def log_llm_record(data: Any, version: str = "release", commit: bool = True) -> None:
    """Note what a language model was asked and has answered. `commit` is there for FedML's sake."""
    _event("llm", {"record": _plain(data), "version": version})


def log_endpoint(metrics: Mapping[str, Any]) -> None:
    """Note what an endpoint says of itself."""
    _event("endpoint", {"record": _plain(metrics)})


def event(name: str, started: bool = True, value: Any = None, edge_id: Any = None) -> None:
    """Note that something begins, or (`started` off) ends."""
    _event(name, {"started": bool(started), "value": _plain(value)})


def log_round_info(total_rounds: int, round_index: int) -> None:
    """Note how far a training of several rounds is."""
    _event("round", {"round": int(round_index), "rounds": int(total_rounds)})


def log_aggregated_model_info(round_index: int, model_url: str = "", **_: Any) -> None:
    """Note where the model of a round lies."""
    _event("aggregated model", {"round": int(round_index), "url": str(model_url)})


def log_training_status(status: str, run_id: Any = None) -> None:
    """Note what a training is doing, in your words."""
    _event("training", {"status": str(status)})


def log_training_finished_status(run_id: Any = None) -> None:
    """Note that a training has finished."""
    log_training_status("FINISHED")


def log_training_failed_status(run_id: Any = None) -> None:
    """Note that a training has failed."""
    log_training_status("FAILED")


def log_aggregation_status(status: str, run_id: Any = None) -> None:
    """Note what an aggregation is doing, in your words."""
    _event("aggregation", {"status": str(status)})


def log_aggregation_finished_status(run_id: Any = None) -> None:
    """Note that an aggregation has finished."""
    log_aggregation_status("FINISHED")


def log_aggregation_failed_status(run_id: Any = None) -> None:
    """Note that an aggregation has failed."""
    log_aggregation_status("FAILED")


def log_sys_perf(sys_args: Any = None, *, every_s: float | None = None) -> None:
    """Log CPU, memory and GPUs (`system/…`) every 30 s; in a task this goes on by itself.

    Nothing is logged where psutil is not installed. `sys_args` is there for FedML's sake.
    """
    from fedml.mlops.machine import DEFAULT_S, Sampler

    recorder = _recorder()
    with _state.lock:
        if _state.sampler is not None and every_s is None:
            return
        stop_sys_perf()
        _state.sampler = Sampler(
            lambda found, step: recorder.write("metrics", step=step, metrics=found),
            DEFAULT_S if every_s is None else every_s,
        )


def stop_sys_perf() -> None:
    """Log no more of the machine."""
    with _state.lock:
        sampler, _state.sampler = _state.sampler, None
    if sampler is not None:
        sampler.stop()


# ---------------------------------------------------------------------- small print


def _recorder() -> Recorder:
    found = _state.recorder
    if found is not None:
        return found
    with _state.lock:
        if _state.recorder is not None:
            return _state.recorder
        task = os.environ.get(ENV)
        if task:
            found = _use(Path(task))
            if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a machine
                log_sys_perf()
            return found
        folder = Path("fedml-mlops") / time.strftime("%Y%m%d-%H%M%S")
        _notice(f"records go into {folder}; to the broker: mlops.start() first")
        return _use(folder)


def _use(folder: Path) -> Recorder:
    # Absolute: the program may change its directory.
    _state.recorder = Recorder(folder.absolute())
    return _state.recorder


def _close() -> None:
    stop_sys_perf()
    with _state.lock:
        if _state.waiting:
            log({})
        recorder, _state.recorder = _state.recorder, None
        if recorder is not None:
            recorder.close()


def _forked() -> None:
    _state.lock = threading.RLock()
    _state.sampler = _state.shipment = None  # threads stay with the parent
    if _state.recorder is not None:
        _state.recorder.forget_file()


atexit.register(finish)
os.register_at_fork(after_in_child=_forked)


def _event(name: str, data: dict[str, Any]) -> None:
    _recorder().write("event", name=name_of(name), data=data)


def _keep(source: Path, name: str, kind: str) -> None:
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
    recorder = _recorder()
    for file in files:
        inner = name if file == source else f"{name}/{file.relative_to(source).as_posix()}"
        if any(part in ("", ".", "..") for part in name_of(inner).split("/")):
            raise ValueError(f"{inner!r}: no part of an artifact's name is empty, '.' or '..'")
        # Its bytes first: whoever reads the record finds them.
        sha256, size = recorder.keep(file)
        recorder.write("artifact", name=inner, sha256=sha256, size=size, type=kind)


def _flat(metrics: Mapping[str, Any], before: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in metrics.items():
        full = name_of(f"{before}{name}")
        if isinstance(value, Mapping):
            found |= _flat(value, f"{full}/")
        else:
            found[full] = value if type(value) is int else number(full, value)
    return found


def _whole(name: str, value: float | None) -> int:
    if value is None or value != int(value):
        raise ValueError(f"customized_step_key: {name!r} must be a whole number, got {value!r}")
    return int(value)


def _plain(value: Any) -> Any:
    """As JSON can say it; what it cannot becomes its text."""
    return json.loads(json.dumps(value, default=str, allow_nan=True), parse_constant=str)


def _notice(text: str) -> None:
    sys.stderr.write(f"fedml.mlops: {text}\n")
