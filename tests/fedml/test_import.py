# SPDX-License-Identifier: Apache-2.0
"""What `import fedml` costs, and what it gives."""

import json
import subprocess
import sys

import pytest

import fedml

_MEASURE = """
import json, sys, time
began = time.perf_counter()
import fedml
took = time.perf_counter() - began
print(json.dumps([took, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout


def test_import_takes_no_time_and_brings_no_numerics() -> None:
    took, modules = json.loads(_python(_MEASURE))
    assert took < 0.3
    assert not {"torch", "numpy", "urllib3", "click", "yaml", "cryptography"} & set(modules)


def test_what_is_promised_is_there_when_it_is_used() -> None:
    for name in fedml.__all__:
        assert getattr(fedml, name) is not None
        assert name in dir(fedml)
    assert fedml.run_hierarchical_cross_silo_server is fedml.run_cross_silo_server


def test_trainers_are_found_where_fedmls_applications_look_for_them() -> None:
    from fedml.core.alg_frame.client_trainer import ClientTrainer
    from fedml.core.alg_frame.server_aggregator import ServerAggregator

    assert ClientTrainer is fedml.core.ClientTrainer
    assert ServerAggregator is fedml.core.ServerAggregator


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        fedml.nothing  # noqa: B018


@pytest.mark.parametrize("verb", ["run list", "launch", "device list", "login", "version"])
def test_commands_that_only_talk_to_the_broker_import_no_numerics(verb: str) -> None:
    code = f"""
import sys
from fedml.cli import command
command.main({[*verb.split(), "--help"]!r}, standalone_mode=False)
print("numpy" in sys.modules or "torch" in sys.modules)
"""
    assert _python(code).splitlines()[-1] == "False"


def test_reading_a_run_file_of_ours_imports_no_numerics() -> None:
    code = """
import sys
from pathlib import Path
from fedml import launch, runfile
runfile.is_fedml(Path("run.yaml"))
print("numpy" in sys.modules or "torch" in sys.modules)
"""
    assert _python(code).splitlines()[-1] == "False"
