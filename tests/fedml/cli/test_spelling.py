# SPDX-License-Identifier: Apache-2.0
"""What people who come from FedML type is understood, and not offered."""

from pathlib import Path

from tests.fedml.cli.conftest import Fedml


def test_options_and_verbs_with_underscores(fedml: Fedml) -> None:
    job = fedml.file("job.yaml", "job: echo hello\ncomputing: {resource_type: T4}\n")
    assert fedml("launch", job, "--any_resource").stdout == "hello\n"
    assert fedml("device", "resource_type").stdout.startswith("TO ASK FOR")
    assert "resource-type" not in fedml("device", "--help").stdout


def test_a_run_is_named_by_an_option_too(fedml: Fedml) -> None:
    run = fedml.place.launch("true")
    fedml("run", "wait", "-r", run)
    assert fedml("run", "status", "--run_id", run).stdout == "FINISHED\n"
    assert fedml("run", "status", run).stdout == "FINISHED\n"
    assert "Missing argument 'RUN'" in fedml("run", "status", code=2).stderr
    assert "RUN twice" in fedml("run", "status", run, "-r", run, code=2).stderr
    assert "--run" not in fedml("run", "status", "--help").stdout


def test_a_key_is_good_for_one_command(fedml: Fedml, tmp_path: Path) -> None:
    key = (fedml.place.home / "broker" / "admin.key").read_text().strip()
    none = tmp_path / "none"
    assert "admin" in fedml("whoami", "--api_key", key, home=none).stdout
    assert fedml("run", "list", "-k", key, home=none).stdout.startswith("RUN")
    fedml("run", "list", code=3, home=none)
    assert "not a user's key" in fedml("run", "list", "-k", "abc", code=2, home=none).stderr


def test_what_is_not_here_says_why(fedml: Fedml) -> None:
    assert "there are no model cards" in fedml("model", "deploy", "x", code=2).stderr


def test_what_another_program_does_here_is_named(fedml: Fedml) -> None:
    assert "`fedml-agent login KEY`" in fedml("device", "bind", "KEY", "-c", code=2).stderr
    assert "`fedml-agent logout`" in fedml("device", "unbind", code=2).stderr


def test_a_machine_that_would_join_as_with_fedml_is_told_how(fedml: Fedml) -> None:
    for option in ("-c", "--compute_node", "-s", "-p"):
        assert "`fedml-agent login KEY`" in fedml("login", "KEY", option, code=2).stderr


def test_platforms_versions_and_groups_have_no_effect_and_are_named(fedml: Fedml) -> None:
    job = fedml.file("job.yaml", "job: echo hello\n")
    done = fedml("launch", job, "-g", "gpus", "-v", "release")
    assert done.stdout == "hello\n"
    assert "--group has no effect: " in done.stderr
    assert "--version has no effect: " in done.stderr
    assert "--group" not in fedml("launch", "--help").stdout
    assert "--platform has no effect: " in fedml("run", "list", "-pf", "falcon").stderr
