# SPDX-License-Identifier: Apache-2.0
"""Dataclasses to protobuf and back, by name: the schema file and the classes are the only truth.

A union of dataclasses is a `oneof` of the same name, whose member is found by the class's name. An
optional dataclass is an absent submessage, a tuple is a repeated field, an IntEnum an enum of equal
numbers. Enum value 0 is never valid: it is what an unset field reads as.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import IntEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError

from fedml_protocol import wire_pb2
from fedml_protocol.errors import MalformedMessage, UnsupportedMessage

T = TypeVar("T")
_Write = Callable[[Any, Any], None]
_Read = Callable[[Any], Any]
_Plan = tuple[tuple[_Write, _Read, str], ...]

_PLANS: dict[type, _Plan] = {}


def serialise(value: object) -> bytes:
    """The bytes of one message; equal messages give equal bytes.

    Raises:
        MalformedMessage: A number does not fit its field, or a text is no UTF-8.
    """
    proto = _proto_class(type(value))()
    try:
        for write, _, name in _plan(type(value)):
            write(proto, getattr(value, name))
    except ValueError as error:
        raise MalformedMessage(f"{type(value).__name__} cannot be sent: {error}") from error
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def parse(kind: type[T], data: bytes) -> T:
    """The message of `kind` in `data`.

    Raises:
        MalformedMessage: The bytes are not such a message, or hold a value that it refuses.
        UnsupportedMessage: A newer peer's: a member of a union or an enum is unknown here.
    """
    proto = _proto_class(kind)()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise MalformedMessage(f"not a {kind.__name__}: {error}") from error
    return _from_proto(kind, proto)


def _from_proto(kind: type[T], proto: Any) -> T:
    return kind(**{name: read(proto) for _, read, name in _plan(kind)})


def _proto_class(kind: type) -> Any:
    return getattr(wire_pb2, kind.__name__)


def _plan(kind: type) -> _Plan:
    plan = _PLANS.get(kind)
    if plan is None:
        hints = get_type_hints(kind)
        names = [f.name for f in fields(kind)]
        plan = tuple((*_field(kind, name, hints[name]), name) for name in names)
        _PLANS[kind] = plan
    return plan


def _field(kind: type, name: str, hint: Any) -> tuple[_Write, _Read]:
    members = [m for m in get_args(hint) if m is not NoneType] if _is_union(hint) else [hint]
    optional = _is_union(hint) and NoneType in get_args(hint)
    if len(members) > 1:
        return _oneof(kind, name, members)
    inner: Any = members[0]
    if is_dataclass(inner):
        return _submessage(kind, name, inner, optional=optional)
    if get_origin(inner) is tuple:
        return _repeated(name, get_args(inner)[0])
    if get_origin(inner) is Mapping:
        return _mapping(name)
    return _scalar(kind, name, inner, optional=optional)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _oneof(kind: type, name: str, members: list[type]) -> tuple[_Write, _Read]:
    oneof = _proto_class(kind).DESCRIPTOR.oneofs_by_name[name]
    field_of = {f.message_type.name: f.name for f in oneof.fields}
    class_of = {field_of[m.__name__]: m for m in members}

    def write(proto: Any, value: Any) -> None:
        sub = getattr(proto, field_of[type(value).__name__])
        sub.SetInParent()
        for put, _, part in _plan(type(value)):
            put(sub, getattr(value, part))

    def read(proto: Any) -> Any:
        which = proto.WhichOneof(name)
        if which is None:
            raise UnsupportedMessage(f"{kind.__name__}.{name} is of a kind unknown here")
        return _from_proto(class_of[which], getattr(proto, which))

    return write, read


def _submessage(kind: type, name: str, inner: Any, *, optional: bool) -> tuple[_Write, _Read]:
    def write(proto: Any, value: Any) -> None:
        if value is None:
            return
        sub = getattr(proto, name)
        sub.SetInParent()
        for put, _, part in _plan(inner):
            put(sub, getattr(value, part))

    def read(proto: Any) -> Any:
        if not proto.HasField(name):
            if optional:
                return None
            raise MalformedMessage(f"{kind.__name__}.{name} is missing")
        return _from_proto(inner, getattr(proto, name))

    return write, read


def _repeated(name: str, inner: Any) -> tuple[_Write, _Read]:
    if not is_dataclass(inner):

        def extend(proto: Any, value: Any) -> None:
            if value:
                getattr(proto, name).extend(value)

        return extend, lambda proto: tuple(getattr(proto, name))

    def write(proto: Any, value: Any) -> None:
        for item in value:
            sub = getattr(proto, name).add()
            for put, _, part in _plan(type(item)):
                put(sub, getattr(item, part))

    def read(proto: Any) -> Any:
        return tuple(_from_proto(inner, item) for item in getattr(proto, name))  # type: ignore[arg-type]

    return write, read


def _mapping(name: str) -> tuple[_Write, _Read]:
    def write(proto: Any, value: Any) -> None:
        if value:
            getattr(proto, name).update(value)

    return write, lambda proto: dict(getattr(proto, name))


def _scalar(kind: type, name: str, inner: type, *, optional: bool) -> tuple[_Write, _Read]:
    def write(proto: Any, value: Any) -> None:
        if value is not None:
            setattr(proto, name, value)

    if issubclass(inner, IntEnum):

        def read(proto: Any) -> Any:
            number = getattr(proto, name)
            try:
                return inner(number)
            except ValueError as error:
                if number == 0:
                    raise MalformedMessage(f"{kind.__name__}.{name} is missing") from error
                # Numbers are only ever added: a newer peer's, not a wrong one.
                raise UnsupportedMessage(f"{kind.__name__}.{name}: {error}") from error

    elif optional:

        def read(proto: Any) -> Any:
            return getattr(proto, name) if proto.HasField(name) else None

    else:

        def read(proto: Any) -> Any:
            return getattr(proto, name)

    return write, read
