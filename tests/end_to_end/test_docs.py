# SPDX-License-Identifier: Apache-2.0
"""What README and pages show is run as it stands there, on a broker and agents of the test.

`block` finds a code block by a line before it or by its first words; a test replaces no more than
the names that a page makes up: a key, a run, a port.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fedml.jobfile import read_job
from fedml.runfile import read_federated
from tests.place import APP, Place

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(
    not FASHION.exists(), reason="dataset-fashion-mnist is not installed"
)


def block(page: str, wanted: str) -> str:
    """The one code block of a page that contains `wanted`."""
    found = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    (text,) = [text for text in found if wanted in text]
    return text


def _env(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "FEDML_HOME"}
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", **more}


def _bash(script: str, folder: Path, env: Mapping[str, str]) -> str:
    """Run a block as a person would; what it prints."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder,
        env=dict(env),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with three machines; its admin is logged in at its own home."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        for name in ("ward-1", "ward-2", "ward-3"):
            place.agent(name)
        key = place.home / "broker" / "admin.key"
        _bash(f"fedml login - < {key}", place.folder, _env(FEDML_HOME=str(place.home)))
        yield place


@pytest.fixture
def env(place: Place) -> dict[str, str]:
    """Where `fedml` and `fedml-broker` both find what they need."""
    return _env(FEDML_HOME=str(place.home))


# ---------------------------------------------------------------------- README


def test_the_readme_by_hand_leads_from_nothing_to_a_job(tmp_path: Path) -> None:
    lines = block("README.md", "fedml-broker up  ").splitlines()
    commands = [line.partition("#")[0].strip() for line in lines if line.strip()]
    assert commands.pop(0).startswith("pip install")
    up, login, run, me, launch = commands
    (tmp_path / "job.yaml").write_text(block("README.md", "echo"))
    env = _env(HOME=str(tmp_path))
    started: list[subprocess.Popen[str]] = []
    try:
        # Free ports, so that tests can run beside each other.
        broker = subprocess.Popen(
            [*up.split(), "--https-port=0", "--mqtt-port=0"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(broker)
        assert broker.stderr is not None
        said = iter(broker.stderr.readline, "")
        key = next(found[1] for line in said if (found := re.search(r"login (fedml\S+)", line)))
        _bash(login.replace("KEY", key), tmp_path, env)
        started.append(subprocess.Popen(run.split(), env=env, stderr=subprocess.DEVNULL))
        _bash(me, tmp_path, env)
        assert _bash(launch, tmp_path, env).startswith("hello from ")
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            if process.stderr is not None:
                process.stderr.close()
            process.wait(20)


def test_the_readmes_run_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(block("README.md", "def model"))
    (tmp_path / "run.yaml").write_text(block("README.md", "app: task.py"))
    compile((tmp_path / "task.py").read_text(), "task.py", "exec")
    request, _ = read_federated(tmp_path / "run.yaml")
    assert (request["rounds"], request["clients"]) == (10, {"count": 3})


# ---------------------------------------------------------------------- docs/deploy.md


def test_the_service_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "serve.yaml").write_text(block("docs/deploy.md", "# serve.yaml"))
    assert read_job(tmp_path / "serve.yaml")[0]["service"] == {"path": "/ready"}


def test_what_the_page_deploys_is_asked_by_its_other_step(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "page.yaml").write_text(block("docs/deploy.md", "steps:"))
    _bash("fedml workflow run page.yaml", tmp_path, env)
    assert _bash("fedml workflow logs page ask", tmp_path, env).strip().endswith("200")
    said = json.loads(_bash("fedml workflow status page --json", tmp_path, env))
    (serve,) = [step for step in said["steps"] if step["name"] == "serve"]
    _bash(f"fedml run stop {serve['run']} --wait", tmp_path, env)


# ---------------------------------------------------------------------- docs/launch.md


def test_the_job_file_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "requirements.txt").write_text("numpy==2.4.6\n")
    (tmp_path / "job.yaml").write_text(block("docs/launch.md", "workspace: src"))
    request, workspace = read_job(tmp_path / "job.yaml")
    assert workspace == tmp_path / "src"
    assert (request["needs"], request["labels"]) == ({"gpus": 1}, {"site": "north"})
    assert request["requirements"] == "numpy==2.4.6\n"


def test_launching_and_looking_as_the_page_says(env: dict[str, str], tmp_path: Path) -> None:
    said = _bash(block("docs/launch.md", "--detach"), tmp_path, env)
    assert said.startswith("hello from ")  # what `fedml launch init` has written
    said = _bash(block("docs/launch.md", "--dry-run "), tmp_path, env)
    assert said.startswith("MACHINE")
    assert "hello from " in said
    (tmp_path / "job.yaml").write_text("job: echo hello\n")
    _bash(block("docs/launch.md", "fedml device list"), tmp_path, env)
    shown = subprocess.run(
        [sys.executable, "-c", block("docs/launch.md", "fedml.Run.submit")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("hello\nFINISHED 0\nward-1 online ()")


def test_logging_in_and_out_as_the_page_says(place: Place, tmp_path: Path) -> None:
    key = (place.home / "broker" / "admin.key").read_text()
    script = block("docs/launch.md", "fedml whoami").replace("KEY", key)
    assert "admin" in _bash(script, tmp_path, _env(HOME=str(tmp_path)))


# ---------------------------------------------------------------------- docs/api.md


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("or a run file", "hello\nFINISHED 0\n"),
        ("asyncio.run", "hello\n"),
        ("cluster.kill()", ""),
        ("api.launch_job", "FINISHED 1 ['hello']\n"),
    ],
)
def test_the_programs_of_the_page_run(
    env: dict[str, str], tmp_path: Path, wanted: str, said: str
) -> None:
    (tmp_path / "job.yaml").write_text("job: echo hello\n")
    (tmp_path / "program.py").write_text(block("docs/api.md", wanted))
    assert _bash(f"{sys.executable} -W error program.py", tmp_path, env) == said


def test_a_job_looks_after_itself_without_a_login_as_the_page_says(
    place: Place, env: dict[str, str], tmp_path: Path
) -> None:
    other = place.launch("true")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own.py").write_text(block("docs/api.md", "Run.current()"))
    (tmp_path / "code" / "others.py").write_text(
        "from fedml import Run, api\n"
        "print(api.whoami()['role'])\n"
        f"try:\n    Run.find({other!r})\n"
        "except Exception as error:\n    print(error)\n"
        "Run.current().stop()\n"
        "Run.current().wait()\n"
    )
    (tmp_path / "job.yaml").write_text(
        f"workspace: code\njob_name: own\njob: |\n"
        f"  echo epoch 1; echo $FEDML_RUN_API_KEY\n"
        f"  {sys.executable} own.py; {sys.executable} -u others.py\n"
    )
    done = subprocess.run(
        ["fedml", "launch", "job.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["epoch 1", "***FEDML_RUN_API_KEY***", "own RUNNING"], done.stderr
    assert lines[4] == "run"
    assert lines[5].startswith("a job's key is for its own run: this is that of r-")
    assert "the job itself stops the run" in done.stderr


# ---------------------------------------------------------------------- docs/workflow.md


def test_the_workflows_of_the_page_run_as_it_says(env: dict[str, str], tmp_path: Path) -> None:
    page = "docs/workflow.md"
    said = _bash(block(page, "fedml workflow init"), tmp_path, env)
    assert "report   job" in said  # what `fedml workflow init` has written, drawn
    assert said.count("report FINISHED r-") == 1
    app = APP + "\n_train = train\ndef train(model, data, config, rng):\n"
    app += "    assert config['rate'] == 0.1\n    return _train(model, data, config, rng)\n"
    (tmp_path / "app.py").write_text(app)
    (tmp_path / "run.yaml").write_text("app: app.py\nrounds: 1\nclients: {count: 2}\n")
    (tmp_path / "prepare.yaml").write_text('job: echo rate=0.1 >> "$FEDML_OUTPUT"\n')
    (tmp_path / "heart.yaml").write_text(block(page, "needs: [prepare]"))
    drawing = block(page, "$ fedml workflow show").partition("\n")[2]
    assert _bash("fedml workflow show heart.yaml", tmp_path, env) == drawing
    told = _bash("fedml workflow run heart.yaml", tmp_path, env)
    assert told.splitlines()[-1] == "sorry SKIPPED: all that it needs has finished"
    script = block(page, "fedml workflow list").replace("fedml workflow delete w-1c0ffee123", "")
    said = _bash(script, tmp_path, env)
    assert "heart (w-" in said
    shown = subprocess.run(
        [sys.executable, "-c", block(page, "from fedml.workflow")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "{'rate': '0.1'} JobStatus.FINISHED\n", shown.stderr


# ---------------------------------------------------------------------- docs/federate.md


def _few(text: str) -> str:
    """The page's run with as many machines and rounds as a test can afford."""
    for old, new in (
        ("rounds: 20", "rounds: 2"),
        ("count: 10, per_round: 5", "count: 3, per_round: 2"),
        ("minimum: 4", "minimum: 2"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@needs_fashion
def test_the_complete_file_of_the_page_trains_on_real_data(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text(block("docs/federate.md", "def central"))
    (tmp_path / "run.yaml").write_text(_few(block("docs/federate.md", "app: task.py")))
    (command,) = re.findall(
        r"^fedml federate run\.yaml --json", block("docs/federate.md", "federate run.yaml"), re.M
    )
    items = [json.loads(line) for line in _bash(command, tmp_path, env).splitlines()]
    run = items[0]["run"]
    ended = [i["event"]["data"] for i in items if i.get("event", {}).get("kind") == "round_ends"]
    accuracy = [data["metrics"]["central.accuracy"] for data in ended]
    assert accuracy[0] == pytest.approx(0.1)
    assert accuracy[2] > 0.5
    scripts = (
        block("docs/federate.md", "fedml run download").replace("--round 10", "--round 1"),
        block("docs/launch.md", "fedml run wait").replace("model.safe", "other.safe"),
    )
    for script in scripts:
        _bash(script.replace("r-1c0ffee123", run), tmp_path, env)
    first, last = (load_file(tmp_path / f"{name}.safetensors")["w"] for name in ("model", "other"))
    assert first.shape == last.shape == (784, 10)
    assert (first != last).any()


@needs_fashion
def test_the_fashion_mnist_example_learns_from_uneven_clients(
    env: dict[str, str], tmp_path: Path
) -> None:
    folder = ROOT / "examples" / "fashion_mnist"
    text = (folder / "run.yaml").read_text()
    for old, new in (
        ("app: clothes.py", f"app: clothes.py\nworkspace: {folder}"),
        ("rounds: 20", "rounds: 3"),
        ("{lr: 0.1, alpha: 0.5}", "{lr: 0.1, alpha: 0.5, examples: 1500}"),
        ("{count: 10, per_round: 5}", "{count: 3}"),
        ("every: 5", "every: 1"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "run.yaml").write_text(text)
    shown = subprocess.run(
        [sys.executable, "-c", block("docs/federate.md", "api.federate")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert float(shown.stdout) > 0.6
    assert load_file(tmp_path / "model.safetensors")["b"].shape == (10,)
    run = json.loads(_bash("fedml run list --limit 1 --json", tmp_path, env))[0]["id"]
    rounds = json.loads(_bash(f"fedml run show {run} --json", tmp_path, env))["rounds"]
    losses = [r["metrics"]["devices.loss"] for r in rounds[:4]]
    assert losses[3] < losses[0]


# ---------------------------------------------------------------------- data, administration


def test_data_as_the_page_says(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    env = _env(FEDML_HOME=str(pytestconfig.cache.mkdir("fedml-data")))
    fetch = block("docs/data.md", "fedml data list")
    done = subprocess.run(["bash", "-ec", fetch], env=env, capture_output=True, text=True)
    if done.returncode == 8 and "could not download" in done.stderr and "CI" not in os.environ:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "heart " in done.stdout
    code = block("docs/data.md", "data.describe")
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path)


def test_administration_as_the_page_says(place: Place, env: dict[str, str], tmp_path: Path) -> None:
    _bash(
        block("docs/broker.md", "fedml-broker status").partition("fedml-broker doctor")[0],
        tmp_path,
        env,
    )
    key = json.loads(_bash("fedml-broker keys create --json", tmp_path, env))["id"]
    _bash(block("docs/broker.md", "fedml-broker keys revoke").replace("KEY-ID", key), tmp_path, env)
    run = place.launch("true")
    place.end(run)
    _bash(
        block("docs/broker.md", "fedml-broker runs remove").replace(" RUN", f" {run}"),
        tmp_path,
        env,
    )
    backup = block("docs/broker.md", "fedml-broker backup").replace("/backup/", f"{tmp_path}/")
    _bash(backup, tmp_path, env)
    assert len(list(tmp_path.glob("fedml-*.tar.gz"))) == 1
    audit = block("docs/broker.md", "fedml-broker audit list")
    anchor = _bash("fedml-broker audit head", tmp_path, env).strip()
    told = _bash(audit.replace("HASH", anchor), tmp_path, env)
    assert "backup.create" in told
    assert told.endswith("is the anchor: nothing up to it was changed or is missing\n")
    _bash(block("docs/prometheus.md", "users create scraper"), tmp_path, env)
    assert re.fullmatch("[0-9a-f]{48}\n", (tmp_path / "fedml-token").read_text())
    name = place.agent("ward-9", run=False).name
    script = block("docs/broker.md", "fedml-broker devices revoke").replace("ward-3", name)
    # A machine is revoked or removed; the page shows both.
    _bash(script, tmp_path, env)
    assert "ward-9" not in _bash("fedml-broker devices list", tmp_path, env)


# ---------------------------------------------------------------------- docs/agent.md


def test_looking_at_an_agent_as_the_page_says(place: Place, tmp_path: Path) -> None:
    env = _env(FEDML_HOME=str(place.agents["ward-1"].home), HOME=str(tmp_path))
    (tmp_path / ".fedml" / "agent").mkdir(parents=True)
    status, hardware, diagnose = (
        line
        for line in block("docs/agent.md", "fedml-agent status").splitlines()
        if not line.startswith("fedml-agent run")
    )
    for line in (status, hardware, diagnose):
        assert _bash(line, tmp_path, env), line
    for line in block("docs/agent.md", "fedml-agent policy show").splitlines():
        # What a policy refuses is told by the exit code, too.
        done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
        assert done.returncode in (0, 1), f"{line}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert (tmp_path / ".fedml" / "agent" / "policy.toml").stat().st_size > 0
