# SPDX-License-Identifier: Apache-2.0
"""What a task leaves in the place of its records is read only if it is a plain file of its own."""

import os
from pathlib import Path
from typing import cast

import pytest

from fedml_agent.errors import BrokerRefused
from fedml_agent.https import Https
from fedml_agent.records import FOLDER, Records, made_in
from fedml_protocol.blob import Blob
from fedml_protocol.records import FILE

NAME = "a" * 64


class FakeHttps:
    """Notes what is stored; refuses with `status` if it is set."""

    def __init__(self, status: int = 0) -> None:
        self.stored: list[bytes] = []
        self.status = status

    def store(self, file: Path, blob: Blob, *, again: bool = False) -> None:
        """As Https.store."""
        if self.status:
            raise BrokerRefused(self.status, "no")
        self.stored.append(file.read_bytes())


def _https(fake: FakeHttps) -> Https:
    return cast(Https, fake)


def test_records_are_read_from_where_the_broker_has_them(tmp_path: Path) -> None:
    folder = made_in(tmp_path)
    records = Records(tmp_path)
    assert (records.size(), records.read(0, 10)) == (0, (0, b"", 0))
    (folder / FILE).write_bytes(b"0123456789")
    assert (records.size(), records.read(4, 3)) == (10, (4, b"456", 0))


def test_no_link_and_no_pipe_is_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"key")
    folder = made_in(tmp_path)
    records, fake = Records(tmp_path), FakeHttps()
    (folder / FILE).symlink_to(secret)
    assert records.read(0, 10) == (0, b"", 0)
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    assert records.read(0, 10) == (0, b"", 0)
    (folder / NAME).symlink_to(secret)
    records.send(_https(fake), NAME)
    assert fake.stored == []
    assert records.files() == []
    assert secret.read_bytes() == b"key"


def test_an_artifact_is_removed_once_the_broker_has_it_or_never_wants_it(tmp_path: Path) -> None:
    folder = made_in(tmp_path)
    records = Records(tmp_path)
    (folder / NAME).write_bytes(b"x")
    (folder / ".1.2.new").write_bytes(b"half")
    assert records.files() == [NAME]
    with pytest.raises(BrokerRefused) as refused:
        records.send(_https(FakeHttps(507)), NAME)
    assert not refused.value.is_final
    assert records.files() == [NAME]
    fake = FakeHttps()
    records.send(_https(fake), NAME)
    assert (fake.stored, records.files()) == ([b"x"], [])
    (folder / NAME).write_bytes(b"other")
    records.send(_https(FakeHttps(422)), NAME)
    assert records.files() == []
    assert FOLDER in str(folder)
