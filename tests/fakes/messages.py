# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for every message of `fedml_protocol`, derived from the dataclasses.

    @given(messages(Offer))                  any valid Offer
    @given(messages(Envelope))               any valid envelope, with any body
    @each_message
    @given(data=st.data())                   every kind, without naming one of them:
    def test(kind, data):                    data.draw(messages(kind))
    @given(wire_bytes(Offer))                protobuf of the right fields with any values at all

A new message, or a new field, needs nothing here as long as its type and its width on the wire say
all there is to say. Three places hold what they do not say:

    BY_NAME     a field of this name means the same in every message (ids, hashes, epochs)
    BY_FIELD    one field of one message is narrower than its type (a Result's state is final)
    TOGETHER    some fields of one message hang together (client < clients)

Values are those that the wire can hold: integers of the field's width, floats that survive a
`float` field, text that is UTF-8. NaN is left out (it equals nothing, so that no round trip could
be checked); both infinities and the negative zero are in. Containers are short: what is tried here
is the shape of messages; sizes have tests of their own.

`wire_bytes` is what a wrong or hostile peer could send: the fields and their wire types are those
of the schema, the values are not (unknown enum numbers, NaN, empty ids, absent parts).

`LAW` is how often, and without the deadlines that a busy machine would miss.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import fedml_protocol
from fedml_protocol import wire_pb2
from fedml_protocol.devices import Presence
from fedml_protocol.envelope import Envelope
from fedml_protocol.federate import StageKind, StageSpec
from fedml_protocol.launch import Container, LaunchSpec, Mount, Service
from fedml_protocol.tasks import FINAL, TRACEPARENT, Progress, Result, TaskState

T = TypeVar("T")

LAW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

IDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=40)
SHA256 = st.binary(min_size=32, max_size=32).map(bytes.hex)
EPOCHS = st.integers(1, 2**64 - 1)

_TEXT = st.text(max_size=12)
_SECONDS = st.floats(min_value=0, allow_infinity=False)
_SOME_SECONDS = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
_NO_NUL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_ENV_NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0="), min_size=1, max_size=9)

_WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=9)
_PATH = st.lists(_WORD, max_size=3).map(lambda words: "/" + "/".join(words))

_INTEGERS: Mapping[int, st.SearchStrategy[int]] = {
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
}
_FLOATS: Mapping[int, st.SearchStrategy[float]] = {
    FieldDescriptor.TYPE_FLOAT: st.floats(allow_nan=False, width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
}

BY_NAME: Mapping[str, st.SearchStrategy[Any]] = {
    "counter": EPOCHS,
    "deadline_s": _SECONDS,
    "device": IDS,
    "epoch": EPOCHS,
    "grace_s": _SECONDS,
    "lease_s": _SOME_SECONDS,
    "lifetime_s": _SOME_SECONDS,
    "name": st.text(min_size=1, max_size=12),
    "port": st.integers(0, 65535),
    "run": IDS,
    "session": IDS,
    "sha256": SHA256,
    "task": IDS,
    "traceparent": st.just("") | st.from_regex(TRACEPARENT, fullmatch=True),
    "within_s": _SOME_SECONDS,
}

BY_FIELD: Mapping[tuple[type, str], st.SearchStrategy[Any]] = {
    (Container, "image"): st.builds("{}/{}:{}".format, _WORD, _WORD, _WORD),
    (Container, "registry"): st.just("") | _WORD,
    (Envelope, "schema"): st.integers(1, 2**32 - 1),
    (LaunchSpec, "bootstrap"): _NO_NUL,
    (LaunchSpec, "command"): _NO_NUL.filter(str.strip),
    (LaunchSpec, "requirements"): _NO_NUL,
    (Mount, "source"): _PATH,
    (Mount, "target"): _PATH,
    (Progress, "state"): st.just(TaskState.RUNNING),
    (Service, "path"): st.just("") | _PATH,
    (Result, "state"): st.sampled_from(sorted(FINAL)),
}

TOGETHER: Mapping[type, st.SearchStrategy[Mapping[str, Any]]] = {
    LaunchSpec: st.tuples(
        st.dictionaries(_ENV_NAME, _NO_NUL, max_size=3),
        st.integers(0, 3),
        # A service is not offline.
        st.booleans() | st.deferred(lambda: messages(Service)),
    ).map(
        lambda three: {
            "env": three[0],
            "secrets": tuple(sorted(three[0])[: three[1]]),
            "offline": three[2] is True,
            "service": three[2] if isinstance(three[2], Service) else None,
        }
    ),
    Container: st.sampled_from([("", ""), ("ana", "open sesame")]).map(
        lambda two: {"username": two[0], "password": two[1]}
    ),
    Presence: st.tuples(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1)).map(
        lambda two: {"oldest_schema": min(two), "newest_schema": max(two)}
    ),
    StageSpec: st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 2**32 - 1)).flatmap(
        lambda two: st.fixed_dictionaries(
            {
                "clients": st.just(two[0]),
                "client": st.integers(0, two[0] - 1),
                "turns": st.just(two[1]),
                "kind": st.just(StageKind.TRAIN_IN_GROUP)
                if two[1]
                else st.sampled_from([StageKind.TRAIN, StageKind.EVALUATE]),
            }
        )
    ),
}


_ANYTHING: Mapping[int, st.SearchStrategy[Any]] = {
    **_INTEGERS,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 12) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_STRING: st.text(max_size=5) | IDS | SHA256,
}


def _dataclasses() -> list[type]:
    names = [module.name for module in pkgutil.iter_modules(fedml_protocol.__path__)]
    modules = [importlib.import_module(f"fedml_protocol.{name}") for name in names]
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__
    ]


# Every dataclass that travels, by name. What else the package defines (addresses, keys, tensors)
# has no message in the schema.
MESSAGES: tuple[type, ...] = tuple(
    sorted(
        (kind for kind in _dataclasses() if hasattr(wire_pb2, kind.__name__)),
        key=lambda kind: kind.__name__,
    )
)

each_message = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)


def members(kind: type, name: str) -> tuple[Any, ...]:
    """The types that the field `name` of `kind` may hold, None left out."""
    hint = get_type_hints(kind)[name]
    if get_origin(hint) in (Union, UnionType):
        return tuple(m for m in get_args(hint) if m is not NoneType)
    return (hint,)


@cache
def messages(kind: type[T]) -> st.SearchStrategy[T]:
    """Any valid message of `kind`."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    alone = st.fixed_dictionaries({name: _field(kind, name, hints[name]) for name in names})
    together = TOGETHER.get(kind, st.just({}))
    return st.builds(lambda one, other: kind(**{**one, **other}), alone, together)


@cache
def wire_bytes(kind: type) -> st.SearchStrategy[bytes]:
    """Protobuf with the fields of `kind`, any of them absent, and values that nobody checked."""
    protos = st.composite(_filled)(getattr(wire_pb2, kind.__name__))
    return protos.map(lambda proto: proto.SerializeToString())


def _filled(draw: st.DrawFn, proto_class: Any) -> Any:
    proto = proto_class()
    for field in proto.DESCRIPTOR.fields:
        # Mostly there: with each field absent half the time, little would get past the first check.
        if draw(st.integers(0, 4)) == 0:
            continue
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            key, value = (field.message_type.fields_by_name[part] for part in ("key", "value"))
            getattr(proto, field.name)[draw(_ANYTHING[key.type])] = draw(_ANYTHING[value.type])
        elif field.message_type is not None:
            part = _filled(draw, field.message_type._concrete_class)
            target = getattr(proto, field.name)
            (target.add() if field.is_repeated else target).CopyFrom(part)
        elif field.is_repeated:
            getattr(proto, field.name).extend(draw(st.lists(_ANYTHING[field.type], max_size=3)))
        else:
            setattr(proto, field.name, draw(_ANYTHING[field.type]))
    return proto


def _field(kind: type, name: str, hint: Any) -> st.SearchStrategy[Any]:
    if (kind, name) in BY_FIELD:
        return BY_FIELD[kind, name]
    if name in BY_NAME:
        return BY_NAME[name]
    descriptor = getattr(wire_pb2, kind.__name__).DESCRIPTOR
    return _value(hint, descriptor.fields_by_name.get(name))  # a oneof is not among the fields


def _value(hint: Any, wire: FieldDescriptor | None) -> st.SearchStrategy[Any]:
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*(_value(member, wire) for member in get_args(hint)))
    if get_origin(hint) is tuple:
        return st.lists(_value(get_args(hint)[0], wire), max_size=3).map(tuple)
    if get_origin(hint) is Mapping:
        assert wire is not None
        assert wire.message_type is not None
        value = wire.message_type.fields_by_name["value"]
        return st.dictionaries(_TEXT, _value(get_args(hint)[1], value), max_size=3)
    if hint is NoneType:
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is str:
        return _TEXT
    if hint is bytes:
        return st.binary(max_size=20)
    if hint is int:
        assert wire is not None
        return _INTEGERS[wire.type]
    if hint is float:
        assert wire is not None
        return _FLOATS[wire.type]
    if issubclass(hint, IntEnum):
        return st.sampled_from(list(hint))
    return messages(hint)
