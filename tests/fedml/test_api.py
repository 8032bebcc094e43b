# SPDX-License-Identifier: Apache-2.0
"""`fedml.api`: FedML's names and what they return, against a real broker and a real agent."""

import logging
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


# ---------------------------------------------------------------------- FedML's


def test_every_name_of_fedmls_is_here_or_says_why_not() -> None:
    """The functions of `fedml/api/__init__.py` of release 0.9."""
    here = """
        fedml_login launch_job launch_job_on_cluster run_stop run_list run_status run_logs
        cluster_list cluster_exists cluster_status cluster_start cluster_startall cluster_stop
        cluster_stopall cluster_autostop cluster_kill cluster_killall upload download delete
        list_storage_objects get_storage_metadata get_storage_user_defined_metadata fedml_build
        train_build federate_build login logout resource_type fedml_logs fedml_diagnosis
    """
    for name in here.split():
        assert callable(getattr(api, name)), name
        assert name in api.__all__
    not_here = """
        model_create model_delete model_list model_package model_push model_pull model_deploy
        model_run endpoint_delete device_bind device_unbind
    """
    for name in not_here.split():
        assert not hasattr(api, name)
        with pytest.raises(AttributeError, match=r"no model cards|its own command"):
            getattr(api, name)


@pytest.mark.usefixtures("home")
def test_a_script_of_fedmls_launches_and_reads_its_job(tmp_path: Path) -> None:
    assert api.fedml_login()[0] == 0
    (tmp_path / "job.yaml").write_text("job: echo hello; exit 3\njob_name: mine\n")
    with pytest.warns(UserWarning, match="device_edges.*choose machines"):
        result = api.launch_job(str(tmp_path / "job.yaml"), device_edges=["1"])
    assert result.result_code == 0, result.result_msg
    assert result.run_id
    assert (result.project_id, result.inner_id) == (None, result.run_id)
    # FedML's examples look whether it is a number above zero, and go on with what they were given.
    assert result.run_id is not None
    assert int(result.run_id) > 0
    assert api.run_status(run_id=result.run_id)
    api.run_wait(result.run_id)
    logs = api.run_logs(result.run_id, page_num=1, page_size=100)
    assert (logs.run_status, logs.total_log_lines, logs.total_log_pages) == ("FAILED", 1, 1)
    assert logs.log_line_list == ["hello"]
    (run,) = api.run_list(run_name="mine").run_list
    assert (run.run_id, run.run_name, run.status) == (result.run_id, "mine", "FAILED")
    assert run.ended_time >= run.started_time > "2020"
    listed, status = api.run_status(run_id=result.run_id)
    assert (listed.run_list[0].run_id, status) == (result.run_id, api.RunStatus.FAILED)
    assert api.run_status(run_name="nobody's")[1] is api.RunStatus.UNDETERMINED
    assert api.run_list(run_id="r-00000000").run_list == []
    with pytest.raises(ValueError, match="count from 1"):
        api.run_logs(result.run_id, 0)


def test_what_cannot_be_launched_has_a_code_and_a_reason(home: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("jub: echo\n")
    result = api.launch_job(job)
    assert (result.result_code, result.run_id) == (17, None)
    assert "jub" in result.result_message
    job.write_text("job: echo\ncomputing: {resource_type: T4}\n")
    result = api.launch_job(job)
    assert result.result_code == 8
    assert "no machine can ever run this" in result.result_message
    assert api.launch_job(job, home=tmp_path).result_code == 20
    code, why = api.fedml_login(home=tmp_path)
    assert code == -1
    assert "not logged in" in why


@pytest.mark.usefixtures("home")
def test_a_run_is_stopped_and_is_killed_in_fedmls_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "job.yaml").write_text("job: echo begun; sleep 600\n")
    run = api.launch(tmp_path / "job.yaml")
    assert next(run.logs(follow=True)) == "begun\n"
    assert api.run_status(run_id=run.id)[1] == "RUNNING"
    assert api.run_stop(run.id)
    assert api.run_status(run_id=run.id)[1] in ("STOPPING", "KILLED")
    assert run.wait().state == "STOPPED"
    assert api.run_status(run_id=run.id)[1] == "KILLED"
    with caplog.at_level(logging.WARNING):
        assert not api.run_stop("r-00000000")
    assert "no such run" in caplog.text


@pytest.mark.usefixtures("home")
def test_clusters_by_fedmls_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "job.yaml").write_text("job: echo on it\n")
    assert not api.cluster_exists("lab")
    result = api.launch_job_on_cluster(tmp_path / "job.yaml", "lab")
    assert result.result_code == 0, result.result_msg
    api.run_wait(result.run_id or "", check=True)
    assert api.cluster_exists("lab")
    status, found = api.cluster_status("lab")
    assert (status, [c.cluster_name for c in found.cluster_list]) == ("up", ["lab"])
    assert api.cluster_stop("lab")
    assert api.cluster_list(("lab", "other")).cluster_list[0].status == "stopped"
    assert api.cluster_startall()
    assert api.cluster_autostop("lab", 30)
    assert api.cluster_show("lab").details["autostop_minutes"] == 30
    assert api.cluster_stopall()
    assert api.cluster_start(("lab",))
    with caplog.at_level(logging.WARNING):
        assert not api.cluster_kill(("lab", "other"))
    assert "other" in caplog.text
    assert not api.cluster_exists("lab")
    assert api.cluster_killall()
    with pytest.raises(BrokerRefused):
        api.cluster_status("lab")


def test_storage_answers_with_fedmls_responses(home: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x" * 1500)
    response = api.upload(
        tmp_path / "notes.txt", tag_list=["a"], description="mine", metadata={"from": "ward 3"}
    )
    assert response.code is api.ResponseCode.SUCCESS
    assert response.data.endswith("/v1/storage/notes.txt")
    (kept,) = api.list_storage_objects().data
    assert (kept.dataName, kept.size, kept.tags, kept.description) == (
        "notes.txt", "1.46 KB", ["a"], "mine",
    )  # fmt: skip
    assert api.get_storage_metadata("notes.txt").data == kept
    assert api.get_storage_user_defined_metadata("notes.txt").data["from"] == "ward 3"
    response = api.download("notes.txt", dest_path=tmp_path / "copy")
    assert Path(response.data).read_text() == "x" * 1500
    assert api.delete("notes.txt", "R2").data is True
    response = api.delete("notes.txt", "R2")
    assert (response.code, response.data) == (api.ResponseCode.FAILURE, False)
    assert "is not stored" in response.message
    assert api.upload(tmp_path / "none").code is api.ResponseCode.FAILURE


def test_a_key_is_good_for_one_call_without_a_login(place: Place, tmp_path: Path) -> None:
    key = (place.home / "broker" / "admin.key").read_text()
    assert api.cluster_list((), key, home=tmp_path).cluster_list == []
    assert api.connect(key, home=tmp_path).url == place.client.url
    with pytest.raises(NotLoggedIn):
        api.run_list(home=tmp_path)
    assert api.fedml_login(key[:-9], home=tmp_path)[0] == -1
    assert api.fedml_login(key, home=tmp_path) == (0, f"admin at {place.client.url}")
    assert api.run_list(home=tmp_path)


@pytest.mark.usefixtures("home")
def test_the_newest_log_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("job: echo newest\n")
    api.launch(tmp_path / "job.yaml").wait()
    api.fedml_logs()
    assert capsys.readouterr().out == "newest\n"


# ---------------------------------------------------------------------- ours


@pytest.mark.usefixtures("home")
def test_a_job_can_be_looked_at_before_it_is_launched(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: echo\ncomputing: {resource_type: T4}\n")
    before = api.run_list()
    (machine,) = api.launch_look(tmp_path / "job.yaml")["machines"]
    assert (machine["name"], machine["fits"]) == ("one", "never")
    found = api.launch_look(tmp_path / "job.yaml", any_resource=True)
    assert found["taken"] == machine["device"]
    assert [r.run_id for r in api.run_list().run_list] == [r.run_id for r in before.run_list]
    assert api.launch(tmp_path / "job.yaml", any_resource=True).wait().state == "FINISHED"


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
    assert api.resource_type() == []


def test_logging_in_and_out(place: Place, tmp_path: Path) -> None:
    token = (place.home / "broker" / "admin.key").read_text()
    with pytest.raises(NotLoggedIn):
        api.run_list(home=tmp_path)
    assert api.login(token, home=tmp_path) == place.client.url
    kept = tmp_path / "user" / "session.json"
    assert kept.stat().st_mode & 0o077 == 0
    assert kept.read_text() not in repr(api.connect(home=tmp_path))
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
        (tmp_path / "job.yaml").write_text("job: echo\n")
        assert api.launch_job(tmp_path / "job.yaml", home=place.folder / "me").result_code == 10
    assert "fedml-broker up" in caught.value.hint
