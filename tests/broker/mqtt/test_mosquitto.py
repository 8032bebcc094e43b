# SPDX-License-Identifier: Apache-2.0
"""The Mosquitto configuration: what it says, and that a real Mosquitto does it."""

import stat
from pathlib import Path
from typing import Any

import pytest

from fedml_broker.mqtt.mosquitto import ACCESS, Mosquitto
from tests.broker.mqtt.backends import External
from tests.broker.mqtt.certificates import Authority

FILES: dict[str, Any] = {
    "ca_file": Path("/ca.pem"),
    "cert_file": Path("/c.pem"),
    "key_file": Path("/c.key"),
}


def test_it_speaks_tls_with_certificates_only_and_has_explicit_limits(tmp_path: Path) -> None:
    lines = Mosquitto(port=8883, **FILES).configuration(tmp_path).splitlines()
    assert "listener 8883 127.0.0.1" in lines
    for line in (
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        "max_queued_messages 1000",
        "persistence true",
    ):
        assert line in lines
    assert not any(line.startswith("crlfile") for line in lines)
    revoked = Mosquitto(port=1, revocations_file=Path("/revoked.pem"), **FILES)
    assert "crlfile /revoked.pem" in revoked.configuration(tmp_path)


def test_the_folder_is_private(tmp_path: Path) -> None:
    config = Mosquitto(port=8883, **FILES).write(tmp_path / "mosquitto")
    assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
    assert (config.parent / ACCESS).read_text().endswith("pattern read fed/1/%u/dn/#\n")


@pytest.mark.parametrize(
    "client", ["a\ntopic readwrite #", "acme/d/+", "#", " a", "", "a\0b"], ids=repr
)
def test_no_name_can_add_a_line_or_a_wildcard(client: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        Mosquitto(port=1, groups={client: ["x"]}, **FILES).access_list()


async def test_group_members_hear_their_group_and_nobody_else_does(
    authority: Authority, tmp_path: Path
) -> None:
    async with External(authority, tmp_path) as backend:
        member = await backend.device("acme/d/member")
        stranger = await backend.device("acme/d/stranger")
        for device in (member, stranger):
            await device.subscribe("fed/1/acme/g/trainers/dn")
        await backend.post.publish("fed/1/acme/g/trainers/dn", b"to all")
        assert await member.take(1) == [b"to all"]
        await stranger.silent()
        assert await member.publish("fed/1/acme/g/trainers/dn", b"forged") == 0x87
