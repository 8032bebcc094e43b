# SPDX-License-Identifier: Apache-2.0
"""The embedded MQTT endpoint against its targets, and against Mosquitto in the same run.

    python benchmarks/mqtt_endpoint.py             # about a minute
    python benchmarks/mqtt_endpoint.py --quick     # ten seconds, rougher

Endpoint and Mosquitto run in processes of their own; only the CPU time (user + system) of those
processes is counted, never the load generator's. Echo: each client publishes 200 B QoS 1 messages
to a topic that it subscribes to itself, at most `WINDOW` unacknowledged, over plain TCP; both sides
alternate and the median counts. Durable: a stored session's queue, PUBACK after the commit.
"""

import argparse
import asyncio
import os
import platform
import random
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import mqtt5
import psutil

from fedml_broker.identity import Identity
from fedml_broker.mqtt.endpoint import Endpoint, Limits

CLIENTS, WINDOW, PAYLOAD = 8, 20, b"x" * 200


# --- the servers ------------------------------------------------------------------------------


async def _serve(path: Path, tls: bool) -> None:
    """The endpoint alone, open to everybody; its port goes to stdout."""
    endpoint = Endpoint(
        path,
        authenticate=lambda packet, certificate: packet.client_id,
        may_publish=lambda identity, topic: True,
        may_subscribe=lambda identity, topic_filter: True,
        limits=Limits(max_queued_messages=1_000_000, max_queued_bytes=1 << 30),
        ssl_context=Identity.open(path.parent / "identity").mqtt_context() if tls else None,
    )
    async with endpoint:
        print(endpoint.port, flush=True)
        await asyncio.Event().wait()


@contextmanager
def embedded(folder: Path, *, tls: bool = False) -> Iterator[tuple[psutil.Process, int]]:
    """An endpoint process on the folder's `mqtt.db`, and its port."""
    command = [sys.executable, __file__, "--serve", str(folder / "mqtt.db")]
    command += ["--tls"] if tls else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def mosquitto(folder: Path) -> Iterator[tuple[psutil.Process, int]]:
    """A Mosquitto process with its stock settings but for the queue lengths, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
        "max_inflight_messages 64\nmax_queued_messages 0\n"
    )
    with subprocess.Popen(["mosquitto", "-c", config], stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid), port
        finally:
            process.kill()


# --- the load ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Client:
    """A raw MQTT 5 client that is cheap enough to keep a server busy.

    Attributes:
        acked: Packet identifiers of its own messages that were acknowledged, in order.
        payloads: What it received.
    """

    port: int
    name: str
    expiry_s: int = 0
    acknowledge: bool = True
    tls: ssl.SSLContext | None = None
    acked: list[int] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    published: int = 0
    present: bool = False

    def __post_init__(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                opened = socket.create_connection(("127.0.0.1", self.port), timeout=10)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "the server does not listen"
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = (
            opened
            if self.tls is None
            else self.tls.wrap_socket(opened, server_hostname="localhost")
        )
        self.rest = b""
        connect = mqtt5.ConnectPacket(self.name, session_expiry_interval=self.expiry_s)
        self.socket.sendall(connect.write())
        answer = self._one()
        assert isinstance(answer, mqtt5.ConnAckPacket)
        assert answer.reason_code == 0, answer
        self.present = answer.session_present

    def subscribe(self, topic_filter: str) -> None:
        wish = mqtt5.TopicFilter(topic_filter, max_qos=mqtt5.QoS.AT_LEAST_ONCE)
        self.socket.sendall(mqtt5.SubscribePacket(1, [wish]).write())
        assert isinstance(self._one(), mqtt5.SubAckPacket)

    def publish(self, topic: str, count: int, payload: bytes = PAYLOAD) -> None:
        """Send `count` messages at once."""
        frames = []
        for _ in range(count):
            self.published += 1
            frames.append(_publish(topic, self.published % 0xFFFF + 1, payload))
        self.socket.sendall(b"".join(frames))

    def read(self) -> tuple[int, int]:
        """Take what has come; how many of the own messages were acknowledged, how many arrived."""
        data = self.rest + self.socket.recv(1 << 18)
        if not data:
            raise ConnectionResetError("closed by the server")
        at, end, acks, came, answers = 0, len(data), 0, 0, []
        while end - at >= 4:
            length, body = data[at + 1], at + 2
            if length > 127:
                length, body = length & 127 | data[at + 2] << 7, at + 3
            if body + length > end:
                break
            if data[at] >> 4 == 4:
                assert length == 2, f"refused with reason 0x{data[body + 2]:02X}"
                acks += 1
                self.acked.append(data[body] << 8 | data[body + 1])
            elif data[at] >> 4 == 3:
                came += 1
                after = body + 2 + (data[body] << 8 | data[body + 1])
                answers.append(b"\x40\x02" + data[after : after + 2])
                self.payloads.append(data[after + 3 : body + length])
            at = body + length
        self.rest = data[at:]
        if answers and self.acknowledge:
            self.socket.sendall(b"".join(answers))
        return acks, came

    def _one(self) -> mqtt5.Packet:
        """Exactly one packet (of less than 128 bytes): what follows it is for `read`."""
        head = self._exactly(2)
        packet, _ = mqtt5.read(memoryview(head + self._exactly(head[1])))
        return packet

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError("closed by the server")
            data += more
        return data


def _publish(topic: str, packet_id: int, payload: bytes) -> bytes:
    return mqtt5.PublishPacket(
        topic, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=packet_id
    ).write()


def echo(port: int, messages: int, window: int = WINDOW) -> None:
    """Every client publishes to itself until it has had its share of the messages back."""
    clients = [Client(port, f"echo-{n}") for n in range(CLIENTS)]
    share = messages // CLIENTS
    with selectors.DefaultSelector() as selector:
        state = {client: [window, 0, 0] for client in clients}  # sent, acknowledged, came back
        for client in clients:
            client.subscribe(f"fed/1/t/d/{client.name}/up/task")
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.publish(f"fed/1/t/d/{client.name}/up/task", window)
        while state:
            for key, _ in selector.select(timeout=10):
                client = key.data
                acks, came = client.read()
                counts = state[client]
                counts[1] += acks
                counts[2] += came
                more = min(min(counts[1], counts[2]) + window - counts[0], share - counts[0])
                if more > 0:
                    client.publish(f"fed/1/t/d/{client.name}/up/task", more)
                    counts[0] += more
                client.payloads.clear()
                if counts[1] >= share and counts[2] >= share:
                    selector.unregister(client.socket)
                    client.socket.close()
                    del state[client]


def fill(port: int, messages: int, topic: str) -> float:
    """Publish to a stored session's topic from several clients; messages per second."""
    clients = [Client(port, f"fill-{n}") for n in range(CLIENTS)]
    share = messages // CLIENTS
    began = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.publish(topic, WINDOW)
        while clients:
            for key, _ in selector.select(timeout=10):
                client = key.data
                acks, _ = client.read()
                more = min(acks, share - client.published)
                if more > 0:
                    client.publish(topic, more)
                if len(client.acked) >= share:
                    selector.unregister(client.socket)
                    client.socket.close()
                    clients.remove(client)
    return share * CLIENTS / (time.perf_counter() - began)


# --- the measurements -------------------------------------------------------------------------


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def echo_cpu_us(process: psutil.Process, port: int, messages: int, window: int = WINDOW) -> float:
    before = cpu_s(process)
    echo(port, messages, window)
    return (cpu_s(process) - before) / messages * 1e6


def durable_rates(port: int, messages: int) -> tuple[float, float]:
    """Messages per second into the queue of an absent and of a present subscriber."""
    absent = Client(port, "absent", expiry_s=3600)
    absent.subscribe("durable/absent")
    absent.socket.close()
    queued = fill(port, messages, "durable/absent")
    reader = subprocess.Popen([sys.executable, __file__, "--read", str(port)], stdout=-1)
    assert reader.stdout is not None
    reader.stdout.readline()
    try:
        return queued, fill(port, messages, "durable/present")
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()


def read_for_ever(port: int) -> None:
    present = Client(port, "present", expiry_s=3600)
    present.subscribe("durable/present")
    print("ready", flush=True)
    while True:
        present.read()
        present.payloads.clear()


def idle_mb(
    process: psutil.Process, port: int, count: int, tls: ssl.SSLContext | None = None
) -> float:
    """Growth of the process for a thousand connections that have subscribed and say nothing."""
    Client(port, "first", tls=tls).socket.close()
    before = process.memory_info().rss
    clients = [Client(port, f"idle-{n}", tls=tls) for n in range(count)]
    for client in clients:
        client.subscribe(f"fed/1/t/d/{client.name}/dn/#")
    grown = process.memory_info().rss - before
    for client in clients:
        client.socket.close()
    return grown / 1e6 * 1000 / count


def lost_on_kill(folder: Path, kills: int) -> tuple[int, int]:
    """Acknowledged messages and how many of them were lost over several `kill -9`."""
    acknowledged: set[bytes] = set()
    received: set[bytes] = set()
    rng = random.Random(os.getpid())
    for round_ in range(kills + 1):
        with embedded(folder) as (process, port):
            keeper = Client(port, "keeper", expiry_s=3600)
            if round_ == 0:
                keeper.subscribe("kept")
            else:
                assert keeper.present, "the session itself was lost"
            while len(acknowledged - received) > 0:
                keeper.read()
                received.update(keeper.payloads)
                keeper.payloads.clear()
            keeper.socket.close()
            if round_ == kills:
                break
            publisher = Client(port, "publisher")
            sent: dict[int, bytes] = {}
            until = rng.randrange(200, 2000)
            while len(publisher.acked) < until:
                room = WINDOW - (publisher.published - len(publisher.acked))
                for _ in range(room):
                    payload = f"{round_}:{publisher.published}".encode()
                    publisher.publish("kept", 1, payload)
                    sent[publisher.published % 0xFFFF + 1] = payload
                publisher.read()
            os.kill(process.pid, signal.SIGKILL)
            acknowledged.update(sent[packet_id] for packet_id in publisher.acked)
    return len(acknowledged), len(acknowledged - received)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tls", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        asyncio.run(_serve(chosen.serve, chosen.tls))
        return
    if chosen.read:
        read_for_ever(chosen.read)
        return
    messages, rounds, idle = (16_000, 1, 300) if chosen.quick else (80_000, 5, 1000)
    ours: list[float] = []
    theirs: list[float] = []
    single: list[float] = []
    their_single: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with embedded(folder) as (process, port):
            echo(port, messages // 10)
            if shutil.which("mosquitto"):
                with mosquitto(folder) as (peer, peer_port):
                    echo(peer_port, messages // 10)
                    for _ in range(rounds):
                        ours.append(echo_cpu_us(process, port, messages))
                        theirs.append(echo_cpu_us(peer, peer_port, messages))
                        single.append(echo_cpu_us(process, port, messages // 4, 1))
                        their_single.append(echo_cpu_us(peer, peer_port, messages // 4, 1))
            else:
                ours = [echo_cpu_us(process, port, messages) for _ in range(rounds)]
                single = [echo_cpu_us(process, port, messages // 4, 1) for _ in range(rounds)]
            queued, present = durable_rates(port, messages // 4)
        (folder / "mqtt.db").unlink()
        with embedded(folder) as (process, port):
            grown = idle_mb(process, port, idle)
        context = Identity.open(folder / "identity").client_context()
        with embedded(folder, tls=True) as (process, port):
            grown_tls = idle_mb(process, port, idle, context)
        acked, lost = lost_on_kill(folder, 2 if chosen.quick else 6)
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"mqtt5 {version('mqtt5')}, SQLite {sqlite3.sqlite_version}\n")
    print(f"{'':54}{'target':>10}{'measured':>10}")
    median = statistics.median
    rows = [
        (f"CPU us a message, 200 B QoS 1 echo, window {WINDOW}", "<= 15", f"{median(ours):.1f}"),
        ("  the same, Mosquitto", "", f"{median(theirs):.1f}" if theirs else "-"),
        ("CPU us a message, one at a time", "", f"{median(single):.1f}"),
        ("  the same, Mosquitto", "", f"{median(their_single):.1f}" if theirs else "-"),
        ("durable messages/s, subscriber absent", ">= 3000", f"{queued:.0f}"),
        ("durable messages/s, subscriber present", ">= 3000", f"{present:.0f}"),
        ("MB for 1,000 idle subscribed connections", "<= 40", f"{grown:.1f}"),
        ("  the same with TLS", "<= 40", f"{grown_tls:.1f}"),
        (f"lost of {acked} acknowledged messages, kill -9", "0", f"{lost}"),
    ]
    for what, target, measured in rows:
        print(f"{what:54}{target:>10}{measured:>10}")


if __name__ == "__main__":
    main()
