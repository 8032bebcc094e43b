# SPDX-License-Identifier: Apache-2.0
"""What steps of a workflow get from those before them: values in texts, files in packages. Pure.

``${{ steps.NAME.outputs.VALUE }}`` in a variable of a job, or in the configuration of a federated
run, is the value that the step NAME has left. ``inputs: {PATH: STEP}`` are all files that the step
has left, below PATH of the workspace; ``{PATH: STEP/FILE}`` is one of them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedml_broker.outputs import Outputs
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import File, Package, Part, parse

_REFERENCE = re.compile(r"\$\{\{(.*?)\}\}")
_WITHIN = re.compile(r"\s*steps\.([A-Za-z0-9_-]+)\.outputs\.([A-Za-z0-9_.-]+)\s*")

Left = Mapping[str, Outputs]


class Missing(Exception):
    """What a step is to get was not left by the other one; the text says what was."""


def used(texts: Iterator[str]) -> dict[str, str]:
    """The steps whose values stand in texts, each with a place that names it.

    Raises:
        MalformedMessage: Something between ``${{`` and ``}}`` that means nothing.
    """
    found = {}
    for text in texts:
        for reference in _REFERENCE.finditer(text):
            within = _WITHIN.fullmatch(reference[1])
            if within is None:
                raise MalformedMessage(
                    f"{reference[0]} means nothing: it is ${{{{ steps.NAME.outputs.VALUE }}}}"
                )
            found[within[1]] = reference[0]
    return found


def fill(text: str, left: Left) -> str:
    """A text with the values in their places.

    Raises:
        Missing: There is no such value.
    """

    def value(reference: re.Match[str]) -> str:
        within = _WITHIN.fullmatch(reference[1])
        if within is None:
            return reference[0]
        step, name = within.groups()
        values = left[step].values
        if name not in values:
            raise Missing(
                f"{reference[0]}: {step} has left no value {name}; {_listed('values', values)}"
            )
        return values[name]

    return _REFERENCE.sub(value, text)


def fill_json(config: str, left: Left) -> str:
    """The same in every text of a JSON object; what is nothing but a number becomes one."""

    def filled(text: str) -> Any:
        found = fill(text, left)
        if found != text and _REFERENCE.fullmatch(text.strip()):
            try:
                number = json.loads(found)
            except ValueError:
                return found
            return number if isinstance(number, int | float | bool) else found
        return found

    return json.dumps(_mapped(json.loads(config), filled))


def texts_in(config: str) -> Iterator[str]:
    """Every text in a JSON object, keys excepted."""
    left = [json.loads(config)]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def with_files(base: Package, wanted: Mapping[str, str], left: Left) -> Package:
    """A workspace and the files of other steps in it: their bytes are there already.

    Raises:
        Missing: A step has not left such a file, or the workspace has one at its place.
    """
    parts = list(base.parts)
    for path, source in wanted.items():
        step, _, file = source.partition("/")
        files = left[step].files
        chosen = {f"{path}/{name}": blob for name, blob in files.items()}
        if file:
            chosen = {path: files[file]} if file in files else {}
        if not chosen:
            what = f"no file {file}" if file else "no files"
            raise Missing(f"`inputs`: {step} has left {what}; {_listed('files', files)}")
        parts += [Part(b.sha256, (File(where, b.size),)) for where, b in chosen.items()]
    package = Package(tuple(parts), base.links)
    try:
        return parse(package.manifest())
    except MalformedMessage as error:
        raise Missing(f"`inputs` and the workspace do not go together: {error}") from error


def _listed(what: str, names: Mapping[str, object]) -> str:
    return f"its {what}: {', '.join(names)}" if names else f"it has left no {what} at all"
