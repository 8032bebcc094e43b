# SPDX-License-Identifier: Apache-2.0
"""One message of each kind, every field set: what the golden files of schema 1 hold.

    python tests/protocol/golden/examples.py      writes the files that are not there yet

A file that is there stays as it is, for ever: it stands for the agents and brokers out there that
write these bytes. An example that says something else than its file is an error, here and in
`test_golden.py`. A new message or field gets a new example under a new name.

Beside each `.bin` lies a `.txt`: the message as Python shows it, for people who read a diff.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pprint import pformat

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_protocol.blob import Blob, NamedBlob
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.codec import parse, serialise
from fedml_protocol.devices import GpuReading, Heartbeat, Presence, TaskBeat
from fedml_protocol.envelope import Body, Envelope, pack, unpack
from fedml_protocol.federate import (
    AddUpdate,
    AggregatorFrame,
    BeginRound,
    Failed,
    FinishRound,
    GroupFiles,
    MakeModel,
    Members,
    ModelMade,
    OpenRun,
    PlanRound,
    RoundBegun,
    RoundPlan,
    RunOpened,
    StageCancel,
    StageDone,
    StageKind,
    StageOrder,
    StageSpec,
    UpdateAdded,
    WorkerFrame,
    WorkerReady,
)
from fedml_protocol.ids import uuid7
from fedml_protocol.keys import sign
from fedml_protocol.launch import Container, LaunchSpec, Mount, Service
from fedml_protocol.tasks import (
    Accept,
    Cancel,
    Cancelled,
    CloseSession,
    Drain,
    Needs,
    Offer,
    OnLost,
    Order,
    Progress,
    Reject,
    RejectReason,
    Result,
    ResultAck,
    Resync,
    Tail,
    TaskState,
)

FOLDER = Path(__file__).parent / "schema-1"

Message = Envelope | Order | WorkerFrame | AggregatorFrame

DEVICE = "d-7f3a"
TASK = "r-42-c1-r3"
SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

_MODEL = Blob(sha256="5e" * 32, size=6_653_480)
_STAGE = StageSpec(
    session="r-42",
    kind=StageKind.TRAIN,
    round=3,
    client=1,
    clients=10,
    seed=2**64 - 1,
    app="app/federated.py",
    model=_MODEL,
    config='{"lr": 0.03, "epochs": 1}',
    algorithm="scaffold",
    algorithm_config='{"server_lr": 1.0}',
    sent=Blob(sha256="0d" * 32, size=6_653_480),
    evaluate=True,
    labels={"site": "Zürich", "hospital": "b"},
)
_CAUSE = Cause(
    fault=Fault.TASK,
    message="ZeroDivisionError: division by zero",
    hint="look at line 3 of train.py",
    traceback='Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n',
)

_What = Offer | Cancel | Drain | Tail | Resync | CloseSession

_ORDERS: Mapping[str, _What] = {
    "offer-launch": Offer(
        task=TASK,
        epoch=2,
        run="r-42",
        spec=LaunchSpec(
            command="python train.py --out model.safetensors",
            bootstrap="pip install -r requirements.txt",
            env={"OMP_NUM_THREADS": "2", "DATA": "/mnt/data"},
        ),
        publisher="ana",
        lease_s=30.0,
        on_lost=OnLost.STOP,
        grace_s=5.0,
        deadline_s=3600.0,
        package=Blob(sha256="a1" * 32, size=12_345),
        needs=Needs(
            gpus=1,
            gpu_memory_bytes=8 * 2**30,
            cpus=4,
            memory_bytes=16 * 2**30,
            disk_bytes=2**30,
        ),
        tail=True,
    ),
    "offer-stage": Offer(task=TASK, epoch=1, run="r-42", spec=_STAGE, publisher="ana"),
    "cancel": Cancel(task=TASK, epoch=2, grace_s=2.5, reason="stopped by ana"),
    "drain": Drain(on=True),
    "tail": Tail(task=TASK, on=True),
    "resync": Resync(),
    "close_session": CloseSession(session="r-42"),
    "offer-gpu_model": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=LaunchSpec(command="nvidia-smi"),
        needs=Needs(gpus=2, gpu_model="A100-80G"),
    ),
    "offer-requirements": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=LaunchSpec(
            command="python train.py",
            requirements="numpy==2.4.6\n./wheels/ours.whl\n",
        ),
    ),
    "offer-secrets-traced": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=LaunchSpec(command="env", env={"HF_TOKEN": "hf_x1y2"}, secrets=("HF_TOKEN",)),
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    "offer-stage_in_group": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=replace(_STAGE, kind=StageKind.TRAIN_IN_GROUP, group=3, turns=4),
    ),
    "offer-container": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=LaunchSpec(
            command="python train.py",
            offline=True,
            container=Container(
                image="registry.example.org/lab/torch:2",
                registry="registry.example.org",
                username="ana",
                password="open sesame",
                mounts=(Mount(source="/srv/scans", target="/data", writable=True),),
            ),
        ),
    ),
    "offer-service": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=LaunchSpec(
            command="python serve.py",
            service=Service(port=2345, path="/ready", within_s=90.0),
        ),
    ),
    "offer-stage_with_deadline": Offer(
        task=TASK,
        epoch=1,
        run="r-42",
        spec=replace(_STAGE, algorithm="fedprox", deadline_s=12.5),
    ),
}

_BODIES: Mapping[str, Body] = {
    "presence": Presence(
        online=True,
        boot_n=17,
        oldest_schema=1,
        newest_schema=1,
        inventory_sha256="c0" * 32,
        agent_version="0.1.0",
    ),
    "heartbeat": Heartbeat(
        free_slots=1,
        tasks=(
            TaskBeat(task=TASK, epoch=2, state=TaskState.RUNNING),
            TaskBeat(task="r-41", epoch=1, state=TaskState.FINISHED),
        ),
        disk_free_bytes=250 * 10**9,
        clock_ms=1_760_000_000_123,
        draining=True,
        cpu_percent=12.5,
        memory_used_bytes=3 * 2**30,
        gpus=(
            GpuReading(
                uuid="GPU-5b0f3c1e",
                utilisation_percent=87.5,
                memory_used_bytes=7 * 2**30,
                temperature_c=61.0,
            ),
        ),
        refusing="the disk is nearly full",
    ),
    "heartbeat-service": Heartbeat(
        free_slots=0,
        tasks=(TaskBeat(task=TASK, epoch=2, state=TaskState.RUNNING, port=2345),),
    ),
    "accept": Accept(task=TASK, epoch=2),
    "reject": Reject(task=TASK, epoch=2, reason=RejectReason.DISK, detail="3 GB free, 5 needed"),
    "progress": Progress(task=TASK, epoch=2, state=TaskState.RUNNING, note="warm worker"),
    "result-finished": Result(
        task=TASK,
        epoch=2,
        state=TaskState.FINISHED,
        exit_code=0,
        artifacts=(NamedBlob(name="update.safetensors", blob=_MODEL),),
        metrics={"loss": 0.25, "accuracy": 0.9375},
        weight=600.0,
        stdout_bytes=1_234,
        stderr_bytes=56,
    ),
    "result-failed": Result(
        task=TASK, epoch=2, state=TaskState.FAILED, exit_code=-1, signal=9, cause=_CAUSE
    ),
    "cancelled": Cancelled(task=TASK, epoch=2),
    "result_ack": ResultAck(task=TASK, epoch=2),
}

_WORKER: Mapping[str, WorkerReady | StageOrder | StageDone | StageCancel] = {
    "worker_ready": WorkerReady(session="r-42"),
    "stage_order": StageOrder(
        task=TASK,
        epoch=2,
        spec=_STAGE,
        model_path="cache/5e5e",
        out_dir="tasks/r-42-c1-r3/2/out",
        sent_path="cache/0d0d",
    ),
    "stage_order-deadline": StageOrder(
        task=TASK,
        epoch=2,
        spec=replace(_STAGE, algorithm="fedprox", deadline_s=12.5),
        model_path="cache/5e5e",
        out_dir="tasks/r-42-c1-r3/2/out",
        deadline_s=11.25,
    ),
    "stage_done": StageDone(
        task=TASK,
        epoch=2,
        cause=_CAUSE,
        files=("update.safetensors", "state.safetensors"),
        metrics={"loss": 0.25},
        weight=600.0,
    ),
    "stage_cancel": StageCancel(task=TASK, epoch=2),
}

_Question = OpenRun | MakeModel | PlanRound | BeginRound | AddUpdate | FinishRound
_Answer = RunOpened | ModelMade | RoundPlan | RoundBegun | UpdateAdded | Failed

_AGGREGATOR: Mapping[str, _Question | _Answer] = {
    "open_run": OpenRun(
        algorithm="fedavg",
        seed=7,
        app_dir="runs/r-42/app",
        app="app/federated.py",
        config='{"lr": 0.03}',
        algorithm_config='{"server_lr": 1.0}',
        central=True,
        clients=10,
    ),
    "make_model": MakeModel(out_dir="runs/r-42/0"),
    "plan_round": PlanRound(round=3, clients=(0, 1, 2, 300), count=2),
    "begin_round": BeginRound(
        round=3, model_path="runs/r-42/2/model", clients=(1, 300), state_path="runs/r-42/2/state"
    ),
    "add_update": AddUpdate(
        client=300, path="blobs/5e5e", weight=600.0, metrics={"loss": 0.25, "accuracy": 0.9375}
    ),
    "add_update-late": AddUpdate(client=3, path="blobs/5e5e", weight=1.0, staleness=4),
    "finish_round": FinishRound(out_dir="runs/r-42/3"),
    "model_made": ModelMade(
        model_path="runs/r-42/3/model",
        state_path="runs/r-42/3/state",
        sent_path="runs/r-42/3/sent",
        metrics={"loss": 0.125},
    ),
    "round_plan": RoundPlan(clients=(1, 300)),
    "round_begun": RoundBegun(),
    "run_opened": RunOpened(stages=2, asynchronous=True, buffer=10),
    "run_opened-partial": RunOpened(stages=1, partial=True),
    "update_added": UpdateAdded(client=300, refusal=_CAUSE),
    "update_added-stepped": UpdateAdded(client=3, stepped=True),
    "failed": Failed(cause=_CAUSE),
    "run_opened-groups": RunOpened(
        stages=4,
        groups=(Members(clients=(0, 300)), Members(clients=(1, 2))),
        algorithm="scaffold",
        algorithm_config='{"server_lr": 1.0}',
    ),
    "begin_round-groups": BeginRound(
        round=6,
        model_path="runs/r-42/1/model",
        clients=(1, 300),
        state_path="blobs/5e5e",
        groups=(GroupFiles(group=1, model_path="blobs/0d0d", sent_path="blobs/7f7f"),),
    ),
    "model_made-groups": ModelMade(
        state_path="runs/r-42/6/state",
        groups=(
            GroupFiles(group=0, model_path="runs/r-42/6/model-0"),
            GroupFiles(group=1, model_path="runs/r-42/6/model-1", sent_path="runs/r-42/6/sent-1"),
        ),
    ),
}


def _envelope(body: Body) -> Envelope:
    return Envelope(
        device=DEVICE,
        body=body,
        schema=1,
        msg_id=uuid7(1_760_000_000_000, bytes(range(10))),
        boot_n=17,
        seq=1001,
    )


def _order(counter: int, what: _What) -> Order:
    return Order(device=DEVICE, counter=counter, lifetime_s=30.0, what=what)


ORDERS: Mapping[str, Order] = {
    name: _order(number, what) for number, (name, what) in enumerate(_ORDERS.items(), 1)
}
ENVELOPES: Mapping[str, Envelope] = {
    **{name: _envelope(body) for name, body in _BODIES.items()},
    **{
        f"signed_order-{name}": _envelope(sign(order, SIGNING_KEY))
        for name, order in ORDERS.items()
    },
}
EXAMPLES: Mapping[str, Message] = {
    **{f"envelope-{name}": envelope for name, envelope in ENVELOPES.items()},
    **{f"order-{name}": order for name, order in ORDERS.items()},
    **{f"worker-{name}": WorkerFrame(body=body) for name, body in _WORKER.items()},
    **{
        f"aggregator-{name}": AggregatorFrame(call=9, body=body)
        for name, body in _AGGREGATOR.items()
    },
}


def write(message: Message) -> bytes:
    """What goes over the wire (without the length before a worker's or an aggregator's frame)."""
    return pack(message) if isinstance(message, Envelope) else serialise(message)


def read(kind: type[Message], data: bytes) -> Message:
    """The way back."""
    return unpack(data) if kind is Envelope else parse(kind, data)


def main() -> None:
    """Write what is not there; say what is there and differs; never replace anything."""
    FOLDER.mkdir(exist_ok=True)
    differ = []
    for name, message in EXAMPLES.items():
        path = FOLDER / f"{name}.bin"
        if not path.exists():
            path.write_bytes(write(message))
            path.with_suffix(".txt").write_text(pformat(message, width=100, sort_dicts=True) + "\n")
            sys.stdout.write(f"wrote {path.name}\n")
        elif path.read_bytes() != write(message):
            differ.append(path.name)
    if differ:
        sys.exit(
            f"differ, and were left as they are: {', '.join(differ)}. Bytes once released are read "
            "for ever; was a field retyped or a number reused? An example never released may be "
            "deleted by hand and written again."
        )


if __name__ == "__main__":
    main()
