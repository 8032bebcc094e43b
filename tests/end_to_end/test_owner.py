# SPDX-License-Identifier: Apache-2.0
"""The machine owner's say on real runs: what policy.toml promises is what happens."""

import json
import os
import pwd
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import confine
from tests.place import Agent, Place, command

# An agent on a machine that forbids some system calls: number, value of the first argument (or
# None), error. unshare(2) is namespaces, 444 is Landlock, prctl(PR_SET_SECCOMP) are filters.
X86 = os.uname().machine == "x86_64"
NAMESPACES = (272 if X86 else 97, None, 1)
LANDLOCK = (444, None, 95)
FORBID = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def forbid(number, first, error):
    argument = [(0x20, 0, 0, 16), (0x15, 0, 1, first)] if first is not None else []
    code = [(0x20, 0, 0, 0), (0x15, 0, len(argument) + 1, number), *argument]
    code += [(6, 0, 0, 0x50000 | error), (6, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    filter_ = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter_, 0, 0) == 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        yield place


def machine(place: Place, name: str, policy: str = "", *, without: tuple[Any, ...] = ()) -> Agent:
    """A machine that runs; jobs find it by its name as a label."""
    agent = place.agent(name, policy=policy, run=False)
    place.client.call("POST", f"/v1/devices/{agent.device}/labels", {"put": {"who": name}})
    if without:
        script = FORBID + "".join(f"forbid(*{one!r})\n" for one in without)
        script += "from fedml_agent.cli import main; main()"
        agent._words = [sys.executable, "-c", script, "run"]
    agent.start()
    return agent


def ends(place: Place, run: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The run at its end, and what it wrote."""
    text = {"stdout": "", "stderr": ""}
    for item in place.follow(run):
        if "log" in item:
            text[item["log"]["stream"]] += item["log"]["text"]
        if "end" in item:
            return item["end"], text
    raise AssertionError("the stream ended before the run")


def waiting(place: Place, run: str, says: str) -> str:
    """The reason for which a run waits."""
    return str(place.until(run, lambda item: says in item.get("waiting", ""))["waiting"])


def said(agent: Agent, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        command("fedml_agent", *words, "--json"),
        env={**os.environ, "FEDML_HOME": str(agent.home)},
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_job_is_ended_when_the_owners_time_is_over(place: Place) -> None:
    machine(place, "brief", '[tasks]\nrun_time = "1s"\n')
    run = place.launch("sleep 60", labels={"who": "brief"})
    end, _ = ends(place, run)
    assert end["state"] == "FAILED"
    assert "the machine's owner lets no task run longer" in end["cause"]["message"]


def test_a_stage_of_a_federated_run_is_ended_too(place: Place) -> None:
    machine(place, "hasty", '[tasks]\nrun_time = "2s"\n')
    run = place.federate(
        clients={"count": 1, "labels": {"who": "hasty"}}, rounds=1, config={"train_s": 60.0}
    )
    end, _ = ends(place, run)
    assert end["state"] == "FAILED"
    assert "the machine's owner lets no task run longer" in json.dumps(end["cause"])


def test_a_broken_policy_is_told_to_broker_and_owner_and_heals_by_itself(place: Place) -> None:
    agent = machine(place, "clumsy")
    place.finishes(place.launch("true", labels={"who": "clumsy"}))
    file = agent.home / "agent" / "policy.toml"
    file.write_text("[tasks]\ncomands = false\n")
    refusing = ""
    for _ in range(200):
        refusing = said(agent, "status")["agent"]["refusing"]
        if refusing:
            break
        place.wait(0.05)
    assert "policy.toml:2" in refusing

    run = place.launch("echo at last", labels={"who": "clumsy"})
    reason = waiting(place, run, "policy file cannot be used")
    assert "did you mean tasks.commands?" in reason
    found = {one["name"]: one for one in said(agent, "diagnose")["checks"]}
    assert found["policy"]["state"] == found["offers"]["state"] == "not ok"

    file.write_text("[tasks]\ncommands = true\nat_once = 1\n")
    assert place.finishes(run)
    # What the machine lets out now is known there too.
    for _ in range(100):
        capacity = place.client.call("GET", f"/v1/devices/{agent.device}")["capacity"]
        if capacity["slots"] == 1:
            break
        place.wait(0.1)
    assert capacity["slots"] == 1


def test_a_privacy_floor_that_cannot_be_met_refuses_with_the_reason(place: Place) -> None:
    machine(place, "strict", "privacy.max_epsilon = 2.0\n")
    run = place.federate(clients={"count": 1, "labels": {"who": "strict"}}, rounds=1)
    end, _ = ends(place, run)
    assert end["state"] == "FAILED"
    assert "privacy.max_epsilon" in end["cause"]["message"]
    assert "which federated runs cannot give yet" in end["cause"]["message"]
    place.finishes(place.launch("true", labels={"who": "strict"}))


def test_data_sets_are_for_federated_runs_and_logs_stay_for_the_owner(
    place: Place, tmp_path: Path
) -> None:
    data = tmp_path / "heart.csv"
    data.write_text("63,1,1")
    agent = machine(place, "ward", f'[data]\nheart = "{data}"\n')
    run = place.launch(f"cat {data}; echo done", labels={"who": "ward"})
    end, text = ends(place, run)
    assert end["state"] == "FINISHED"
    assert text["stdout"] == "done\n"

    app = """
import numpy as np
model = lambda config: {"w": np.zeros(1)}
def data(client, config):
    return open(client.paths["heart"]).read()
def train(model, data, config, rng):
    assert data == "63,1,1"
    return {"examples": 1}
"""
    run = place.federate(app, clients={"count": 1, "labels": {"who": "ward"}}, rounds=1)
    assert ends(place, run)[0]["state"] == "FINISHED"

    kept = agent.home / "agent" / "logs"
    for _ in range(100):
        names = sorted(path.name for path in kept.iterdir())
        if len(names) == 2:
            break
        place.wait(0.1)
    assert list((agent.home / "agent" / "tasks").iterdir()) == []
    assert [path.read_text() for path in kept.glob("*/out.0")] == ["done\n"]


def test_a_worker_cannot_make_the_agent_send_its_key(place: Place) -> None:
    agent = machine(place, "victim")
    key = agent.home / "agent" / "private" / "device.key"
    app = f"""
import os
import numpy as np
from fedml.federate import tensor_file
model = lambda config: {{"w": np.zeros(1)}}
data = lambda client, config: None
train = lambda model, data, config, rng: {{"examples": 1}}
write = tensor_file.write
def leave_a_link(path, arrays, **more):
    if str(path).endswith("update.safetensors"):
        os.symlink({str(key)!r}, path)
    else:
        write(path, arrays, **more)
tensor_file.write = leave_a_link
"""
    run = place.federate(app, clients={"count": 1, "labels": {"who": "victim"}}, rounds=2)
    end, _ = ends(place, run)
    assert end["state"] == "FAILED"
    assert "update.safetensors leads over a link" in json.dumps(end["cause"])
    secret = key.read_bytes()
    stored = [p for p in (place.home / "broker").rglob("*") if p.is_file()]
    assert not [path for path in stored if secret in path.read_bytes()]


def test_where_nothing_can_be_hidden_no_task_runs_until_the_owner_says_so(place: Place) -> None:
    agent = machine(place, "bare", without=(NAMESPACES, LANDLOCK))
    run = place.launch(
        f"cat {agent.home}/agent/private/device.key >/dev/null && echo read; echo ran",
        labels={"who": "bare"},
    )
    reason = waiting(place, run, "cannot lock tasks in")
    assert "no 'hide': no user namespaces here" in reason
    assert "Landlock" in reason
    assert "`fedml-agent diagnose` says what to do" in reason
    assert "cannot lock tasks in" in said(agent, "status")["agent"]["refusing"]
    device = place.client.call("GET", f"/v1/devices/{agent.device}")
    assert "no user namespaces" in device["hardware"]["sandbox"]["hide"]

    (agent.home / "agent" / "policy.toml").write_text("sandbox.require = []\n")
    end, text = ends(place, run)
    assert end["state"] == "FINISHED"
    assert text["stdout"] == "read\nran\n"
    assert "fedml: this machine gives tasks no protection 'hide': no user namesp" in text["stderr"]


@pytest.mark.skipif(confine.version() < 3, reason="needs a kernel with Landlock 3")
def test_without_namespaces_tasks_run_and_the_key_stays_hidden(place: Place) -> None:
    agent = machine(place, "container", without=(NAMESPACES,))
    key = agent.home / "agent" / "private" / "device.key"
    script = f"cat {key}; echo > {agent.home}/x; echo ran; echo mine > own; cat own"
    end, text = ends(place, place.launch(script, labels={"who": "container"}))
    assert end["state"] == "FINISHED"
    assert text["stdout"] == "ran\nmine\n"
    lines = text["stderr"].splitlines()
    assert lines[0].startswith("fedml: this machine gives tasks no protection 'pids'")
    assert "Permission denied" in next(line for line in lines if "no protection" not in line)
    assert {"pids"} <= set(said(agent, "status")["agent"]["sandbox_missing"]) <= {"pids", "cgroups"}

    app = """
import socket
import numpy as np
model = lambda config: {"w": np.zeros(1)}
data = lambda client, config: None
def train(model, data, config, rng):
    try:
        socket.socket(socket.AF_INET)
    except PermissionError:
        return {"examples": 1}
    raise AssertionError("it has a network")
"""
    run = place.federate(app, clients={"count": 1, "labels": {"who": "container"}}, rounds=2)
    end, _ = ends(place, run)
    assert end["state"] == "FINISHED", end["cause"]


REACH = """
python3 - <<'END'
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 3)
    print("through")
except OSError:
    print("cut off")
END
"""


def test_a_job_without_a_network_reaches_nobody_and_an_owner_can_insist(place: Place) -> None:
    machine(place, "island", "network.jobs = false\n")
    machine(place, "port")
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ask = REACH.format(port=server.server_address[1])
        for who, network, says in (
            ("port", "full", "through"),
            ("port", "none", "cut off"),
            ("island", "none", "cut off"),
        ):
            _, text = ends(place, place.launch(ask, network=network, labels={"who": who}))
            assert text["stdout"] == f"{says}\n", (who, network)
        server.shutdown()
    asks = place.launch(ask, labels={"who": "island"})
    assert "network.jobs" in waiting(place, asks, "may be: none (`network: none`")


SNOOP = """
id -u; touch mine && stat -c %u mine; echo "$HOME" > "$TMPDIR"/x && echo tmp
cat {home}/agent/private/device.key /etc/shadow /proc/{pid}/environ; ls {home}/agent/tasks
touch {home}/x; kill -0 {pid} && echo found the agent; true
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives jobs another user")
def test_jobs_of_an_agent_of_root_can_have_a_user_of_their_own() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # pytest's own directories are closed to others
        with Place(Path(folder)) as place:
            agent = machine(place, "root", 'sandbox.user = "nobody"\n')
            snoop = SNOOP.format(home=agent.home, pid=agent.pid)
            end, text = ends(place, place.launch(snoop, bootstrap="echo begins"))
            assert end["state"] == "FINISHED", (end["cause"], text)
            nobody = str(pwd.getpwnam("nobody").pw_uid)
            [task] = place.tasks(end["id"])
            assert text["stdout"].split("\n") == [
                "begins",
                nobody,
                nobody,
                "tmp",
                f"{task.id}.1",
                "",
            ]
            assert "/etc/shadow: Permission denied" in text["stderr"]
            for hidden in ("device.key", "environ"):
                assert f"{hidden}: No such file" in text["stderr"]

            (agent.home / "agent" / "policy.toml").write_text('sandbox.user = "no-such-user"\n')
            for _ in range(100):
                end = place.end(place.launch("true"))
                if end["state"] == "FAILED":
                    break
            assert "`useradd --system no-such-user`" in end["cause"]["message"]
            assert end["cause"]["fault"] == "machine"
