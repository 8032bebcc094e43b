# SPDX-License-Identifier: Apache-2.0
"""The Python API, against a real broker and a real agent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import fedml
from fedml import api
from fedml.errors import BrokerRefused, BrokerUnreachable, ConfigError, NotLoggedIn, RunFailed
from tests.place import APP, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with one agent."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        yield place


@pytest.fixture
def home(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the admin is logged in, as FEDML_HOME says."""
    monkeypatch.setenv("FEDML_HOME", str(place.folder / "me"))
    return place.folder / "me"


@pytest.mark.usefixtures("home")
def test_a_job_is_launched_read_and_waited_for(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: echo hello; exit 3\njob_name: mine\n")
    run = api.launch(tmp_path / "job.yaml")
    assert "".join(run.logs(follow=True)) == "hello\n"
    assert (run.wait().state, run.exit_code, run.name, run.kind) == ("FAILED", 3, "mine", "launch")
    assert "exit code 3" in run.cause
    assert isinstance(run, fedml.Run)
    assert run.id in [found.id for found in api.run_list()]
    assert api.run_status(run.id) == "FAILED"
    assert "".join(api.run_logs(run.id)) == "hello\n"
    with pytest.raises(RunFailed, match="exit code 3"):
        api.run_wait(run.id, check=True)
    with pytest.raises(BrokerRefused, match="is a launched job: it has no model"):
        api.run_download(run.id, tmp_path / "model")


@pytest.mark.usefixtures("home")
def test_a_job_can_be_looked_at_before_it_is_launched(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: echo\ncomputing: {resource_type: T4}\n")
    before = [run.id for run in api.run_list()]
    (machine,) = api.launch_look(tmp_path / "job.yaml")["machines"]
    assert (machine["name"], machine["fits"]) == ("one", "never")
    found = api.launch_look(tmp_path / "job.yaml", any_resource=True)
    assert found["taken"] == machine["device"]
    assert [run.id for run in api.run_list()] == before
    assert api.launch(tmp_path / "job.yaml", any_resource=True).wait().state == "FINISHED"


@pytest.mark.usefixtures("home")
def test_a_run_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: echo begun; sleep 600\n")
    run = api.launch(tmp_path / "job.yaml")
    assert next(run.logs(follow=True)) == "begun\n"
    api.run_stop(run.id)
    assert run.wait().state == "STOPPED"
    assert run.ended


@pytest.mark.usefixtures("home")
def test_a_federated_run_has_metrics_and_models(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "run.yaml").write_text("app: app.py\nrounds: 2\nclients: {count: 1}\n")
    run = api.federate(tmp_path / "run.yaml").wait(check=True)
    losses = [metrics["devices.loss"] for metrics in run.metrics]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    moved: list[tuple[int, int]] = []
    into = tmp_path / "model.safetensors"
    assert run.download(into, told=lambda done, total: moved.append((done, total))) == 2
    assert moved[-1] == (into.stat().st_size, into.stat().st_size)
    assert load_file(into)["seen"].tolist() == [2.0]
    assert api.run_download(run.id, into, of_round=1) == 1
    assert load_file(into)["seen"].tolist() == [1.0]


@pytest.mark.usefixtures("home")
def test_the_traceback_of_the_task_is_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP.replace("x, y = data", "x, y = data[3]"))
    (tmp_path / "run.yaml").write_text("app: app.py\nrounds: 2\nclients: {count: 1}\n")
    with pytest.raises(RunFailed, match=r"(?s)IndexError.*x, y = data\[3\]"):
        api.federate(tmp_path / "run.yaml").wait(check=True)


@pytest.mark.usefixtures("home")
def test_devices_and_the_own_name_are_known() -> None:
    (device,) = api.device_list()
    assert isinstance(device, fedml.Device)
    assert (device.name, device.status, device.gpus) == ("one", "online", ())
    assert api.device_show("one").id == device.id
    assert api.whoami() == {"name": "admin", "role": "admin", "tenant": "default"}


def test_logging_in_and_out(place: Place, tmp_path: Path) -> None:
    token = (place.home / "broker" / "admin.key").read_text()
    with pytest.raises(NotLoggedIn):
        api.run_list(home=tmp_path)
    assert api.login(token, home=tmp_path) == place.client.url
    kept = tmp_path / "user" / "session.json"
    assert kept.stat().st_mode & 0o077 == 0
    api.run_list(home=tmp_path)
    api.logout(home=tmp_path)
    with pytest.raises(NotLoggedIn):
        api.run_list(home=tmp_path)
    with pytest.raises(ConfigError):
        api.login("no key", home=tmp_path)
    with pytest.raises(ConfigError):
        api.login(place.login_key, home=tmp_path)  # a machine's


def test_data_sets_are_listed_and_described(tmp_path: Path) -> None:
    names = [about.name for about in api.data_list(home=tmp_path)]
    assert "heart" in names
    assert not api.data_show("heart", home=tmp_path).present


def test_a_broker_that_is_not_there_any_more_is_unreachable(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.broker.stop()
        with pytest.raises(BrokerUnreachable) as caught:
            api.run_list(home=place.folder / "me")
    assert "fedml-broker up" in caught.value.hint
