# SPDX-License-Identifier: Apache-2.0
"""`fedml.mlops` in one process: what it writes, what it refuses, what a full disk does to it."""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import mlops
from fedml.mlops.recorder import Recorder
from fedml_broker import tracking
from fedml_protocol.records import ENV, FILE, MAX_LINE_BYTES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a task; the machine's load is not sampled."""
    monkeypatch.setenv(ENV, str(tmp_path / "mlops"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    yield tmp_path / "mlops"
    mlops.finish()


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_bytes().splitlines()]


def test_steps_are_counted_where_they_are_not_given_and_uncommitted_numbers_wait(
    folder: Path,
) -> None:
    mlops._state.step = 0
    mlops.log({"a": 1})
    mlops.log({"a": 2}, step=7)
    mlops.log({"a": 3}, commit=False)
    mlops.log({"b": {"c": 4}})
    mlops.log_metric({"a": 5, "epoch": 3}, customized_step_key="epoch")
    assert [(line["step"], line["metrics"]) for line in _lines(folder)] == [
        (0, {"a": 1}),
        (7, {"a": 2}),
        (8, {"a": 3, "b/c": 4}),
        (3, {"a": 5, "epoch": 3}),
    ]


def test_what_is_no_metric_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(TypeError, match="loss: a metric is a number, got 'low'"):
        mlops.log({"loss": "low"})
    with pytest.raises(TypeError, match="loss: a metric is a number, got list"):
        mlops.log({"loss": [1]})
    with pytest.raises(ValueError, match="a name has 1 to"):
        mlops.log({"": 1})
    with pytest.raises(ValueError, match="customized_step_key"):
        mlops.log({"a": 1}, customized_step_key="epoch")
    with pytest.raises(ValueError, match="log large things as artifacts"):
        mlops.log_params({"a": "x" * MAX_LINE_BYTES})
    with pytest.raises(ValueError, match="no part of an artifact"):
        mlops.log_artifact(__file__, "../x")
    assert not (folder / FILE).exists()


def test_numbers_of_other_libraries_are_numbers(folder: Path) -> None:
    import numpy as np

    mlops.log({"a": np.float32(0.5), "b": np.int64(3), "c": np.array(2.0), "d": float("inf")})
    assert _lines(folder)[0]["metrics"] == {"a": 0.5, "b": 3.0, "c": 2.0, "d": None}


def test_every_name_of_fedml_records_what_the_broker_can_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"weights")
    mlops.log_params({"lr": 0.1})
    mlops.log_artifact(tmp_path / "m.bin", version="v1")
    mlops.log_model("net", tmp_path / "m.bin")
    mlops.log_llm_record({"input": "hi", "output": object()})
    mlops.log_endpoint({"latency": float("nan")})
    mlops.event("train", started=False, value="1")
    mlops.log_round_info(10, 3)
    mlops.log_aggregated_model_info(3, model_url="x")
    mlops.log_training_status("RUNNING", run_id=7)
    mlops.log_training_finished_status()
    mlops.log_training_failed_status()
    mlops.log_aggregation_status("RUNNING")
    mlops.log_aggregation_finished_status()
    mlops.log_aggregation_failed_status()
    records = [tracking._DECODER.decode(line) for line in (folder / FILE).read_bytes().splitlines()]
    assert len(records) == 14
    assert [r.name for r in records if isinstance(r, tracking.Artifact)] == [
        "v1/m.bin",
        "net/m.bin",
    ]
    kept = [path for path in folder.iterdir() if path.name != FILE]
    assert [path.read_bytes() for path in kept] == [b"weights"]
    mlops.log_sys_perf(every_s=60)
    mlops.stop_sys_perf()


def test_threads_and_forks_do_not_mix_their_lines(folder: Path) -> None:
    def work(who: int) -> None:
        for n in range(200):
            mlops.log({f"w{who}": n, "long" * 50: n}, step=n)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    child = os.fork()
    if not child:
        work(3)
        os._exit(0)
    work(4)
    os.waitpid(child, 0)
    lines = _lines(folder)
    assert len(lines) == 1000
    for who in range(5):
        mine = [line["metrics"][f"w{who}"] for line in lines if f"w{who}" in line["metrics"]]
        assert mine == [*range(200)]


def test_a_full_disk_costs_records_and_says_how_many(tmp_path: Path) -> None:
    """The limit on a file's size cuts a write short as a full disk does."""
    code = f"""
import resource, sys
from pathlib import Path
from fedml.mlops.recorder import Recorder
recorder = Recorder(Path({str(tmp_path)!r}))
write = lambda n: recorder.write("metrics", step=n, metrics={{"a": n}})
write(0)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
for n in range(1, 6):
    write(n)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
write(6)
recorder.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("records are not kept") == 1
    good, torn, lost, last = (tmp_path / FILE).read_bytes().splitlines()
    assert json.loads(good)["step"] == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(torn)
    assert json.loads(lost)["count"] == 5
    assert json.loads(last)["step"] == 6
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


def test_beyond_its_cap_a_task_records_only_how_much_is_missing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, cap=1000)
    for n in range(100):
        recorder.write("metrics", step=n, metrics={"a": n})
    recorder.close()
    lines = _lines(tmp_path)
    kept = [line for line in lines if line["kind"] == "metrics"]
    assert len(kept) + sum(line["count"] for line in lines if line["kind"] == "lost") == 100
    assert 5 < len(kept) < 20
    assert [line["step"] for line in kept] == [*range(len(kept))]


def test_outside_a_task_a_line_says_where_records_go(tmp_path: Path) -> None:
    code = "from fedml import mlops; mlops.log({'a': 1}); mlops.log({'a': 2})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (folder,) = (tmp_path / "fedml-mlops").iterdir()
    assert done.stderr == (
        f"fedml.mlops: records go into fedml-mlops/{folder.name}; to the broker: mlops.start() "
        "first\n"
    )
    assert [line["step"] for line in _lines(folder)] == [0, 1]


def test_mlops_imports_nothing_heavy() -> None:
    code = "import sys, fedml.mlops; print({'numpy','torch','urllib3','psutil'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
