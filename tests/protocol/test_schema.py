# SPDX-License-Identifier: Apache-2.0
"""The schema file and the dataclasses say the same; the generated code is that of the schema."""

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

import fedml_protocol
from fedml_protocol import wire_pb2
from tests.fakes.messages import MESSAGES, each_message, members

PROTOCOL = Path(__file__).parents[2] / "protocol"
GENERATE = PROTOCOL / "generate.py"

SCHEMA = wire_pb2.DESCRIPTOR
PYTHON = {
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_BYTES: bytes,
    FieldDescriptor.TYPE_DOUBLE: float,
    FieldDescriptor.TYPE_FLOAT: float,
    FieldDescriptor.TYPE_INT32: int,
    FieldDescriptor.TYPE_STRING: str,
    FieldDescriptor.TYPE_UINT32: int,
    FieldDescriptor.TYPE_UINT64: int,
}


def enums() -> dict[str, type[IntEnum]]:
    """Every IntEnum of the package, by name."""
    names = [module.name for module in pkgutil.iter_modules(fedml_protocol.__path__)]
    modules = [importlib.import_module(f"fedml_protocol.{name}") for name in names]
    return {
        kind.__name__: kind
        for module in modules
        if module is not wire_pb2
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, IntEnum) and kind is not IntEnum
    }


def descriptor(kind: type) -> Descriptor:
    found = getattr(wire_pb2, kind.__name__).DESCRIPTOR
    assert isinstance(found, Descriptor)
    return found


def unions(message: Descriptor) -> dict[str, set[str]]:
    """The real oneofs: name -> the messages that may be in it."""
    return {
        oneof.name: {field.message_type.name for field in oneof.fields if field.message_type}
        for oneof in message.oneofs
        if not oneof.name.startswith("_")
    }


def test_every_message_of_the_schema_has_a_dataclass_and_the_reverse() -> None:
    assert {kind.__name__ for kind in MESSAGES} == set(SCHEMA.message_types_by_name)


def test_no_two_dataclasses_share_a_message() -> None:
    assert len({kind.__name__ for kind in MESSAGES}) == len(MESSAGES)


@each_message
def test_fields_have_the_same_names_on_both_sides(kind: type) -> None:
    message = descriptor(kind)
    alone = {f.name for f in message.fields if f.containing_oneof is None or _optional(f)}
    assert set(get_type_hints(kind)) == alone | set(unions(message))


@each_message
def test_every_member_of_a_oneof_is_in_the_union_and_the_reverse(kind: type) -> None:
    for name, messages in unions(descriptor(kind)).items():
        assert {member.__name__ for member in members(kind, name)} == messages


@each_message
def test_a_field_of_a_oneof_is_named_for_its_message(kind: type) -> None:
    for oneof in descriptor(kind).oneofs:
        for field in oneof.fields:
            if field.message_type is not None and oneof.name != "spec":
                snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field.message_type.name).lower()
                assert field.name == snake


@each_message
def test_fields_have_the_same_types_on_both_sides(kind: type) -> None:
    message = descriptor(kind)
    for name, hint in get_type_hints(kind).items():
        if name not in unions(message):
            field = message.fields_by_name[name]
            assert _fits(hint, field), f"{kind.__name__}.{name}: {hint} is no {field.type}"


def _optional(field: FieldDescriptor) -> bool:
    """Protobuf marks an `optional` scalar with a oneof of its own."""
    oneof = field.containing_oneof
    return oneof is not None and oneof.name == f"_{field.name}"


def _fits(hint: Any, field: FieldDescriptor) -> bool:
    if get_origin(hint) in (Union, UnionType):
        inner = [member for member in get_args(hint) if member is not NoneType]
        there_or_not = _optional(field) or field.message_type is not None
        return len(inner) == 1 and there_or_not and _fits_alone(inner[0], field)
    if get_origin(hint) is Mapping:
        key, value = get_args(hint)
        entry = field.message_type
        return (
            entry is not None
            and bool(entry.GetOptions().map_entry)
            and _fits_alone(key, entry.fields_by_name["key"])
            and _fits_alone(value, entry.fields_by_name["value"])
        )
    if get_origin(hint) is tuple:
        item, dots = get_args(hint)
        return dots is ... and field.is_repeated and _fits_alone(item, field)
    return not field.is_repeated and not _optional(field) and _fits_alone(hint, field)


def _fits_alone(hint: Any, field: FieldDescriptor) -> bool:
    if field.message_type is not None:
        return is_dataclass(hint) and getattr(hint, "__name__", "") == field.message_type.name
    if field.enum_type is not None:
        return issubclass(hint, IntEnum) and hint.__name__ == field.enum_type.name
    return PYTHON[field.type] is hint


def test_every_enum_has_equal_names_and_numbers_on_both_sides() -> None:
    ours = {name: {m.name: m.value for m in kind} for name, kind in enums().items()}
    theirs = {
        name: {value.name: value.number for value in enum.values if value.number}
        for name, enum in SCHEMA.enum_types_by_name.items()
    }
    assert ours == theirs


def test_zero_is_no_value_of_any_enum() -> None:
    for enum in SCHEMA.enum_types_by_name.values():
        zero = enum.values_by_number[0].name
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper()
        assert zero == f"{snake}_UNSPECIFIED"


def test_no_enum_or_message_is_hidden_inside_another() -> None:
    for message in SCHEMA.message_types_by_name.values():
        assert not message.enum_types
        assert all(inner.GetOptions().map_entry for inner in message.nested_types)


def test_the_generated_code_is_that_of_the_schema() -> None:
    check = subprocess.run(
        [sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_the_generated_module_knows_its_package() -> None:
    assert wire_pb2.Offer.__module__ == "fedml_protocol.wire_pb2"
    assert SCHEMA.name == "fedml_protocol/wire.proto"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """protocol/generate.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("generate_protocol", GENERATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stale_or_absent_generated_code_is_named(generate: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "fedml_protocol"
    package.mkdir()
    assert generate.stale(tmp_path) == list(generate.GENERATED)

    for name in generate.GENERATED:
        (tmp_path / name).write_text((PROTOCOL / name).read_text())
    assert generate.stale(tmp_path) == []

    stub = package / "wire_pb2.pyi"
    stub.write_text(stub.read_text().replace("free_slots", "free_places"))
    assert generate.stale(tmp_path) == ["fedml_protocol/wire_pb2.pyi"]


def test_another_release_of_protoc_makes_nothing_stale(
    generate: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "fedml_protocol").mkdir()
    for name in generate.GENERATED:
        text = (PROTOCOL / name).read_text()
        older = re.sub(r"(?<=Python Version: )[\d.]+", "6.31.0", text)
        older = re.sub(r"(?<=PUBLIC,\n)(\s+)\d+,\s+\d+,\s+\d+,", r"\g<1>6,\g<1>31,\g<1>0,", older)
        (tmp_path / name).write_text(older)
    assert "6.31.0" in (tmp_path / generate.GENERATED[0]).read_text()
    assert generate.stale(tmp_path) == []
