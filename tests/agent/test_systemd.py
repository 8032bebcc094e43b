# SPDX-License-Identifier: Apache-2.0
"""What systemd hears, at a real datagram socket in its place."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml_agent import systemd


@pytest.fixture(params=["path", "abstract"])
def init(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The socket at which systemd listens, and what it writes into NOTIFY_SOCKET for it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@fedml-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if name.startswith("@") else name)
        listener.settimeout(10)
        yield listener, name


def test_each_word_is_one_datagram(init: tuple[socket.socket, str]) -> None:
    listener, name = init
    env = {"NOTIFY_SOCKET": name}
    assert systemd.ready(env=env)
    assert systemd.ready("2 GPUs", env=env)
    assert systemd.status("running 3 tasks: é", env=env)
    assert systemd.alive(env=env)
    assert systemd.stopping("draining", env=env)
    assert [listener.recv(4096).decode() for _ in range(5)] == [
        "READY=1",
        "READY=1\nSTATUS=2 GPUs",
        "STATUS=running 3 tasks: é",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=draining",
    ]


def test_the_environment_of_the_process_counts_by_default(init: tuple[socket.socket, str]) -> None:
    listener, name = init
    code = "from fedml_agent import systemd; print(systemd.ready(), systemd.watchdog_interval_s())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "15.0"]
    assert listener.recv(4096) == b"READY=1"


def test_a_status_cannot_smuggle_in_another_assignment(init: tuple[socket.socket, str]) -> None:
    listener, name = init
    assert systemd.status("task failed\nSTOPPING=1\r\nx", env={"NOTIFY_SOCKET": name})
    assert listener.recv(4096) == b"STATUS=task failed STOPPING=1 x"
    with pytest.raises(ValueError, match="one line each"):
        systemd.notify("STATUS=a\nREADY=1", env={"NOTIFY_SOCKET": name})


@pytest.mark.parametrize(
    "env",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "vsock:2:1"}],
)
def test_without_systemd_nothing_is_told_and_nothing_fails(env: dict[str, str]) -> None:
    assert not systemd.ready(env=env)
    assert not systemd.status("x", env=env)


def test_a_systemd_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    assert not systemd.alive(env={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert not systemd.alive(env={"NOTIFY_SOCKET": "/" + "x" * 200})


def test_a_systemd_that_does_not_read_cannot_hang_the_agent(
    init: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "_FULL_SOCKET_S", 0.01)
    told = 0
    while systemd.alive(env={"NOTIFY_SOCKET": init[1]}):
        told += 1
    assert told > 0
    init[0].recv(4096)
    assert systemd.alive(env={"NOTIFY_SOCKET": init[1]})


@pytest.mark.parametrize(
    ("env", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(
    env: dict[str, str], interval: float | None
) -> None:
    assert systemd.watchdog_interval_s(env=env) == interval
