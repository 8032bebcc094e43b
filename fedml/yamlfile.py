# SPDX-License-Identifier: Apache-2.0
"""YAML files whose keys are checked by a table: what each key's value must be.

An error names the file, the line and, for a key that nobody knows, the nearest one that is known.
A key that has no effect is named in a warning with the reason.
"""

import difflib
import json
import math
import re
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from fedml.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML 1.1 but for one thing: `1e-5` is a number, as YAML 1.2 and everybody has it."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


class Unfit(Exception):
    """A value that its key cannot have; the text says what it must be."""


class NoEffect(Exception):
    """A value, or a whole key, that changes nothing; the text is the reason."""


class Reader:
    """One file whose values still know their lines."""

    def __init__(self, file: Path, within: yaml.Node | None = None) -> None:
        """`within`: only this mapping of the file, which another reader has found."""
        self.file = file
        self._root: yaml.Node
        if within is not None:
            self._loader = Loader("")
            self._root = within
            return
        try:
            self._loader = Loader(file.read_text())
            node = self._loader.get_single_node()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file}: a mapping of keys is expected")
        self._root = node

    def read(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """What the file says, checked by a table.

        Args:
            keys: Each key with its kind: a function of loader and node that gives the value; a
                mapping of keys for a section; or a text, the reason why the key has no effect.
                A key may be a pattern, such as `*_args`.
        """
        return self._mapping(self._root, keys, "")

    def line(self, *path: str) -> int:
        """The line of the key at the end of a path, or of the last one on it that is there."""
        node, found = self._root, self._root.start_mark.line + 1
        for name in path:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            for key, value in pairs:
                if key.value == name:
                    node, found = value, key.start_mark.line + 1
                    break
            else:
                break
        return found

    def _mapping(self, node: yaml.Node, keys: Mapping[str, Any], inside: str) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise Unfit("must be a mapping")
        self._loader.flatten_mapping(node)  # resolves `<<`
        found: dict[str, Any] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in found:
                raise ConfigError(f"{self.file}, line {line}: `{inside}{name}` is there twice")
            kind = _kind(name, keys)
            if kind is None:
                wrong = f"unknown key `{inside}{name}`{_near(name, keys)}"
                raise ConfigError(f"{self.file}, line {line}: {wrong}")
            try:
                found[name] = self._value(value, kind, f"{inside}{name}")
            except NoEffect as reason:
                said = f"{self.file}, line {line}: `{inside}{name}` has no effect: {reason}"
                warnings.warn(said, UserWarning, stacklevel=2)
            except Unfit as error:
                wrong = f"`{inside}{name}` {error}"
                raise ConfigError(f"{self.file}, line {line}: {wrong}") from error
            except yaml.YAMLError as error:
                raise ConfigError(f"{self.file} is not YAML: {error}") from error
        return found

    def _value(self, node: yaml.Node, kind: Any, shown: str) -> Any:
        if isinstance(kind, str):
            raise NoEffect(kind)
        if isinstance(kind, Mapping):
            return {} if is_null(node) else self._mapping(node, kind, f"{shown}.")
        return kind(self._loader, node)


def _kind(name: str, keys: Mapping[str, Any]) -> Any:
    """What the table says of a key; None: nothing."""
    if name in keys:
        return keys[name]
    for pattern, kind in keys.items():
        if "*" in pattern and fnmatchcase(name, pattern):
            return kind
    return None


def _near(name: str, keys: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, keys, n=1)
    known = [key for key, kind in keys.items() if not isinstance(kind, str)]
    return f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"


# ---------------------------------------------------------------------- kinds of values


def is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def text(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """As it is written: `007` and `yes` stay what they are."""
    if not isinstance(node, yaml.ScalarNode):
        raise Unfit("must be text")
    return "" if is_null(node) else str(node.value)


def script(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """Shell lines; FedML also has them by system."""
    if isinstance(node, yaml.MappingNode):
        lines = {str(key.value): value for key, value in node.value}
        if "run_on_posix" not in lines:
            raise Unfit("has no `run_on_posix`: machines run Linux")
        return text(loader, lines["run_on_posix"])
    return text(loader, node)


def texts(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, str]:
    if is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise Unfit("must be a mapping")
    loader.flatten_mapping(node)
    return {str(key.value): text(loader, value) for key, value in node.value}


def whole(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    value = loader.construct_object(node, deep=True)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Unfit(f"must be a whole number, 0 or more, and is {node.value!r}")
    return value


def number(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    value = loader.construct_object(node, deep=True)
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or value < 0 or not math.isfinite(value):
        raise Unfit(f"must be a number, 0 or more, and is {node.value!r}")
    return float(value)


def flag(loader: yaml.SafeLoader, node: yaml.Node) -> bool:
    value = loader.construct_object(node, deep=True)
    if not isinstance(value, bool):
        raise Unfit(f"must be true or false, and is {node.value!r}")
    return value


def as_json(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """A free mapping, as JSON."""
    if is_null(node):
        return "{}"
    if not isinstance(node, yaml.MappingNode):
        raise Unfit("must be a mapping")
    try:
        value = loader.construct_object(node, deep=True)
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Unfit(f"holds what JSON cannot say: {error}") from error


def workspace_of(file: Path, found: Mapping[str, Any]) -> Path:
    folder = (file.parent / (found.get("workspace") or ".")).resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"{file}: the workspace {folder} is not a directory", "it is relative to the file"
        )
    return folder
