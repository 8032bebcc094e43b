# SPDX-License-Identifier: Apache-2.0
"""Whole simulations: reproducible, resumable, written down, and of bounded memory."""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fedml.cli import command
from fedml.errors import ConfigError, RunFailed
from fedml.federate.algorithm import names
from fedml.simulation import Listener, Round, Simulation, simulate
from fedml.simulation.checkpoint import Checkpoint
from fedml.simulation.plan import read
from fedml.simulation.states import States
from fedml.simulation.sweep import parse
from tests.fedml.simulation import apps
from tests.fedml.simulation.bits import same_bits

EXAMPLES = Path(__file__).parents[3] / "examples" / "simulate"


def plan(folder: Path, app: str = apps.LINEAR, **more: Any) -> dict[str, Any]:
    return {
        "app": apps.write(folder, app).name,
        "workspace": str(folder),
        "rounds": 4,
        "config": {"lr": 0.1},
        "clients": {"count": 7, "per_round": 4},
        "evaluate": {"every": 2},
        **more,
    }


def test_the_same_number_of_workers_gives_the_same_bits_and_any_number_the_same_model(
    tmp_path: Path,
) -> None:
    asked = plan(tmp_path)
    two = simulate(asked, engine="closed_form", workers=2)
    assert same_bits(two.model, simulate(asked, engine="closed_form", workers=2).model)
    for workers in (1, 3):
        other = simulate(asked, engine="closed_form", workers=workers)
        for name in two.model:
            np.testing.assert_allclose(other.model[name], two.model[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", names())
def test_every_algorithm_learns_in_a_simulation(algorithm: str, tmp_path: Path) -> None:
    app = apps.LINEAR
    if algorithm == "mime":
        # The only one whose gradients at an anchor a dict model does not give.
        app += "\ndef model(config):\n    from fedml import model as m\n"
        app += "    return m.create('linear', inputs=6, outputs=3)\n"
    settings = {
        "fedadam": {"server_lr": 0.1},
        "fedyogi": {"server_lr": 0.1},
        "fedbuff": {"buffer": 2},
        "fedsgd": {"lr": 1.0},
    }.get(algorithm, {})
    asked = plan(tmp_path, app, algorithm=algorithm, algorithm_config=settings, rounds=8)
    result = simulate(asked, debug=True)
    losses = [row["central.loss"] for row in result.history if "central.loss" in row]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [("fedavg", "closed_form"), ("scaffold", "exact"), ("fedadam", "exact")],
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(
    algorithm: str, engine: str, tmp_path: Path
) -> None:
    asked = plan(tmp_path, algorithm=algorithm)
    whole = simulate(asked, engine=engine, debug=True, rounds=6, out=tmp_path / "whole")
    part = simulate(asked, engine=engine, debug=True, rounds=3, out=tmp_path / "part")
    assert part.rounds == 3
    rest = simulate(asked, engine=engine, debug=True, rounds=6, out=tmp_path / "part", resume=True)
    assert same_bits(whole.model, rest.model)
    shown = [[row["round"], row.get("central.loss")] for row in rest.history]
    assert [n for n, _ in shown] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_killed_after_its_checkpoint_goes_on_as_if_nothing_had_been_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(tmp_path, algorithm="scaffold", simulation={"checkpoint_s": 1e9})
    whole = simulate(asked, engine="exact", debug=True, rounds=8)

    class Killed(Listener):
        def ended(self, round_: Round) -> None:
            if round_.number == 3:
                run.save(force=True)
                # What is killed writes no other one.
                monkeypatch.setattr(Checkpoint, "save", lambda *_: None)
            if round_.number == 6:
                raise KeyboardInterrupt

    part = read(asked, engine="exact", rounds=8)
    run = Simulation(part, folder=tmp_path / "out", debug=True, listener=Killed())
    with pytest.raises(KeyboardInterrupt):
        run.run()
    monkeypatch.undo()
    # Clients of rounds 4 to 6 have newer states of their own than the checkpoint's.
    kept = [int(f.stem) for f in (tmp_path / "out" / "state").glob("*/*.safetensors")]
    assert max(kept) == 5
    rest = simulate(asked, engine="exact", debug=True, rounds=8, out=tmp_path / "out", resume=True)
    assert same_bits(whole.model, rest.model)
    assert [row["round"] for row in rest.history] == list(range(9))


def test_an_asynchronous_run_goes_on_to_its_last_version(tmp_path: Path) -> None:
    asked = plan(tmp_path, algorithm="fedbuff", algorithm_config={"buffer": 2})
    simulate(asked, debug=True, rounds=3, out=tmp_path / "out")
    rest = simulate(asked, debug=True, rounds=7, out=tmp_path / "out", resume=True)
    assert rest.rounds == 7
    assert [row["round"] for row in rest.history] == list(range(8))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_the_examples_are_runs_that_can_be(file: Path) -> None:
    found = read(file)
    assert found.create_algorithm().name
    assert found.app.is_file()


@pytest.mark.parametrize("algorithm", names())
def test_every_algorithm_has_an_example_that_learns(algorithm: str) -> None:
    file = EXAMPLES.parent / "algorithms" / f"{algorithm}.yaml"
    result = simulate(file, debug=True, rounds=3)
    assert result.metrics["central.accuracy"] > 0.2  # a guess: 0.1


def test_paths_of_data_are_those_of_the_run_file(tmp_path: Path) -> None:
    app = apps.LINEAR + "\nfrom pathlib import Path\nreal = data\n"
    app += "def data(client, config):\n"
    app += "    assert Path(client.paths['here']).joinpath('app.py').is_file()\n"
    app += "    return real(client, config)\n"
    asked = plan(tmp_path, app, rounds=1, simulation={"data": {"here": "."}})
    assert simulate(asked, workers=1).rounds == 1


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    asked = plan(tmp_path)
    simulate(asked, debug=True, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a run of 4 rounds") as refused:
        simulate(asked, debug=True, out=tmp_path / "out")
    assert "--resume" in refused.value.hint
    with pytest.raises(ConfigError, match="of another configuration"):
        simulate({**asked, "seed": 9}, debug=True, out=tmp_path / "out", resume=True)
    (tmp_path / "out" / "checkpoint.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ConfigError, match="cannot be read"):
        simulate(asked, debug=True, out=tmp_path / "out", resume=True)


def test_the_results_file_has_a_row_a_round_and_a_row_a_client(tmp_path: Path) -> None:
    asked = plan(tmp_path)
    heard: list[Round] = []
    simulate(asked, debug=True, out=tmp_path / "out", on_round=heard.append)
    file = sqlite3.connect(tmp_path / "out" / "results.sqlite")
    rounds = file.execute("select round, answered, bytes_up from rounds order by round").fetchall()
    update = 4 * (6 * 3 + 3)
    assert rounds == [(0, 0, 0), *((n, 4, 4 * update) for n in range(1, 5))]
    clients = file.execute("select round, client, examples, metrics from clients").fetchall()
    assert len(clients) == 16
    assert all(examples == 9 + 4 * client for _, client, examples, _ in clients)
    assert all("loss" in json.loads(metrics) for *_, metrics in clients)
    query = "select value from metrics where name = 'central.accuracy' order by round"
    assert len(file.execute(query).fetchall()) == 3  # rounds 0, 2 and 4
    file.close()
    assert [round_.number for round_ in heard] == [1, 2, 3, 4]


def test_the_report_is_one_page_with_its_pictures_inside(tmp_path: Path) -> None:
    asked = plan(tmp_path, simulation={"devices": {"speed_spread": 0.5}}, name="<& name>")
    simulate(asked, debug=True, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;&amp; name&gt;" in page
    assert "http" not in page
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 4  # accuracy, loss, accuracy by time, bytes
    for picture in pictures:
        svg = "<svg" + picture.split("</svg>")[0] + "</svg>"
        lines = xml.dom.minidom.parseString(svg).getElementsByTagName("polyline")
        assert lines
        for line in lines:
            for point in line.getAttribute("points").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 560
                assert 0 <= y <= 300


def test_memory_grows_neither_with_rounds_nor_with_clients(tmp_path: Path) -> None:
    """Peak of the whole process tree's own memory, for ten times the rounds and the clients."""
    app = apps.LINEAR.replace("9 + 4 * client.index", "400")
    asked = plan(tmp_path, app, evaluate={"devices": False, "central": False})
    code = """
import json, resource, sys
from fedml.simulation import simulate
asked, clients, rounds = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
asked["clients"] = {"count": clients, "per_round": 20}
simulate(asked, rounds=rounds, workers=1, engine="exact")
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

    def peaks(clients: int, rounds: int) -> list[int]:
        command = [sys.executable, "-c", code, json.dumps(asked), str(clients), str(rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    small, large = peaks(100, 10), peaks(1000, 100)
    # Kilobytes; what 900 more clients hold (10 MB) lies in shared memory, once.
    for before, after in zip(small, large, strict=True):
        assert after - before < 16_000 + 6_000


def run(*words: str) -> Any:
    return CliRunner().invoke(command, ["simulate", *words], catch_exceptions=False)


def test_the_command_says_rounds_as_json_lines_and_ends_with_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(plan(tmp_path, name="tiny")))
    done = run("run.yaml", "--debug", "--json", "--rounds", "3")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("round") for line in lines] == [1, 2, 3, None]
    assert lines[-1]["end"]["engine"] == "closed_form"
    # The second model is looked at (`every: 2`), and the last one.
    assert ["devices.accuracy" in line["metrics"] for line in lines[:-1]] == [False, True, True]
    assert lines[2]["metrics"]["devices.loss"] == lines[3]["end"]["metrics"]["devices.loss"]
    assert (tmp_path / "simulations" / "tiny-1" / "report.html").exists()
    again = run("run.yaml", "--debug", "--json", "--rounds", "5", "--resume")
    assert [json.loads(line).get("round") for line in again.stdout.splitlines()] == [4, 5, None]
    assert not (tmp_path / "simulations" / "tiny-2").exists()


def test_a_metric_that_is_not_a_number_ends_no_run_and_breaks_no_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = apps.LINEAR + "\ndef evaluate(model, data, config):\n    return {'score': np.nan}\n"
    (tmp_path / "run.yaml").write_text(json.dumps(plan(tmp_path, app, rounds=1)))
    done = run("run.yaml", "--debug", "--out", "out")
    assert done.exit_code == 0, done.output
    assert re.search(r"devices.score +nan", done.output)
    done = run("run.yaml", "--debug", "--json", "--out", "other")
    first, end = (json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines())
    assert first["metrics"]["central.score"] is None
    assert end["end"]["metrics"]["devices.score"] is None
    (found,) = simulate(plan(tmp_path, app, rounds=1), debug=True).history[1:]
    assert math.isnan(found["devices.score"])
    file = sqlite3.connect(tmp_path / "out" / "results.sqlite")
    (told,) = file.execute("select metrics from clients limit 1").fetchone()
    assert json.loads(told, parse_constant=pytest.fail)["eval.score"] is None
    file.close()


@pytest.mark.parametrize(
    ("app", "shown"),
    [
        ("x = (\n", "SyntaxError: '(' was never closed"),
        ("import there_is_no_such_module\n", "import there_is_no_such_module"),
        (apps.LINEAR + "\ndef model(config):\n    return config['hidden']\n", "KeyError: 'hidden'"),
        (apps.LINEAR + "\ndef central(config):\n    return open('no.csv')\n", "open('no.csv')"),
    ],
)
def test_what_the_users_file_raises_is_shown_without_our_own_calls(
    app: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(plan(tmp_path, app)))
    with pytest.raises(RunFailed) as failed:
        run("run.yaml", "--workers", "1")
    text = str(failed.value)
    assert text.startswith("app.py: ")
    assert shown in text
    assert "fedml/" not in text
    # What could not begin leaves nothing that --resume would take for a run.
    assert not list(tmp_path.glob("simulations/*"))


def test_a_sweep_runs_every_combination_and_makes_a_table_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = plan(tmp_path, name="tiny", rounds=1, simulation={"workers": 1})
    (tmp_path / "run.yaml").write_text(json.dumps(asked))
    done = run("run.yaml", "--sweep", "lr=0.01,0.1", "--sweep", "seed=1,2", "--out", "out")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:2] == ["lr", "seed"]
    assert [row[:2] for row in rows[1:5]] == [
        ["0.01", "1"],
        ["0.01", "2"],
        ["0.1", "1"],
        ["0.1", "2"],
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lr=0.1 seed=2" in page
    facts = page.split("<table>")[1].split("</table>")[0]
    assert "<th>algorithm<td>fedavg" in facts
    assert "<th>seed" not in facts  # that of one run is not that of all
    assert "lr" not in facts
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "lr=0.1,seed=2" / "results.sqlite").exists()


def test_sweep_values_are_read_as_yaml() -> None:
    assert parse(["a=1,x", "b=true"]) == [{"a": 1, "b": True}, {"a": "x", "b": True}]
    for wrong in (["lr"], ["=1"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(ConfigError):
            parse(wrong)


def test_importing_fedml_imports_neither_numpy_nor_torch() -> None:
    code = "import sys, fedml, fedml.cli; print({'numpy', 'torch'} & sys.modules.keys())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "set()"


def test_a_checkpoint_that_is_written_during_a_turn_finds_what_clients_kept_before_it(
    tmp_path: Path,
) -> None:
    states = States(tmp_path)
    for turn in range(4):
        states.keep(7, turn, -1, lambda file, turn=turn: file.write_text(str(turn)))
    before = states.before(7, 3)
    assert before is not None
    assert before.read_text() == "2"
    assert len(list(tmp_path.glob("7/*"))) == 2
