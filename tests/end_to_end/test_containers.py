# SPDX-License-Identifier: Apache-2.0
"""Jobs in containers, run by the Podman and the Docker of this machine on Debian's busybox.

Skipped where the engine, `busybox-static` or the right to make containers is missing;
CONTRIBUTING.md says what to install. Docker's daemon is one of our own, in a folder of the test.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socketserver
import subprocess
import tarfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedml.errors import BrokerRefused
from tests.end_to_end.test_owner import ends, machine, waiting
from tests.place import Place

IMAGE = "localhost/busybox:1"
BUSYBOX = Path("/bin/busybox")
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
TOOLS = (
    "sh",
    "cat",
    "echo",
    "env",
    "id",
    "kill",
    "ls",
    "nc",
    "ps",
    "setsid",
    "sleep",
    "touch",
    "true",
)
POLICY = """
[containers]
allow = true
images = ["localhost/*"]
mounts = ["/usr/share/zoneinfo"]
"""

pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed")


class Box:
    """An engine with a store of its own; `env`: what makes its command, and an agent, use that."""

    def __init__(
        self,
        name: str,
        env: dict[str, str],
        restart: Callable[[signal.Signals], None] | None = None,
    ) -> None:
        self.name, self.env, self.restart = name, env, restart

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.name, *words], env={**os.environ, **self.env}, capture_output=True, text=True
        )

    def running(self) -> list[str]:
        return self("ps", "--all", "--format={{.Names}}").stdout.split()

    def clear(self) -> None:
        for name in self.running():
            self("rm", "--force", name)


@contextlib.contextmanager
def podman(folder: Path) -> Iterator[Box]:
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    # crun before 1.9 works with no mixture of control groups; runc does.
    runtime = 'runtime = "runc"\n' if shutil.which("runc") else ""
    (folder / "containers.conf").write_text(
        f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n{runtime}'
    )
    env = {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
    }
    yield Box("podman", env)


@contextlib.contextmanager
def docker(folder: Path) -> Iterator[Box]:
    """A daemon without networks of its own: jobs have the machine's or none."""
    if os.geteuid() != 0:
        pytest.skip("Docker's daemon wants root")
    words = ["dockerd", f"--host=unix://{folder}/sock", f"--data-root={folder}/data"]
    words += [f"--exec-root={folder}/exec", f"--pidfile={folder}/pid", "--storage-driver=vfs"]
    words += ["--iptables=false", "--bridge=none"]
    daemons: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def start() -> str:
        """The daemon's last words, if it does not serve."""
        daemon = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert daemon.stderr is not None
        said = ""
        for line in daemon.stderr:
            said = line
            if "API listen on" in line:
                break
        drain = threading.Thread(target=daemon.stderr.read)
        drain.start()
        daemons.append((daemon, drain))
        return "" if "API listen on" in said else said

    def end(how: signal.Signals) -> None:
        daemon, drain = daemons.pop()
        daemon.send_signal(how)
        daemon.wait(30)
        drain.join(30)
        assert daemon.stderr is not None
        daemon.stderr.close()

    def restart(how: signal.Signals) -> None:
        end(how)
        if how == signal.SIGKILL:  # a daemon does not find the way to the containerd of a dead one
            pid = (folder / "exec" / "containerd" / "containerd.pid").read_text()
            containerd = psutil.Process(int(pid))
            containerd.kill()
            containerd.wait(10)
        assert start() == ""

    try:
        if said := start():
            pytest.skip(f"Docker's daemon does not start here: {said[-300:]}")
        # Without Podman on it, as on a machine where only Docker is installed.
        (folder / "bin").mkdir()
        for part in reversed(os.environ["PATH"].split(":")):
            for program in Path(part).glob("*"):
                (folder / "bin" / program.name).unlink(missing_ok=True)
                (folder / "bin" / program.name).symlink_to(program)
        (folder / "bin" / "podman").unlink(missing_ok=True)
        env = {"DOCKER_HOST": f"unix://{folder}/sock", "PATH": f"{folder}/bin"}
        yield Box("docker", env, restart)
    finally:
        while daemons:
            end(signal.SIGTERM)
        # They stay mounted when a daemon ends, and then nobody can remove the folder.
        for left in ("exec/netns/default", "data"):
            subprocess.run(["umount", f"{folder}/{left}"], capture_output=True)


ENGINES = {"podman": podman, "docker": docker}


@pytest.fixture(scope="module", params=ENGINES)
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """An engine with a store of images of our own; the image is in it."""
    name = request.param
    program = {"podman": "podman", "docker": "dockerd"}[name]
    if shutil.which(program) is None or shutil.which(name) is None:
        pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp(name)
    (folder / "root" / "bin").mkdir(parents=True)
    (folder / "root" / "tmp").mkdir()
    shutil.copy(BUSYBOX, folder / "root" / "bin" / "busybox")
    for tool in TOOLS:
        (folder / "root" / "bin" / tool).symlink_to("busybox")
    with tarfile.open(folder / "root.tar", "w") as tar:
        tar.add(folder / "root", ".")
    with ENGINES[name](folder) as box:
        made = box("import", str(folder / "root.tar"), IMAGE)
        if made.returncode:
            pytest.skip(f"{name} cannot make an image here: {made.stderr[-300:]}")
        ran = box("run", "--rm", "--network=none", *LIMITS, IMAGE, "true")
        if ran.returncode:
            pytest.skip(f"{name} cannot run a container here: {ran.stderr[-300:]}")
        yield box
        box.clear()
        box("rmi", "--force", IMAGE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, box: Box) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in box.env.items():
            patch.setenv(name, value)
        with Place(tmp_path_factory.mktemp("place")) as place:
            machine(place, "boxes", POLICY)
            yield place


def job(place: Place, command: str, image: str = IMAGE, **more: Any) -> str:
    container = {"image": image, **more.pop("container", {})}
    return place.launch(command, container=container, labels={"who": "boxes"}, **more)


def printed(place: Place, run: str, text: str) -> None:
    place.until(run, lambda item: text in item.get("log", {}).get("text", ""), logs=True)


def test_a_job_runs_in_its_image_with_its_files_and_sees_nothing_of_the_agent(
    place: Place, box: Box
) -> None:
    home = place.agents["boxes"].home
    command = f"""
pwd; echo "$FROM_BOOTSTRAP $GREETING $FEDML_WORKSPACE"; ls /bin/busybox; ls /etc/ssl
ls {home}; ls /usr/share/zoneinfo/UTC; touch /usr/share/zoneinfo/x; touch here && echo wrote
exit 5
"""
    container = {"mounts": [{"source": "/usr/share/zoneinfo", "target": "/usr/share/zoneinfo"}]}
    run = job(
        place,
        command,
        bootstrap="FROM_BOOTSTRAP=yes",
        env={"GREETING": "hello you"},
        container=container,
    )
    end, text = ends(place, run)
    assert end["exit_code"] == 5, (end, text)
    assert end["cause"]["message"] == "its command ended with exit code 5"
    out, err = text["stdout"].splitlines(), text["stderr"]
    assert out == [
        "/workspace",
        "yes hello you /workspace",
        "/bin/busybox",
        "/usr/share/zoneinfo/UTC",
        "wrote",
    ]
    for denied in ("/etc/ssl: No such", f"{home}: No such", "zoneinfo/x: Read-only"):
        assert denied in err
    assert box.running() == []


def test_a_bootstrap_that_fails_keeps_the_job_from_running(place: Place) -> None:
    end, text = ends(place, job(place, "echo never", bootstrap="return 3"))
    assert (end["exit_code"], text["stdout"]) == (3, "")


def test_a_job_in_a_container_has_the_network_of_the_machine_or_none(place: Place) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ask = f"nc 127.0.0.1 {server.server_address[1]} < /dev/null && echo through || echo cut off"
        for network, says in (("full", "through"), ("none", "cut off")):
            _, text = ends(place, job(place, ask, network=network))
            assert text["stdout"] == f"{says}\n"
        server.shutdown()


def test_a_stop_is_a_term_to_all_of_it_and_a_signal_is_told_as_one(place: Place, box: Box) -> None:
    tidy = "trap 'echo tidied; exit 0' TERM; echo up; while true; do sleep 0.1; done"
    run = job(place, tidy)
    printed(place, run, "up")
    place.client.call("POST", f"/v1/runs/{run}/stop")
    end, text = ends(place, run)
    assert (end["state"], text["stdout"]) == ("STOPPED", "up\ntidied\n")
    deaf = job(place, "trap '' TERM; echo up; while true; do sleep 0.1; done", grace_s=0.3)
    printed(place, deaf, "up")
    place.client.call("POST", f"/v1/runs/{deaf}/stop")
    assert place.end(deaf)["state"] == "STOPPED"
    end = place.end(job(place, "kill -SEGV $$"))
    assert "it was ended by SIGSEGV" in end["cause"]["message"]
    assert box.running() == []


def test_a_fork_bomb_in_a_container_ends_with_its_time(place: Place, box: Box) -> None:
    bomb = "b() { b | b & }; b; sleep 100"
    end = place.end(job(place, bomb, deadline_s=1.0, grace_s=0.1))
    assert "it ran longer than its 1 s" in end["cause"]["message"]
    assert box.running() == []
    those = psutil.process_iter(["cmdline"])
    assert not [one for one in those if bomb in (one.info["cmdline"] or ())]


def test_a_container_outlives_its_agent_and_dies_with_its_shim(place: Place, box: Box) -> None:
    agent = place.agents["boxes"]
    run = job(place, "echo up; while [ ! -e go ]; do sleep 0.1; done; echo went; exit 4")
    printed(place, run, "up")
    agent.kill()
    [work] = (agent.home / "agent" / "tasks").glob("*/work")
    (work / "go").touch()
    agent.start()
    end, text = ends(place, run)
    assert (end["exit_code"], text["stdout"]) == (4, "up\nwent\n")

    run = job(place, "echo up; sleep 1000", retries=0)
    printed(place, run, "up")
    [shim] = (agent.home / "agent" / "tasks").glob("*/shim.json")
    os.kill(json.loads(shim.read_text())["shim"]["pid"], signal.SIGKILL)
    end = place.end(run)
    assert (end["state"], end["cause"]["fault"]) == ("LOST", "machine")
    assert box.running() == []


def test_what_nobody_knows_any_more_is_ended_when_the_agent_starts(place: Place, box: Box) -> None:
    agent = place.agents["boxes"]
    label = f"--label=org.fedml.agent={agent.device}"
    for name, mine in (("stray", [label]), ("anothers", [])):
        words = ["run", "--detach", f"--name={name}", *mine, *LIMITS, "--network=none"]
        assert box(*words, IMAGE, "sleep", "1000").returncode == 0
    agent.kill()
    agent.start()
    for _ in range(100):
        if "stray" not in box.running():
            break
        place.wait(0.1)
    assert box.running() == ["anothers"]
    box("rm", "--force", "anothers")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_that_is_restarted_is_the_machines_fault_and_no_jobs(
    place: Place, box: Box, how: signal.Signals
) -> None:
    if box.restart is None:
        pytest.skip("Podman has no daemon")
    run = job(place, "echo up; sleep 1000", retries=0)
    printed(place, run, "up")
    box.restart(how)
    end = place.end(run)
    assert (end["state"], end["cause"]["fault"]) == ("LOST", "machine"), end
    assert "Docker's daemon" in end["cause"]["message"]
    # With the same exit codes, and by themselves.
    for command in ("exit 125", "kill -KILL $$", "exit 143"):
        end = place.end(job(place, command))
        assert (end["state"], end["cause"]["fault"]) == ("FAILED", "task"), end


def test_an_image_that_nobody_has_is_told_in_the_engines_words(place: Place) -> None:
    end = place.end(job(place, "true", "localhost/no-such-image:1", retries=0))
    assert "the image localhost/no-such-image:1 cannot be had: " in end["cause"]["message"]


def test_what_the_owner_does_not_let_in_is_refused_with_the_setting(place: Place) -> None:
    other = job(place, "true", "python:3.12")
    assert "containers.images" in waiting(place, other, "docker.io/library/python:3.12")
    container = {"mounts": [{"source": "/etc", "target": "/data"}]}
    assert "/etc to read" in waiting(
        place, job(place, "true", container=container), "containers.mounts"
    )


def test_a_machine_without_containers_says_so_to_who_launches(place: Place, box: Box) -> None:
    machine(place, "bare")
    with pytest.raises(BrokerRefused, match=r"bare: runs no containers: its owner lets none run"):
        place.launch("true", container={"image": IMAGE}, labels={"who": "bare"})
    found = place.client.call("GET", f"/v1/devices/{place.agents['boxes'].device}")
    assert found["capacity"]["engine"].startswith(f"{box.name} ")


def test_a_password_is_not_shown_again(place: Place) -> None:
    container = {"username": "ana", "password": "open sesame"}
    run = job(place, "true", container=container)
    place.finishes(run)
    assert "open sesame" not in json.dumps(place.client.call("GET", f"/v1/runs/{run}"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only an agent of root gives jobs another user")
def test_the_user_that_an_owner_gives_to_jobs_is_the_one_in_the_container(place: Place) -> None:
    machine(place, "modest", POLICY + '[sandbox]\nuser = "nobody"\n')
    run = place.launch(
        "id -u; touch mine && echo wrote", container={"image": IMAGE}, labels={"who": "modest"}
    )
    end, text = ends(place, run)
    assert end["state"] == "FINISHED", (end["cause"], text)
    assert text["stdout"] == f"{pwd.getpwnam('nobody').pw_uid}\nwrote\n"


def test_what_a_job_in_a_container_records_and_leaves_arrives(place: Place) -> None:
    record = '{"kind": "metrics", "at": 1.0, "step": 0, "metrics": {"loss": 0.5}}'
    run = job(
        place,
        f"echo '{record}' >> $FEDML_MLOPS_DIR/records.ndjson; echo best=0.5 >> $FEDML_OUTPUT; "
        "echo bytes > $FEDML_OUTPUT_DIR/model",
    )
    place.finishes(run)
    (series,) = place.client.call("GET", f"/v1/runs/{run}/metrics")["series"]
    assert (series["name"], series["points"][0][:2]) == ("loss", [0, 0.5])
    left = place.client.call("GET", f"/v1/runs/{run}")["outputs"]
    assert left["values"] == {"best": "0.5"}
    assert [file["path"] for file in left["files"]] == ["model"]


def test_a_service_in_a_container_answers_at_the_machines_address(place: Place) -> None:
    command = 'busybox mkdir -p www && echo > www/ready && exec busybox httpd -f -p "$PORT" -h www'
    run = job(place, command, service={"path": "/ready", "within_s": 60})
    item = place.until(run, lambda item: item.get("event", {}).get("kind") == "answers")
    with urllib.request.urlopen(f"{item['event']['data']['url']}/ready") as answer:
        assert answer.status == 200
    place.client.call("POST", f"/v1/runs/{run}/stop")
    assert place.end(run)["state"] == "STOPPED"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap wants root")
def test_debian_itself_is_an_image(place: Place, box: Box, tmp_path: Path) -> None:
    root = tmp_path / "root"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3-minimal", "stable", str(root)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"there is no mirror of Debian's to be had: {made.stdout[-300:]}")
    with tarfile.open(tmp_path / "debian.tar", "w") as tar:
        tar.add(root, ".", filter=lambda one: None if one.isdev() else one)
    image = "localhost/debian:1"
    taken = box("import", str(tmp_path / "debian.tar"), image)
    assert taken.returncode == 0, taken.stderr
    command = """
. /etc/os-release; echo "$ID"; python3 -c 'print(sum(range(5)))'; id -u; apt-get --version >&2
dpkg -l > /var/tmp/list && echo writes
"""
    end, text = ends(place, job(place, command, image=image, container={"image": image}))
    assert end["exit_code"] == 0, text
    assert text["stdout"].splitlines() == ["debian", "10", "0", "writes"]
