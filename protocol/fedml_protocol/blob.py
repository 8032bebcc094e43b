# SPDX-License-Identifier: Apache-2.0
"""Bytes named by their content: they travel over HTTPS, only their names go over MQTT."""

from dataclasses import dataclass

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """Bytes by content: where they are is the broker's business."""

    sha256: str
    size: int = 0

    def __post_init__(self) -> None:
        check_sha256(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBlob:
    """One file that a task leaves behind."""

    name: str
    blob: Blob

    def __post_init__(self) -> None:
        if not self.name:
            raise MalformedMessage("an artifact needs a name")
