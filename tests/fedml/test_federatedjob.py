# SPDX-License-Identifier: Apache-2.0
"""FedML's jobs of `job_type: federate`: the run that each is, and what is said of the rest."""

import copy
import json
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedml import api, federatedjob, runfile
from fedml.errors import ConfigError
from fedml.federate.application import Application, ApplicationError, Client
from fedml.federatedjob import Started
from fedml.jobfile import read_job
from fedml.launch import read_run
from fedml.translation import Differs, scripts
from fedml.workflowfile import BadReference, make_step, read_workflow

CONFIG: dict[str, dict[str, Any]] = {
    "common_args": {"training_type": "cross_silo"},
    "data_args": {"dataset": "fashion-mnist"},
    "model_args": {"model": "lr"},
    "train_args": {
        "federated_optimizer": "FedAvg",
        "client_num_in_total": 3,
        "client_num_per_round": 2,
        "comm_round": 4,
        "batch_size": 10,
        "learning_rate": 0.03,
    },
}
BY_NAME = """
import fedml
from fedml import FedMLRunner

if __name__ == "__main__":
    args = fedml.init()
    device = fedml.device.get_device(args)
    dataset, output_dim = fedml.data.load(args)
    model = fedml.model.create(args, output_dim)
    runner = FedMLRunner(args, device, dataset, model)
    runner.run()
"""
OWN = """
import fedml
import numpy as np

class Trainer(fedml.core.ClientTrainer):
    def get_model_params(self):
        return self.model

    def set_model_params(self, model_parameters):
        self.model = model_parameters

    def train(self, train_data, device, args):
        self.model = {"w": self.model["w"] + 1}

class Aggregator(fedml.core.ServerAggregator):
    get_model_params, set_model_params = Trainer.get_model_params, Trainer.set_model_params

    def aggregate(self, raw_client_model_or_grad_list):
        return raw_client_model_or_grad_list[0][1]

    def test(self, test_data, device, args):
        return {}

args = fedml.init()
model = {"w": np.full(2, float(args.rank))}
dataset = [0, 0, [], None, {0: 5, 1: 5}, {0: [0], 1: [1]}, {}, 2]
trainer, aggregator = Trainer(model, args), None
fedml.FedMLRunner(args, None, dataset, model, trainer, aggregator).run()
"""
LINES = "python3 main.py --cf config/fedml_config.yaml --rank $FEDML_CLIENT_RANK --role client"


def _job(folder: Path, script: str = BY_NAME, config: Any = CONFIG, **said: Any) -> Path:
    """A job file with its workspace; a key that is None is left out."""
    space = folder / "space"
    (space / "config").mkdir(parents=True, exist_ok=True)
    (space / "config" / "fedml_config.yaml").write_text(yaml.safe_dump(config))
    (space / "main.py").write_text(script)
    keys = {"workspace": "space", "job": LINES, "job_type": "federate", **said}
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
    return file


def _quietly(file: Path, **how: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return federatedjob.read(file, **how)[0]


def _said(file: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federatedjob.read(file)
    return "\n".join(str(one.message) for one in caught)


# ---------------------------------------------------------------------- the run


def test_a_job_of_scripts_that_only_name_things_is_the_run_of_its_configuration(
    tmp_path: Path,
) -> None:
    request, workspace = federatedjob.read(_job(tmp_path))
    alone, named = read_run(tmp_path / "space" / "config" / "fedml_config.yaml")
    assert workspace == named
    assert request.pop("name") == "job"
    assert request.pop("needs") == {"gpus": 0}
    assert request["clients"].pop("labels") == {}
    assert request == {k: v for k, v in alone.items() if k != "name"}


def test_what_is_asked_of_machines_is_asked_of_each_client(tmp_path: Path) -> None:
    file = _job(
        tmp_path,
        job_name="mine",
        cluster="lab",
        labels={"site": "north"},
        computing={
            "minimum_num_gpus": 2,
            "resource_type": "A100-80G",
            "maximum_cost_per_hour": "$30",
            "cpus": 4,
        },
    )
    request = _quietly(file)
    assert request["name"] == "mine"
    assert request["cluster"] == "lab"
    assert request["clients"] == {"count": 3, "per_round": 2, "labels": {"site": "north"}}
    assert request["needs"] == {"gpus": 2, "gpu_model": "A100-80G", "cpus": 4}
    assert request["max_price_per_hour"] == 30.0


@pytest.mark.parametrize("kind", ["CPU", "hybrid"])
def test_machines_without_gpus_do_where_the_job_can_do_without(tmp_path: Path, kind: str) -> None:
    computing = {"minimum_num_gpus": 1, "resource_type": "T4", "device_type": kind}
    assert _quietly(_job(tmp_path, computing=computing))["needs"] == {"gpus": 0}


def test_scripts_of_their_own_go_along_with_all_that_they_find(tmp_path: Path) -> None:
    file = _job(
        tmp_path,
        OWN,
        environment_variables={"SITE": "north"},
        training_params={"learning_rate": 0.004},
        data={"rows.csv": "stored/rows.csv"},
    )
    request, workspace = federatedjob.read(file)
    assert workspace == tmp_path / "space"
    assert (request["app"], request["name"]) == ("fedml_script.py", "job")
    assert request["data"] == {"rows.csv": "stored/rows.csv"}
    assert (request["rounds"], request["algorithm"]) == (4, "fedavg")
    said = json.loads(request["files"]["fedml_script.json"])
    assert said["client"] == said["server"] == LINES.split()[1:]
    assert said["sections"] == CONFIG
    assert said["env"] == {"SITE": "north", "FEDML_ENV_TRAINING_PARAMS_LEARNING_RATE": "0.004"}


def test_the_only_configuration_of_a_workspace_need_not_be_named(tmp_path: Path) -> None:
    assert _quietly(_job(tmp_path, job="python3 main.py"))["rounds"] == 4


def test_an_expert_mode_names_script_and_configuration_too(tmp_path: Path) -> None:
    expert = {
        "executable_interpreter": "python3",
        "executable_file": "main.py",
        "executable_conf_option": "--cf",
        "executable_conf_file_folder": "config",
        "executable_conf_file": "fedml_config.yaml",
    }
    assert _quietly(_job(tmp_path, job=None, expert_mode=expert))["rounds"] == 4


@pytest.mark.parametrize(
    ("lines", "script", "config"),
    [
        ("python3 a.py --cf c.yaml --rank 0", "a.py --cf c.yaml --rank 0", "c.yaml"),
        ("python3 a.py --cf=c.yaml", "a.py --cf=c.yaml", "c.yaml"),
        ("python3 a.py \\\n  --cf 'my c.yaml'", "a.py --cf my c.yaml", "my c.yaml"),
        ("cd . && python -u src/a.py --cf c; echo b.py", "src/a.py --cf c", "c"),
        ("python prepare.py\npython a.py --cf c\npython after.py", "a.py --cf c", "c"),
        ("python a.py\npython b.py --x 1", "b.py --x 1", ""),
        ("python a.py --cf c > log.txt 2>&1", "a.py --cf c", "c"),
        ("python a.py --yaml_config_file c", "a.py --yaml_config_file c", "c"),
        ("# python a.py --cf c\necho it's\npython b.py --cf d # e", "b.py --cf d", "d"),
        ("mpirun -np 2 python a.py --cf c", "a.py --cf c", "c"),
        ("python a.py --cf c; bash after.sh --cf d", "a.py --cf c", "c"),
        ("python -m pkg.main --cf c", "", "c"),
        ("echo hello", "", ""),
        ("", "", ""),
    ],
)
def test_what_shell_lines_start_is_found(lines: str, script: str, config: str) -> None:
    found = Started.of(lines)
    assert (" ".join(found.script), found.config) == (script, config)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"server_job": "python3 main.py --cf other.yaml"}, "`server_job` other.yaml"),
        ({"job": "python3 main.py --cf conf/x.yaml"}, "there is no conf/x.yaml, which --cf names"),
        ({"job": "python3 mian.py"}, r"`job` starts mian.py, which is not in the workspace"),
        ({"server_job": "python3 server.py"}, "`server_job` starts server.py, which is not"),
        ({"job_subtype": "web"}, "`job_subtype` is 'web', .* browsers are no clients here"),
        ({"job_subtype": "smart_phone"}, "'smart_phone', .* phones are no clients here"),
        ({"job_subtype": "swarm"}, "`job_subtype` must be one of cross_silo, simulation, web"),
        ({"workspace": "nowhere"}, "nowhere is not a directory"),
        ({"serverjob": "x"}, "unknown key `serverjob`; did you mean `server_job`"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, said: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        federatedjob.read(_job(tmp_path, **said))


def test_a_workspace_without_or_with_several_configurations_says_what_to_write(
    tmp_path: Path,
) -> None:
    file = _job(tmp_path, job="python3 main.py")
    (tmp_path / "space" / "fedml_config.yaml").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"several: config/fedml_config\.yaml, fedml_config\.yaml"
    ):
        federatedjob.read(file)
    (tmp_path / "space" / "fedml_config.yaml").unlink()
    (tmp_path / "space" / "config" / "fedml_config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"has no fedml_config\.yaml") as caught:
        federatedjob.read(file)
    assert "--cf" in caught.value.hint


def test_a_script_that_an_ignore_file_leaves_out_is_refused(tmp_path: Path) -> None:
    file = _job(tmp_path, OWN)
    (tmp_path / "space" / ".gitignore").write_text("main.py\n")
    with pytest.raises(ConfigError, match="an ignore file leaves it out"):
        federatedjob.read(file)


def test_a_script_that_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"main\.py is no Python script: "):
        federatedjob.read(_job(tmp_path, "import fedml\nif:\n"))


def test_what_would_protect_somebody_is_refused_as_of_the_configuration(tmp_path: Path) -> None:
    config = {**CONFIG, "secure_aggregation_args": {"enable_sa": True}}
    for script in (BY_NAME, OWN):
        with pytest.raises(ConfigError, match=r"fedml_config\.yaml: `enable_sa`"):
            federatedjob.read(_job(tmp_path, script, config))


# ---------------------------------------------------------------------- warned


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"bootstrap": "pip install x"}, "a federated run installs nothing on machines"),
        ({"requirements": ["numpy"]}, "a federated run installs nothing on machines"),
        ({"environment_args": {"bootstrap": "x"}}, "`bootstrap` has no effect"),
        ({"secrets": {"TOKEN": "correct-horse"}}, "hands none to its machines"),
        ({"data": {"a": "b"}}, "the scripts only name data set and model"),
        ({"environment_variables": {"A": "b"}}, "the scripts only name data set and model"),
        ({"training_params": {"learning_rate": 0.004}}, "the configuration has `train_args`"),
        ({"num_nodes": 2}, "`client_num_in_total` of the configuration says"),
        ({"priority": "low"}, "does not queue"),
        ({"preemptible": True}, "does not queue"),
        ({"retries": 1}, "gets its part of a round again"),
        ({"restarts": 1}, "gets its part of a round again"),
        ({"deadline": 60}, "ends with its rounds"),
        ({"grace": 1}, "nothing to save"),
        ({"network": "none"}, "the owner of a machine says"),
        ({"service": {}}, "every machine has a worker of ours"),
        ({"containerize": True}, "every machine has a worker of ours"),
        ({"docker": {"image": "x"}}, "every machine has a worker of ours"),
        ({"fedml_env": {"federate_project_name": "x"}}, "there are no projects"),
        ({"framework_type": "fedml"}, "a job brings its own framework"),
    ],
)
def test_what_has_no_effect_is_named_with_the_reason(
    tmp_path: Path, said: dict[str, Any], why: str
) -> None:
    name = "bootstrap" if "environment_args" in said else next(iter(said))
    line = next(line for line in _said(_job(tmp_path, **said)).splitlines() if f"`{name}`" in line)
    assert "has no effect" in line
    assert why in line
    assert _said(_job(tmp_path)) == ""


def test_strict_refuses_to_leave_out_what_own_scripts_might_miss(tmp_path: Path) -> None:
    file = _job(tmp_path, OWN, bootstrap="pip install x")
    with pytest.warns(Differs, match="`bootstrap` has no effect"):
        federatedjob.read(file)
    with pytest.raises(ConfigError, match="`bootstrap` has no effect"):
        federatedjob.read(file, strict=True)
    federatedjob.read(_job(tmp_path, OWN), strict=True)
    # Scripts that are not run miss nothing.
    assert _quietly(_job(tmp_path, bootstrap="x"), strict=True)["rounds"] == 4


def test_lines_that_start_no_script_train_by_name_and_strict_refuses(tmp_path: Path) -> None:
    file = _job(tmp_path, job="bash run.sh --cf config/fedml_config.yaml")
    with pytest.warns(Differs, match="`job` starts no Python script"):
        assert federatedjob.read(file)[0]["rounds"] == 4
    with pytest.raises(ConfigError, match="`job` starts no Python script"):
        federatedjob.read(file, strict=True)


def test_a_stand_in_for_the_data_that_own_scripts_load_is_named(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["data_args"]["dataset"] = "cifar10"
    script = f"{BY_NAME}\nclass Mine: pass\n"
    with pytest.warns(Differs, match="`dataset`: cifar10 is in no package"):
        federatedjob.read(_job(tmp_path, script, config))
    with pytest.raises(ConfigError, match="`dataset`: cifar10 is in no package"):
        federatedjob.read(_job(tmp_path, script, config), strict=True)
    federatedjob.read(_job(tmp_path, OWN, config), strict=True)  # it never asks for that


def test_fedprox_with_a_trainer_of_ones_own_is_said_to_be_fedavg(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["train_args"] |= {"federated_optimizer": "FedProx", "fedprox_mu": 0.1}
    with pytest.warns(Differs, match="your ClientTrainer takes"):
        assert federatedjob.read(_job(tmp_path, OWN, config))[0]["algorithm"] == "fedavg"
    with pytest.raises(ConfigError, match="your ClientTrainer takes"):
        federatedjob.read(_job(tmp_path, OWN, config), strict=True)


# ---------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("script", "by_name", "trainer", "loads"),
    [
        (BY_NAME, True, False, True),
        ("import fedml\nfedml.run_cross_silo_client()\n", True, False, False),
        ("from fedml import run_cross_silo_server as go\ngo()\n", True, False, False),
        (OWN, False, True, False),
        (BY_NAME.replace("model)\n", "model, None)\n"), False, False, True),
        (BY_NAME.replace("model)\n", "model, client_trainer=args.t)\n"), False, True, True),
        (BY_NAME.replace("    model =", "    args.lr = 1\n    model ="), False, False, True),
        (BY_NAME.replace("fedml.data.load(args)", "load(args)"), False, False, False),
        (BY_NAME.replace("import fedml\n", "import fedml\nimport mine\n"), False, False, True),
        (f"{BY_NAME}\nclass Net: pass\n", False, False, True),
        (OWN.replace("args = ", 'own = fedml.data.load("heart")\nargs = '), False, True, False),
        ("", False, False, False),
    ],
)
def test_a_script_that_only_names_things_is_told_from_one_with_its_own(
    tmp_path: Path, script: str, by_name: bool, trainer: bool, loads: bool
) -> None:
    (tmp_path / "main.py").write_text(script)
    assert scripts.look(tmp_path / "main.py") == scripts.Look(by_name, trainer, loads)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that a script may change; afterwards it is as before."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("FEDML_CLIENT_RANK", "")
    return monkeypatch


def _packed(file: Path) -> Application:
    """The application of a job, as it is on a machine."""
    request, workspace = federatedjob.read(file)
    for name, text in request["files"].items():
        (workspace / name).write_text(text)
    return Application(workspace / request["app"], {})


@pytest.mark.usefixtures("here")
def test_a_packed_script_is_the_client_of_its_number_on_a_machine(tmp_path: Path) -> None:
    server = _packed(_job(tmp_path, OWN))
    assert server.first_model(0)["w"].tolist() == [0.0, 0.0]
    client = _packed(_job(tmp_path, OWN))
    part = client.data(Client(index=1, count=2, labels={}, paths={}))
    assert len(part) == 5
    assert client.first_model(0)["w"].tolist() == [2.0, 2.0]
    assert sys.argv[1:] == LINES.replace("$FEDML_CLIENT_RANK", "2").split()[2:]


@pytest.mark.usefixtures("here")
def test_an_algorithm_that_changes_steps_is_refused_by_a_trainer_that_nobody_saw(
    tmp_path: Path,
) -> None:
    client = _packed(_job(tmp_path, OWN))
    model = client.new_model(0)
    correction: Any = object()
    with pytest.raises(ApplicationError, match="which your ClientTrainer takes"):
        client.train(model, None, np.random.default_rng(0), correction)


@pytest.mark.usefixtures("here")
def test_hooks_of_an_aggregator_are_refused_when_the_server_script_runs(tmp_path: Path) -> None:
    script = OWN.replace("args), None\n", "args), Aggregator(model, args)\n")
    with pytest.raises(ApplicationError, match="its own aggregate"):
        _packed(_job(tmp_path, script)).first_model(0)


# ---------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize(
    ("said", "federated"),
    [
        ({}, True),
        ({"job_subtype": "cross_silo"}, True),
        ({"job_subtype": "web"}, True),
        ({"job_type": None, "task_type": "Federate"}, True),
        ({"job_subtype": "simulation"}, False),
        ({"job_type": "train"}, False),
        ({"job_type": None}, False),
    ],
)
def test_a_federated_job_is_told_from_others(
    tmp_path: Path, said: dict[str, Any], federated: bool
) -> None:
    assert runfile.is_federated(_job(tmp_path, **said)) is federated


def test_a_simulation_is_a_job_as_others_are(tmp_path: Path) -> None:
    file = _job(tmp_path, job_subtype="simulation", server_job="python3 main.py")
    with pytest.warns(UserWarning, match="`server_job` has no effect"):
        request, workspace = read_job(file)
    assert request["command"] == LINES
    assert workspace == tmp_path / "space"


def test_a_step_of_a_workflow_may_be_a_federated_job(tmp_path: Path) -> None:
    job = _job(tmp_path, OWN)
    inline = yaml.safe_load(job.read_text())
    flow = tmp_path / "flow.yaml"
    steps = {"a": {"job": "job.yaml"}, "b": {"federate": "job.yaml"}, "c": {"job": inline}}
    flow.write_text(yaml.safe_dump({"steps": steps}))
    _, found = read_workflow(flow)
    assert [step.kind for step in found] == ["federate"] * 3
    assert all("fedml_script.py" in step.request["files"] for step in found)
    with pytest.raises(BadReference, match="its step takes no `env`"):
        make_step("a", "job", job, env={"A": "b"})


def test_its_package_is_the_workspace_and_that_of_a_train_job_is_refused(tmp_path: Path) -> None:
    job = _job(tmp_path, OWN)
    into = api.federate_build(job, tmp_path / "out")
    with tarfile.open(into) as archive:
        assert sorted(archive.getnames()) == ["config/fedml_config.yaml", "main.py"]
    assert api.build(job, tmp_path / "same.tar.gz").read_bytes() == into.read_bytes()
    for build in (api.train_build, read_job):
        with pytest.raises(ConfigError, match="a federated run, not a job"):
            build(job)


def test_what_is_simulated_is_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a federated job") as caught:
        runfile.read_simulated(_job(tmp_path))
    assert "--cf" in caught.value.hint
