# SPDX-License-Identifier: Apache-2.0
"""`fedml build`: a package without a run, and a run of that package."""

import json
import tarfile

import pytest

from fedml import api
from fedml.errors import ConfigError
from tests.fedml.cli.conftest import Fedml
from tests.place import APP

JOB = "workspace: w\njob: ./run.sh\n"


def _job(fedml: Fedml, said: str) -> str:
    script = fedml.file("w/run.sh", f"#!/bin/sh\necho {said}\n")
    (fedml.folder / script).chmod(0o755)
    fedml.file("w/.gitignore", "*.log\n")
    fedml.file("w/x.log", "")
    return fedml.file("job.yaml", JOB)


def test_a_package_in_a_file_runs_as_it_was_when_it_was_built(fedml: Fedml) -> None:
    job = _job(fedml, "then")
    done = fedml("build", "job.yaml")
    assert done.stdout == "job.tar.gz\n"
    assert done.stderr.startswith("2 files, ")
    with tarfile.open(fedml.folder / "job.tar.gz") as archive:
        assert sorted(archive.getnames()) == [".gitignore", "run.sh"]
    _job(fedml, "now")
    assert fedml("launch", job, "--package", "job.tar.gz").stdout == "then\n"
    assert fedml("launch", job).stdout == "now\n"


def test_a_stored_package_runs_by_its_name_and_by_its_hash(fedml: Fedml) -> None:
    job = _job(fedml, "then")
    before = fedml("run", "list", "--json").stdout
    said = json.loads(fedml("train", "build", job, "--upload", "--name", "p/one", "--json").stdout)
    assert fedml("run", "list", "--json").stdout == before
    _job(fedml, "now")
    for package in ("p/one", said["sha256"]):
        assert fedml("launch", job, "--package", package).stdout == "then\n"
    fedml("storage", "upload", "job.yaml", "p/file")
    for package, why in (
        ("p/file", "no package"),
        ("p/none", "is not stored"),
        ("ab" * 32, "was not uploaded"),
        ("job.yaml", "no package"),
    ):
        code = 2 if why == "no package" else 6
        assert why in fedml("launch", job, "--package", package, code=code).stderr


def test_a_run_file_is_built_too_and_a_wrong_kind_is_named(fedml: Fedml) -> None:
    fedml.file("app.py", APP)
    run = fedml.file("run.yaml", "app: app.py\nclients: {count: 2}\nrounds: 1\n")
    fedml("federate", "build", run, "--dest_folder", "out")
    assert (fedml.folder / "out" / "run.tar.gz").is_file()
    fedml("build", run, "--upload")
    assert "run.yaml" in fedml("train", "build", run, code=2).stderr
    fedml("federate", run, "--package", "packages/run")


def test_a_job_without_a_workspace_has_nothing_to_pack(fedml: Fedml) -> None:
    job = fedml.file("job.yaml", "job: echo\n")
    assert "nothing to pack" in fedml("build", job, code=2).stderr
    assert "no --output" in fedml("build", job, "--upload", "-o", "x", code=2).stderr


def test_the_python_names_build_too(fedml: Fedml) -> None:
    job = _job(fedml, "x")
    assert api.build(job, fedml.folder / "a.tar.gz").read_bytes()
    made = api.train_build(job, fedml.folder / "new")
    assert made.read_bytes() == (fedml.folder / "a.tar.gz").read_bytes()
    fedml.file("conf/fedml_config.yaml", "x: 1\n")
    made = api.fedml_build(
        "octopus",
        "client",
        fedml.folder / "w",
        "run.sh",
        fedml.folder / "conf",
        fedml.folder,
        "*.l*",
    )
    assert made == fedml.folder / "dist-packages" / "client-package.tar.gz"
    with tarfile.open(made) as archive:
        names = [".gitignore", "config/fedml_config.yaml", "run.sh"]
        assert sorted(archive.getnames()) == names
    assert fedml("launch", job, "--package", str(made)).stdout == "x\n"
    with pytest.raises(ConfigError, match=r"no file main\.py"):
        api.fedml_build(
            "falcon", "client", fedml.folder / "w", "main.py", fedml.folder / "conf", "."
        )
