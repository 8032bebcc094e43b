# SPDX-License-Identifier: Apache-2.0
"""`fedml federate`: the table, the bar, failures, and the models that come out."""

import json
import re
from typing import TYPE_CHECKING

import pytest
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from tests.fedml.cli.conftest import Fedml

TASK = """
import time
import numpy as np

def model(config):
    if config.get("broken") == "model":
        raise ValueError("no model today")
    return {"w": np.zeros(8)}

def data(client, config):
    print(f"client {client.index} has its data")
    x = np.random.default_rng(client.index).normal(size=(30, 8))
    return client.index, x, x @ np.arange(8.0)

def train(model, data, config, rng):
    index, x, y = data
    if config.get("broken") == "slow":
        time.sleep(600)
    if index == 1 and config.get("broken") == "train":
        return helper(x)
    model["w"] -= 0.1 * x.T @ (x @ model["w"] - y) / len(x)
    if index == 1 and config.get("broken") == "nan":
        model["w"][0] = np.nan
    return {"examples": len(x), "loss": float(np.mean((x @ model["w"] - y) ** 2))}

def helper(x):
    raise ZeroDivisionError("batch 7")

def evaluate(model, data, config):
    _, x, y = data
    error = x @ model["w"] - y
    return {"loss": float(np.mean(error**2)), "accuracy": float(np.mean(abs(error) < 1))}
"""


def _run(fedml: "Fedml", rounds: int = 3, clients: str = "{count: 2}", broken: str = "") -> str:
    fedml.file("task.py", TASK)
    text = f"app: task.py\nrounds: {rounds}\nclients: {clients}\nconfig: {{broken: '{broken}'}}\n"
    return fedml.file("run.yaml", text)


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    head, *rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return head, rows


def test_off_a_terminal_stdout_is_the_table_of_rounds(fedml: "Fedml") -> None:
    done = fedml("federate", _run(fedml))
    head, rows = _table(done.stdout)
    metrics = ["devices.accuracy", "devices.loss", "train.loss"]
    assert head == ["round", *metrics, "seconds", "clients", "refused", "received"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[5:7] for row in rows[1:]] == [["2 of 2", "0"]] * 3
    losses = [float(row[2]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert "2 clients: one, two" in done.stderr
    assert "FINISHED" in done.stderr
    assert "has its data" not in done.stdout + done.stderr


def test_logs_come_under_the_name_of_their_machine(fedml: "Fedml") -> None:
    done = fedml("federate", _run(fedml, rounds=1), "--logs")
    assert "[one] client 0 has its data" in done.stderr
    assert "[two] client 1 has its data" in done.stderr


def test_json_lines_hold_every_metric_of_every_round(fedml: "Fedml") -> None:
    done = fedml("federate", _run(fedml, rounds=2), "--json")
    items = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(items[0]) == ["run"]
    events = [item["event"] for item in items if "event" in item]
    ended = [e["data"] for e in events if e["kind"] == "round_ends"]
    assert [e["round"] for e in ended] == [0, 1, 2]
    assert ended[1]["received_bytes"] > 0
    assert {e["data"]["round"] for e in events if e["kind"] == "metrics"} == {0, 1, 2}
    open_rounds = [item["round"] for item in items if "round" in item]
    assert all(r["answered"] <= r["asked"] == 2 for r in open_rounds)
    assert items[-1]["end"]["state"] == "FINISHED"


def test_on_a_terminal_there_is_a_bar_for_the_open_round(fedml: "Fedml") -> None:
    terminal = fedml.on_terminal("federate", _run(fedml))
    assert terminal.end() == 0
    text = terminal.text
    assert re.search(r"round 1 of 3 .* of 2 clients", text)
    assert re.search(r"round  devices\.accuracy  devices\.loss", text)
    assert re.search(r" {4}3 +[\d.]+ +[\d.]+ .* 2 of 2 ", text)
    assert "FINISHED" in text
    assert "fedml run download r-" in text


@pytest.mark.parametrize(("answer", "code"), [("y\n", 7), ("n\n", 130)])
def test_ctrl_c_in_a_round_takes_the_bar_away_and_asks(
    fedml: "Fedml", answer: str, code: int
) -> None:
    terminal = fedml.on_terminal("federate", _run(fedml, broken="slow"))
    terminal.until("0 of 2 clients")
    terminal.press("\x03")
    terminal.until(r"Stop r-\w+ too\? \[y/N\]: $")
    terminal.press(answer)
    assert terminal.end() == code
    found = re.search(r"Stop (r-\w+) too", terminal.text)
    assert found is not None
    if code == 7:
        assert f"{found[1]} STOPPED" in terminal.text
    else:
        assert fedml("run", "status", found[1]).stdout == "RUNNING\n"
        fedml("run", "stop", found[1], "--wait")


def test_a_failing_train_is_shown_with_machine_round_and_the_users_own_lines(
    fedml: "Fedml",
) -> None:
    done = fedml("federate", _run(fedml, broken="train"), code=7)
    assert "round 1: two failed: ZeroDivisionError: batch 7" in done.stderr
    frames = re.findall(r'File "([^"]+)", line \d+, in (\w+)', done.stderr)
    assert frames == [("task.py", "train"), ("task.py", "helper")]
    assert "round 1 needs 2 updates and can get 1" in done.stderr
    run = json.loads(fedml("run", "list", "--limit", "1", "--json").stdout)[0]["id"]
    shown = fedml("run", "show", run).stdout
    assert "round 1, two: ZeroDivisionError: batch 7" in shown


def test_a_failing_model_function_is_shown_with_the_users_own_lines(fedml: "Fedml") -> None:
    done = fedml("federate", _run(fedml, broken="model"), code=7)
    assert "ValueError: no model today" in done.stderr
    assert re.findall(r'File "([^"]+)", line \d+, in (\w+)', done.stderr) == [("task.py", "model")]


def test_an_update_that_is_refused_is_counted_and_the_round_goes_on(fedml: "Fedml") -> None:
    done = fedml("federate", _run(fedml, 2, "{count: 2, minimum: 1}", broken="nan"))
    _, rows = _table(done.stdout)
    assert [row[5:7] for row in rows[1:]] == [["1 of 2", "1"]] * 2
    assert "round 1: two failed: its update was refused" in done.stderr


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        ("{count: 3}", "3 machines are asked for, 2 fit of 2 that were looked at"),
        ("{count: 1, labels: {site: moon}}", "  two: no label site"),
    ],
)
def test_too_few_machines_are_refused_with_a_reason(
    fedml: "Fedml", clients: str, said: str
) -> None:
    assert said in fedml("federate", _run(fedml, clients=clients), code=6).stderr


def test_the_model_of_any_round_can_be_had(fedml: "Fedml") -> None:
    run = fedml("federate", _run(fedml, rounds=2), "--detach").stdout.strip()
    fedml("run", "wait", run)
    said = fedml("run", "download", run).stderr
    assert f"{run}.safetensors: the model of round 2" in said
    last = load_file(fedml.folder / f"{run}.safetensors")["w"]
    fedml("run", "download", run, "first.safetensors", "--round", "0")
    assert not load_file(fedml.folder / "first.safetensors")["w"].any()
    assert last.any()
    assert "exists already" in fedml("run", "download", run, code=2).stderr
    told = json.loads(fedml("run", "download", run, "--force", "--json").stdout)
    assert told == {"file": f"{run}.safetensors", "round": 2}
    said = fedml("run", "download", run, "other", "--round", "9", code=6).stderr
    assert "rounds 0 to 2 have one" in said
    shown = fedml("run", "show", run).stdout
    assert re.search(r"^clients +one, two$", shown, re.M)
    assert re.findall(r"^(\d) ", shown, re.M) == ["0", "1", "2"]
    assert "[one] client 0 has its data" in fedml("run", "logs", run).stderr
