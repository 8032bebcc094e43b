from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    QUEUED: _ClassVar[TaskState]
    OFFERED: _ClassVar[TaskState]
    LEASED: _ClassVar[TaskState]
    RUNNING: _ClassVar[TaskState]
    FINISHED: _ClassVar[TaskState]
    FAILED: _ClassVar[TaskState]
    STOPPED: _ClassVar[TaskState]
    LOST: _ClassVar[TaskState]

class OnLost(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_LOST_UNSPECIFIED: _ClassVar[OnLost]
    STOP: _ClassVar[OnLost]
    FINISH_AND_HOLD: _ClassVar[OnLost]
    CONTINUE: _ClassVar[OnLost]

class Fault(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAULT_UNSPECIFIED: _ClassVar[Fault]
    TASK: _ClassVar[Fault]
    MACHINE: _ClassVar[Fault]
    POLICY: _ClassVar[Fault]
    BROKER: _ClassVar[Fault]

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_REASON_UNSPECIFIED: _ClassVar[RejectReason]
    SIGNATURE: _ClassVar[RejectReason]
    POLICY_REFUSED: _ClassVar[RejectReason]
    DISK: _ClassVar[RejectReason]
    SLOTS: _ClassVar[RejectReason]
    RESOURCES: _ClassVar[RejectReason]
    UNSUPPORTED: _ClassVar[RejectReason]
    DRAINING: _ClassVar[RejectReason]
    STALE: _ClassVar[RejectReason]
    PACKAGE: _ClassVar[RejectReason]
    NOT_NOW: _ClassVar[RejectReason]

class StageKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_KIND_UNSPECIFIED: _ClassVar[StageKind]
    TRAIN: _ClassVar[StageKind]
    EVALUATE: _ClassVar[StageKind]
    TRAIN_IN_GROUP: _ClassVar[StageKind]
TASK_STATE_UNSPECIFIED: TaskState
QUEUED: TaskState
OFFERED: TaskState
LEASED: TaskState
RUNNING: TaskState
FINISHED: TaskState
FAILED: TaskState
STOPPED: TaskState
LOST: TaskState
ON_LOST_UNSPECIFIED: OnLost
STOP: OnLost
FINISH_AND_HOLD: OnLost
CONTINUE: OnLost
FAULT_UNSPECIFIED: Fault
TASK: Fault
MACHINE: Fault
POLICY: Fault
BROKER: Fault
REJECT_REASON_UNSPECIFIED: RejectReason
SIGNATURE: RejectReason
POLICY_REFUSED: RejectReason
DISK: RejectReason
SLOTS: RejectReason
RESOURCES: RejectReason
UNSUPPORTED: RejectReason
DRAINING: RejectReason
STALE: RejectReason
PACKAGE: RejectReason
NOT_NOW: RejectReason
STAGE_KIND_UNSPECIFIED: StageKind
TRAIN: StageKind
EVALUATE: StageKind
TRAIN_IN_GROUP: StageKind

class Envelope(_message.Message):
    __slots__ = ("schema", "msg_id", "device", "boot_n", "seq", "presence", "heartbeat", "accept", "reject", "progress", "result", "cancelled", "signed_order", "result_ack")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    MSG_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BOOT_N_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    REJECT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    SIGNED_ORDER_FIELD_NUMBER: _ClassVar[int]
    RESULT_ACK_FIELD_NUMBER: _ClassVar[int]
    schema: int
    msg_id: bytes
    device: str
    boot_n: int
    seq: int
    presence: Presence
    heartbeat: Heartbeat
    accept: Accept
    reject: Reject
    progress: Progress
    result: Result
    cancelled: Cancelled
    signed_order: SignedOrder
    result_ack: ResultAck
    def __init__(self, schema: _Optional[int] = ..., msg_id: _Optional[bytes] = ..., device: _Optional[str] = ..., boot_n: _Optional[int] = ..., seq: _Optional[int] = ..., presence: _Optional[_Union[Presence, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., reject: _Optional[_Union[Reject, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., signed_order: _Optional[_Union[SignedOrder, _Mapping]] = ..., result_ack: _Optional[_Union[ResultAck, _Mapping]] = ...) -> None: ...

class Presence(_message.Message):
    __slots__ = ("online", "boot_n", "oldest_schema", "newest_schema", "inventory_sha256", "agent_version")
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    BOOT_N_FIELD_NUMBER: _ClassVar[int]
    OLDEST_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    NEWEST_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_SHA256_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    online: bool
    boot_n: int
    oldest_schema: int
    newest_schema: int
    inventory_sha256: str
    agent_version: str
    def __init__(self, online: _Optional[bool] = ..., boot_n: _Optional[int] = ..., oldest_schema: _Optional[int] = ..., newest_schema: _Optional[int] = ..., inventory_sha256: _Optional[str] = ..., agent_version: _Optional[str] = ...) -> None: ...

class GpuReading(_message.Message):
    __slots__ = ("uuid", "utilisation_percent", "memory_used_bytes", "temperature_c")
    UUID_FIELD_NUMBER: _ClassVar[int]
    UTILISATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    utilisation_percent: float
    memory_used_bytes: int
    temperature_c: float
    def __init__(self, uuid: _Optional[str] = ..., utilisation_percent: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., temperature_c: _Optional[float] = ...) -> None: ...

class TaskBeat(_message.Message):
    __slots__ = ("task", "epoch", "state", "port")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    state: TaskState
    port: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[TaskState, str]] = ..., port: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("free_slots", "tasks", "disk_free_bytes", "clock_ms", "draining", "cpu_percent", "memory_used_bytes", "gpus", "refusing")
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    REFUSING_FIELD_NUMBER: _ClassVar[int]
    free_slots: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskBeat]
    disk_free_bytes: int
    clock_ms: int
    draining: bool
    cpu_percent: float
    memory_used_bytes: int
    gpus: _containers.RepeatedCompositeFieldContainer[GpuReading]
    refusing: str
    def __init__(self, free_slots: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskBeat, _Mapping]]] = ..., disk_free_bytes: _Optional[int] = ..., clock_ms: _Optional[int] = ..., draining: _Optional[bool] = ..., cpu_percent: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., gpus: _Optional[_Iterable[_Union[GpuReading, _Mapping]]] = ..., refusing: _Optional[str] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class NamedBlob(_message.Message):
    __slots__ = ("name", "blob")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    blob: Blob
    def __init__(self, name: _Optional[str] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class Cause(_message.Message):
    __slots__ = ("fault", "message", "hint", "traceback")
    FAULT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    fault: Fault
    message: str
    hint: str
    traceback: str
    def __init__(self, fault: _Optional[_Union[Fault, str]] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class Needs(_message.Message):
    __slots__ = ("gpus", "gpu_memory_bytes", "cpus", "memory_bytes", "disk_bytes", "gpu_model")
    GPUS_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_MODEL_FIELD_NUMBER: _ClassVar[int]
    gpus: int
    gpu_memory_bytes: int
    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpu_model: str
    def __init__(self, gpus: _Optional[int] = ..., gpu_memory_bytes: _Optional[int] = ..., cpus: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., gpu_model: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("task", "epoch", "run", "publisher", "lease_s", "on_lost", "grace_s", "deadline_s", "package", "needs", "tail", "traceparent", "launch", "stage")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    ON_LOST_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    run: str
    publisher: str
    lease_s: float
    on_lost: OnLost
    grace_s: float
    deadline_s: float
    package: Blob
    needs: Needs
    tail: bool
    traceparent: str
    launch: LaunchSpec
    stage: StageSpec
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., run: _Optional[str] = ..., publisher: _Optional[str] = ..., lease_s: _Optional[float] = ..., on_lost: _Optional[_Union[OnLost, str]] = ..., grace_s: _Optional[float] = ..., deadline_s: _Optional[float] = ..., package: _Optional[_Union[Blob, _Mapping]] = ..., needs: _Optional[_Union[Needs, _Mapping]] = ..., tail: _Optional[bool] = ..., traceparent: _Optional[str] = ..., launch: _Optional[_Union[LaunchSpec, _Mapping]] = ..., stage: _Optional[_Union[StageSpec, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("task", "epoch", "grace_s", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    grace_s: float
    reason: str
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., grace_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: _Optional[bool] = ...) -> None: ...

class Tail(_message.Message):
    __slots__ = ("task", "on")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    task: str
    on: bool
    def __init__(self, task: _Optional[str] = ..., on: _Optional[bool] = ...) -> None: ...

class CloseSession(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class Resync(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Order(_message.Message):
    __slots__ = ("device", "counter", "lifetime_s", "offer", "cancel", "drain", "tail", "resync", "close_session")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    CLOSE_SESSION_FIELD_NUMBER: _ClassVar[int]
    device: str
    counter: int
    lifetime_s: float
    offer: Offer
    cancel: Cancel
    drain: Drain
    tail: Tail
    resync: Resync
    close_session: CloseSession
    def __init__(self, device: _Optional[str] = ..., counter: _Optional[int] = ..., lifetime_s: _Optional[float] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., tail: _Optional[_Union[Tail, _Mapping]] = ..., resync: _Optional[_Union[Resync, _Mapping]] = ..., close_session: _Optional[_Union[CloseSession, _Mapping]] = ...) -> None: ...

class SignedOrder(_message.Message):
    __slots__ = ("key_id", "order", "signature")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    order: bytes
    signature: bytes
    def __init__(self, key_id: _Optional[str] = ..., order: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("task", "epoch")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Reject(_message.Message):
    __slots__ = ("task", "epoch", "reason", "detail")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    reason: RejectReason
    detail: str
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[_Union[RejectReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("task", "epoch", "state", "note")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    state: TaskState
    note: str
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[TaskState, str]] = ..., note: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("task", "epoch", "state", "exit_code", "signal", "cause", "artifacts", "metrics", "weight", "stdout_bytes", "stderr_bytes")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    STDOUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STDERR_BYTES_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    state: TaskState
    exit_code: int
    signal: int
    cause: Cause
    artifacts: _containers.RepeatedCompositeFieldContainer[NamedBlob]
    metrics: _containers.ScalarMap[str, float]
    weight: float
    stdout_bytes: int
    stderr_bytes: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[TaskState, str]] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., cause: _Optional[_Union[Cause, _Mapping]] = ..., artifacts: _Optional[_Iterable[_Union[NamedBlob, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., weight: _Optional[float] = ..., stdout_bytes: _Optional[int] = ..., stderr_bytes: _Optional[int] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ("task", "epoch")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class ResultAck(_message.Message):
    __slots__ = ("task", "epoch")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class LaunchSpec(_message.Message):
    __slots__ = ("bootstrap", "command", "env", "requirements", "secrets", "offline", "container", "service")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    REQUIREMENTS_FIELD_NUMBER: _ClassVar[int]
    SECRETS_FIELD_NUMBER: _ClassVar[int]
    OFFLINE_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    bootstrap: str
    command: str
    env: _containers.ScalarMap[str, str]
    requirements: str
    secrets: _containers.RepeatedScalarFieldContainer[str]
    offline: bool
    container: Container
    service: Service
    def __init__(self, bootstrap: _Optional[str] = ..., command: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., requirements: _Optional[str] = ..., secrets: _Optional[_Iterable[str]] = ..., offline: _Optional[bool] = ..., container: _Optional[_Union[Container, _Mapping]] = ..., service: _Optional[_Union[Service, _Mapping]] = ...) -> None: ...

class Service(_message.Message):
    __slots__ = ("port", "path", "within_s")
    PORT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    port: int
    path: str
    within_s: float
    def __init__(self, port: _Optional[int] = ..., path: _Optional[str] = ..., within_s: _Optional[float] = ...) -> None: ...

class Container(_message.Message):
    __slots__ = ("image", "registry", "username", "password", "mounts")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    MOUNTS_FIELD_NUMBER: _ClassVar[int]
    image: str
    registry: str
    username: str
    password: str
    mounts: _containers.RepeatedCompositeFieldContainer[Mount]
    def __init__(self, image: _Optional[str] = ..., registry: _Optional[str] = ..., username: _Optional[str] = ..., password: _Optional[str] = ..., mounts: _Optional[_Iterable[_Union[Mount, _Mapping]]] = ...) -> None: ...

class Mount(_message.Message):
    __slots__ = ("source", "target", "writable")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    writable: bool
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ..., writable: _Optional[bool] = ...) -> None: ...

class StageSpec(_message.Message):
    __slots__ = ("session", "kind", "round", "client", "clients", "seed", "app", "config", "algorithm", "algorithm_config", "model", "sent", "treatment", "evaluate", "labels", "group", "turns", "deadline_s")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_CONFIG_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    TREATMENT_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    session: str
    kind: StageKind
    round: int
    client: int
    clients: int
    seed: int
    app: str
    config: str
    algorithm: str
    algorithm_config: str
    model: Blob
    sent: Blob
    treatment: str
    evaluate: bool
    labels: _containers.ScalarMap[str, str]
    group: int
    turns: int
    deadline_s: float
    def __init__(self, session: _Optional[str] = ..., kind: _Optional[_Union[StageKind, str]] = ..., round: _Optional[int] = ..., client: _Optional[int] = ..., clients: _Optional[int] = ..., seed: _Optional[int] = ..., app: _Optional[str] = ..., config: _Optional[str] = ..., algorithm: _Optional[str] = ..., algorithm_config: _Optional[str] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., sent: _Optional[_Union[Blob, _Mapping]] = ..., treatment: _Optional[str] = ..., evaluate: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ..., group: _Optional[int] = ..., turns: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class WorkerReady(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class StageOrder(_message.Message):
    __slots__ = ("task", "epoch", "spec", "model_path", "sent_path", "out_dir", "deadline_s")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    SENT_PATH_FIELD_NUMBER: _ClassVar[int]
    OUT_DIR_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    spec: StageSpec
    model_path: str
    sent_path: str
    out_dir: str
    deadline_s: float
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., spec: _Optional[_Union[StageSpec, _Mapping]] = ..., model_path: _Optional[str] = ..., sent_path: _Optional[str] = ..., out_dir: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class StageDone(_message.Message):
    __slots__ = ("task", "epoch", "cause", "files", "metrics", "weight")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    cause: Cause
    files: _containers.RepeatedScalarFieldContainer[str]
    metrics: _containers.ScalarMap[str, float]
    weight: float
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ..., cause: _Optional[_Union[Cause, _Mapping]] = ..., files: _Optional[_Iterable[str]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., weight: _Optional[float] = ...) -> None: ...

class StageCancel(_message.Message):
    __slots__ = ("task", "epoch")
    TASK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    task: str
    epoch: int
    def __init__(self, task: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("worker_ready", "stage_order", "stage_done", "stage_cancel")
    WORKER_READY_FIELD_NUMBER: _ClassVar[int]
    STAGE_ORDER_FIELD_NUMBER: _ClassVar[int]
    STAGE_DONE_FIELD_NUMBER: _ClassVar[int]
    STAGE_CANCEL_FIELD_NUMBER: _ClassVar[int]
    worker_ready: WorkerReady
    stage_order: StageOrder
    stage_done: StageDone
    stage_cancel: StageCancel
    def __init__(self, worker_ready: _Optional[_Union[WorkerReady, _Mapping]] = ..., stage_order: _Optional[_Union[StageOrder, _Mapping]] = ..., stage_done: _Optional[_Union[StageDone, _Mapping]] = ..., stage_cancel: _Optional[_Union[StageCancel, _Mapping]] = ...) -> None: ...

class OpenRun(_message.Message):
    __slots__ = ("app_dir", "app", "config", "algorithm", "algorithm_config", "seed", "central", "clients", "treatment", "groups")
    APP_DIR_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_CONFIG_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CENTRAL_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    TREATMENT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    app_dir: str
    app: str
    config: str
    algorithm: str
    algorithm_config: str
    seed: int
    central: bool
    clients: int
    treatment: str
    groups: str
    def __init__(self, app_dir: _Optional[str] = ..., app: _Optional[str] = ..., config: _Optional[str] = ..., algorithm: _Optional[str] = ..., algorithm_config: _Optional[str] = ..., seed: _Optional[int] = ..., central: _Optional[bool] = ..., clients: _Optional[int] = ..., treatment: _Optional[str] = ..., groups: _Optional[str] = ...) -> None: ...

class MakeModel(_message.Message):
    __slots__ = ("out_dir",)
    OUT_DIR_FIELD_NUMBER: _ClassVar[int]
    out_dir: str
    def __init__(self, out_dir: _Optional[str] = ...) -> None: ...

class ModelMade(_message.Message):
    __slots__ = ("model_path", "state_path", "sent_path", "metrics", "groups")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    STATE_PATH_FIELD_NUMBER: _ClassVar[int]
    SENT_PATH_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    model_path: str
    state_path: str
    sent_path: str
    metrics: _containers.ScalarMap[str, float]
    groups: _containers.RepeatedCompositeFieldContainer[GroupFiles]
    def __init__(self, model_path: _Optional[str] = ..., state_path: _Optional[str] = ..., sent_path: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., groups: _Optional[_Iterable[_Union[GroupFiles, _Mapping]]] = ...) -> None: ...

class GroupFiles(_message.Message):
    __slots__ = ("group", "model_path", "sent_path")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    SENT_PATH_FIELD_NUMBER: _ClassVar[int]
    group: int
    model_path: str
    sent_path: str
    def __init__(self, group: _Optional[int] = ..., model_path: _Optional[str] = ..., sent_path: _Optional[str] = ...) -> None: ...

class PlanRound(_message.Message):
    __slots__ = ("round", "clients", "count")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    round: int
    clients: _containers.RepeatedScalarFieldContainer[int]
    count: int
    def __init__(self, round: _Optional[int] = ..., clients: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ...) -> None: ...

class RoundPlan(_message.Message):
    __slots__ = ("clients",)
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, clients: _Optional[_Iterable[int]] = ...) -> None: ...

class BeginRound(_message.Message):
    __slots__ = ("round", "model_path", "state_path", "clients", "groups")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    STATE_PATH_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    round: int
    model_path: str
    state_path: str
    clients: _containers.RepeatedScalarFieldContainer[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupFiles]
    def __init__(self, round: _Optional[int] = ..., model_path: _Optional[str] = ..., state_path: _Optional[str] = ..., clients: _Optional[_Iterable[int]] = ..., groups: _Optional[_Iterable[_Union[GroupFiles, _Mapping]]] = ...) -> None: ...

class RoundBegun(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunOpened(_message.Message):
    __slots__ = ("stages", "asynchronous", "buffer", "groups", "algorithm", "algorithm_config", "partial")
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ASYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_CONFIG_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    stages: int
    asynchronous: bool
    buffer: int
    groups: _containers.RepeatedCompositeFieldContainer[Members]
    algorithm: str
    algorithm_config: str
    partial: bool
    def __init__(self, stages: _Optional[int] = ..., asynchronous: _Optional[bool] = ..., buffer: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Members, _Mapping]]] = ..., algorithm: _Optional[str] = ..., algorithm_config: _Optional[str] = ..., partial: _Optional[bool] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("clients",)
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, clients: _Optional[_Iterable[int]] = ...) -> None: ...

class AddUpdate(_message.Message):
    __slots__ = ("client", "path", "weight", "metrics", "staleness")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    client: int
    path: str
    weight: float
    metrics: _containers.ScalarMap[str, float]
    staleness: int
    def __init__(self, client: _Optional[int] = ..., path: _Optional[str] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., staleness: _Optional[int] = ...) -> None: ...

class UpdateAdded(_message.Message):
    __slots__ = ("client", "refusal", "stepped")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    client: int
    refusal: Cause
    stepped: bool
    def __init__(self, client: _Optional[int] = ..., refusal: _Optional[_Union[Cause, _Mapping]] = ..., stepped: _Optional[bool] = ...) -> None: ...

class FinishRound(_message.Message):
    __slots__ = ("out_dir",)
    OUT_DIR_FIELD_NUMBER: _ClassVar[int]
    out_dir: str
    def __init__(self, out_dir: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("cause",)
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    cause: Cause
    def __init__(self, cause: _Optional[_Union[Cause, _Mapping]] = ...) -> None: ...

class AggregatorFrame(_message.Message):
    __slots__ = ("call", "open_run", "make_model", "plan_round", "begin_round", "add_update", "finish_round", "model_made", "round_plan", "round_begun", "update_added", "failed", "run_opened")
    CALL_FIELD_NUMBER: _ClassVar[int]
    OPEN_RUN_FIELD_NUMBER: _ClassVar[int]
    MAKE_MODEL_FIELD_NUMBER: _ClassVar[int]
    PLAN_ROUND_FIELD_NUMBER: _ClassVar[int]
    BEGIN_ROUND_FIELD_NUMBER: _ClassVar[int]
    ADD_UPDATE_FIELD_NUMBER: _ClassVar[int]
    FINISH_ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_MADE_FIELD_NUMBER: _ClassVar[int]
    ROUND_PLAN_FIELD_NUMBER: _ClassVar[int]
    ROUND_BEGUN_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ADDED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    RUN_OPENED_FIELD_NUMBER: _ClassVar[int]
    call: int
    open_run: OpenRun
    make_model: MakeModel
    plan_round: PlanRound
    begin_round: BeginRound
    add_update: AddUpdate
    finish_round: FinishRound
    model_made: ModelMade
    round_plan: RoundPlan
    round_begun: RoundBegun
    update_added: UpdateAdded
    failed: Failed
    run_opened: RunOpened
    def __init__(self, call: _Optional[int] = ..., open_run: _Optional[_Union[OpenRun, _Mapping]] = ..., make_model: _Optional[_Union[MakeModel, _Mapping]] = ..., plan_round: _Optional[_Union[PlanRound, _Mapping]] = ..., begin_round: _Optional[_Union[BeginRound, _Mapping]] = ..., add_update: _Optional[_Union[AddUpdate, _Mapping]] = ..., finish_round: _Optional[_Union[FinishRound, _Mapping]] = ..., model_made: _Optional[_Union[ModelMade, _Mapping]] = ..., round_plan: _Optional[_Union[RoundPlan, _Mapping]] = ..., round_begun: _Optional[_Union[RoundBegun, _Mapping]] = ..., update_added: _Optional[_Union[UpdateAdded, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., run_opened: _Optional[_Union[RunOpened, _Mapping]] = ...) -> None: ...
