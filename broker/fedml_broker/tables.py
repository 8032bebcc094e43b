# SPDX-License-Identifier: Apache-2.0
"""The tables of the store. What changes here needs a migration in `migrations/versions/`.

Times are seconds since 1970 and only ever shown to people; nothing is decided by them except the
end of keys and certificates. Leases and deadlines are durations, counted on monotonic clocks.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

# The first tenant: that of the people who run the broker.
DEFAULT_TENANT = "default"

metadata = MetaData()

settings = Table(
    "settings",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", JSON, nullable=False),
)

users = Table(
    "users",
    metadata,
    Column("name", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("role", String, nullable=False),  # viewer | member | admin
    Column("created_at", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("secret_sha256", String, primary_key=True),
    Column("user", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    # It is a job's, good for its own run alone, and goes with the end of that; NULL: the user's.
    Column("run", String, index=True),
)

# Who of a sign-in provider is which user.
sign_ins = Table(
    "sign_ins",
    metadata,
    Column("issuer", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("user", String, nullable=False, index=True),
    Column("created_at", Float, nullable=False),
)

# Browsers that are signed in; each as long as the token that it was begun with, at most.
sessions = Table(
    "sessions",
    metadata,
    Column("secret_sha256", String, primary_key=True),
    Column("user", String, nullable=False),
    Column("token_sha256", String),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

login_keys = Table(
    "login_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("secret_sha256", String, nullable=False, unique=True),
    Column("tenant", String, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("uses", Integer),  # how many machines may use it; NULL: any number
    Column("used", Integer, nullable=False),
    Column("expires_at", Float),
    Column("revoked", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", String, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("machine_id", String, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("inventory", JSON, nullable=False),
    Column("state", String, nullable=False),  # active | draining | revoked
    Column("counter", Integer, nullable=False),  # of orders: grows with every one that is signed
    Column("boot_n", Integer, nullable=False),
    Column("agent_version", String, nullable=False),
    Column("enrolled_at", Float, nullable=False),
    Column("last_seen_at", Float),
    Column("certificate_expires_at", Float, nullable=False),
    UniqueConstraint("tenant", "machine_id", "public_key"),
    Index("devices_by_name", "tenant", "name"),
    Index("devices_by_machine", "machine_id"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("user", String, nullable=False),
    Column("kind", String, nullable=False),  # launch | federate | tracked
    Column("name", String, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("package", JSON),  # {"sha256", "size"}
    Column("state", String, nullable=False),  # a TaskState's name
    Column("cause", JSON),
    Column("exit_code", Integer),
    Column("stopped_by", String),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Index("runs_by_age", "tenant", "created_at"),
    Index("runs_by_state", "state"),
)

# Launched jobs that answer at this moment.
services = Table(
    "services",
    metadata,
    Column("run", String, primary_key=True),
    Column("device", String, nullable=False),
    Column("name", String, nullable=False),  # the machine's
    Column("host", String, nullable=False),
    Column("port", Integer, nullable=False),
    Column("since", Float, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String, primary_key=True),
    Column("run", String, nullable=False, index=True),
    Column("tenant", String, nullable=False),
    Column("device", String),  # chosen beforehand (a federated client), or by the match
    Column("bound", Boolean, nullable=False),  # only ever this device
    Column("state", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("tries_left", Integer, nullable=False),
    # Of its own failures, where the job asked to be started again after one.
    Column("restarts_left", Integer, nullable=False, server_default="0"),
    Column("offer", LargeBinary, nullable=False),  # a serialised Offer; its epoch is filled in
    Column("labels", JSON, nullable=False),  # what the device must wear
    Column("terms", JSON, nullable=False, server_default="{}"),  # see queue.Terms
    Column("rank", Integer, nullable=False, server_default="0"),  # in a run of several machines
    # Why its device was told to hand it back: it is queued again. Empty: it was not.
    Column("recalled", String, nullable=False, server_default=""),
    Column("round", Integer),  # the turn of a federated run that it belongs to
    Column("client", Integer),
    Column("version", Integer),  # asynchronous: the round whose model it starts from
    Column("counted", Integer),  # asynchronous: the round that its update went into
    Column("result", LargeBinary),  # a serialised Result
    Column("created_at", Float, nullable=False),
    Column("ended_at", Float),
    Index("tasks_by_state", "state"),
    Index("tasks_by_round", "run", "round"),
    Index("tasks_by_count", "run", "counted"),
)

clusters = Table(
    "clusters",
    metadata,
    Column("tenant", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("user", String, nullable=False),
    Column("devices", JSON, nullable=False),  # their ids
    Column("up", Boolean, nullable=False),  # its devices are reserved; else it is only a name
    Column("autostop_s", Float),  # stopped when idle for so long
    Column("created_at", Float, nullable=False),
)

clients = Table(
    "clients",
    metadata,
    Column("run", String, primary_key=True),
    Column("client", Integer, primary_key=True),
    Column("device", String, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("clients", JSON, nullable=False),  # who was asked, in the latest stage
    Column("stage", Integer, nullable=False, server_default="0"),  # how many of its stages are done
    Column("model", JSON),  # {"sha256", "size"} once the round, or its first stage, is done
    Column("state", JSON),  # the algorithm's, same form
    Column("sent", JSON),  # what goes to clients beside the model, same form
    # What the members of groups go on with, by number: {"model", "sent"}, each of the same form.
    Column("groups", JSON, nullable=False, server_default="{}"),
    Column("metrics", JSON, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String, nullable=False),
    Column("data", JSON, nullable=False),
    Index("events_by_run", "run", "id"),
    sqlite_autoincrement=True,
)

# Written and read by `audit.py` alone; what its columns hold goes into the hash as it stands here.
audit = Table(
    "audit",
    metadata,
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("at_ms", Integer, nullable=False),
    Column("tenant", String, nullable=False),
    Column(
        "actor", String, nullable=False
    ),  # user/NAME | run/ID | device/ID | cli | broker | nobody
    Column("action", String, nullable=False),
    Column("object", String, nullable=False),
    Column("details", String, nullable=False),  # canonical JSON
    Column("hash", String, nullable=False),
    Index("audit_by_tenant", "tenant", "n"),
)

objects = Table(
    "objects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("sha256", String, nullable=False),  # of its bytes, or of a folder's manifest
    Column("size", BigInteger, nullable=False),  # of all its files
    Column("folder", Boolean, nullable=False),
    Column("metadata", JSON, nullable=False),  # its user's own
    Column("user", String, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("tenant", "name"),
    sqlite_autoincrement=True,
)

workflows = Table(
    "workflows",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("user", String, nullable=False),  # in whose name its steps run: who resumed it last
    Column("name", String, nullable=False),
    Column("state", String, nullable=False),  # RUNNING | FINISHED | FAILED | STOPPED
    Column("tries", Integer, nullable=False),
    Column("stopped_by", String),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float, nullable=False),  # of the latest try
    Column("ended_at", Float),
    Index("workflows_by_age", "tenant", "created_at"),
    Index("workflows_by_state", "state"),
)

workflow_steps = Table(
    "workflow_steps",
    metadata,
    Column("workflow", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("definition", JSON, nullable=False),  # see workflow.StepBody; may hold secrets
    Column("state", String, nullable=False),  # see fedml_protocol.workflow.StepState
    Column("runs", JSON, nullable=False),  # ids, of every try; "" if it had none
    Column("cause", String, nullable=False),
    Column("outputs", JSON),  # see outputs.Outputs, once it has finished
    Column("started_at", Float),
    Column("ended_at", Float),
)

# A blob lives as long as somebody names it here.
blob_refs = Table(
    "blob_refs",
    metadata,
    Column("sha256", String, primary_key=True),
    Column("owner", String, primary_key=True),
    Index("blob_refs_by_owner", "owner"),
)

# What runs record of themselves (tracking.py). `source` tells the clients of a federated run apart.
metrics = Table(
    "metrics",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", String, nullable=False),
    Column("source", String, nullable=False),
    Column("name", String, nullable=False),
    Column("step", Integer, nullable=False),
    Column("value", Float),  # NULL: not a finite number
    Column("at", Float, nullable=False),
    Index("metrics_by_run", "run", "name", "source", "step"),
    sqlite_autoincrement=True,
)

params = Table(
    "params",
    metadata,
    Column("run", String, primary_key=True),
    Column("source", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("value", String, nullable=False),
)

tags = Table(
    "tags",
    metadata,
    Column("run", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("value", String, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("run", String, primary_key=True),
    Column("source", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("type", String, nullable=False),  # artifact | model
    Column("sha256", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

# How far each file of records is in the tables above.
records = Table(
    "records",
    metadata,
    Column("log", String, primary_key=True),  # TASK/EPOCH, or a tracked run's id
    Column("run", String, nullable=False),
    Column("taken", Integer, nullable=False),  # bytes
    Column("refused", Integer, nullable=False),  # lines that were no records
    Column("lost", Integer, nullable=False),  # records that their writer could not keep
    Index("records_by_run", "run"),
)

experiments = Table(
    "experiments",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("tenant", "name"),
    sqlite_autoincrement=True,
)

# Runs that their own program drives: of `fedml.mlops` outside any task, or of an MLflow client.
tracked = Table(
    "tracked",
    metadata,
    Column("run", String, primary_key=True),
    Column("experiment", Integer, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Index("tracked_by_experiment", "experiment"),
)
