# SPDX-License-Identifier: Apache-2.0
"""Simulated devices and the simulated clock, with rounds and without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml.errors import RunFailed
from fedml.federate.fedasync import FedAsync
from fedml.simulation import simulate
from fedml.simulation.devices import Devices, online
from fedml.simulation.plan import read
from tests.fedml.simulation import apps
from tests.fedml.simulation.bits import same_bits


def plan(folder: Path, devices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "app": apps.write(folder, apps.LINEAR).name,
        "workspace": str(folder),
        "rounds": 6,
        "config": {"lr": 0.1, "epochs": 2},
        "clients": {"count": 8, "per_round": 4},
        "evaluate": {"devices": False},
        "simulation": {"devices": devices},
        **more,
    }


def times(result: Any) -> list[float]:
    return [row["simulated_s"] for row in result.history]


def test_a_device_takes_time_for_work_and_for_bytes() -> None:
    device = Devices(seconds_per_example=0.5, latency_s=2.0, megabits_per_s=8.0)
    assert device.duration(0, 10, 3_000_000, 1_000_000) == pytest.approx(2 + 5 + 4)


def test_speeds_are_log_normal_and_the_same_for_every_algorithm() -> None:
    devices = Devices(speed_spread=0.7, seed=5)
    logs = [math.log(devices.speed(client)) for client in range(2000)]
    assert np.mean(logs) == pytest.approx(0, abs=0.06)
    assert np.std(logs) == pytest.approx(0.7, rel=0.06)
    assert devices.speed(17) == Devices(speed_spread=0.7, seed=5).speed(17)


def test_online_time_is_its_share_of_the_cycle() -> None:
    devices = Devices(online_s=30, offline_s=10)
    there = [len(online(devices, range(400), t)[0]) / 400 for t in (0, 7, 100)]
    assert np.mean(there) == pytest.approx(0.75, abs=0.06)
    for client in range(50):
        at = devices.next_online(client, 12.0)
        assert devices.online(client, at + 1e-6)
        assert at - 12.0 <= 10


def test_a_trace_says_when_clients_are_there(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,start_s,end_s\n3,5,9\n3,20,30\n")
    devices = Devices.read({"trace": "trace.csv"}, tmp_path, 0)
    assert devices.next_online(3, 0) == 5
    assert devices.next_online(3, 6) == 6
    assert devices.next_online(3, 10) == 20
    assert math.isinf(devices.next_online(3, 30))
    assert devices.online(4, 1e9)


def test_a_round_takes_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"seconds_per_example": 1.0, "speed_spread": 0.5})
    asked["clients"] = {"count": 3}
    found = times(simulate(asked, debug=True))
    devices = Devices(seconds_per_example=1.0, speed_spread=0.5)
    slowest = max(2 * (9 + 4 * k) / devices.speed(k) for k in range(3))
    assert found == pytest.approx([n * slowest for n in range(7)])


def test_at_its_deadline_a_round_closes_with_those_who_have_answered(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"seconds_per_example": 1.0})
    # 18, 26, 34 seconds for the first three clients.
    asked["clients"] = {"count": 3, "minimum": 1, "deadline_s": 30}
    result = simulate(asked, debug=True)
    assert [row["answered"] for row in result.history[1:]] == [2] * 6
    assert times(result)[1] == 30
    asked["clients"]["minimum"] = 3
    assert times(simulate(asked, debug=True))[1] == pytest.approx(34)


def test_who_has_no_time_for_all_epochs_of_fedprox_sends_those_he_has_time_for(
    tmp_path: Path,
) -> None:
    app = apps.LINEAR.replace(", epochs=2", "")
    asked = plan(tmp_path, {"seconds_per_example": 1.0}, algorithm="fedprox", rounds=1)
    asked["config"]["epochs"] = 3
    # An epoch takes 9, 13 and 17 seconds.
    asked["clients"] = {"count": 3, "minimum": 1, "deadline_s": 30}
    apps.write(tmp_path, app)
    result = simulate(asked, engine="exact", debug=True)
    (row,) = result.history[1:]
    assert (row["answered"], row["partial.clients"]) == (3, 2)
    assert times(result)[1] == 27
    asked["algorithm"] = "fedavg"  # drops who is late
    assert simulate(asked, debug=True).history[1]["answered"] == 1
    # By hand: a training that counts its epochs itself, and as much time as it likes.
    apps.write(
        tmp_path,
        app + "\nloop = train\ndef train(model, data, config, rng, correction=None):\n"
        "    few = {9: 3, 13: 2, 17: 1}[len(data[0])]\n"
        "    return loop(model, data, {**config, 'epochs': few}, rng, correction)\n",
    )
    asked |= {"algorithm": "fedprox", "clients": {"count": 3}}
    assert same_bits(simulate(asked, engine="exact", debug=True).model, result.model)


def test_over_selection_takes_the_fastest_and_makes_rounds_shorter(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"seconds_per_example": 1.0, "speed_spread": 1.0})
    plain = simulate(asked, debug=True)
    asked["clients"]["over_select"] = 1.0
    faster = simulate(asked, debug=True)
    assert times(faster)[-1] < times(plain)[-1]
    assert [row["asked"] for row in faster.history[1:]] == [8] * 6
    assert [row["answered"] for row in faster.history[1:]] == [4] * 6


def test_too_many_drop_outs_end_the_run_with_a_way_out(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"dropout": 0.9})
    with pytest.raises(RunFailed, match=r"dropped out.*clients.minimum is 4") as failed:
        simulate(asked, debug=True)
    assert "over_select" in failed.value.hint
    asked["clients"] |= {"minimum": 1, "over_select": 1.0}
    asked["simulation"]["devices"]["dropout"] = 0.4
    answered = [row["answered"] for row in simulate(asked, debug=True).history[1:]]
    assert all(1 <= n <= 4 for n in answered)


@pytest.mark.parametrize("algorithm", ["fedasync", "fedbuff"])
def test_asynchronous_runs_do_not_depend_on_the_number_of_processes(
    algorithm: str, tmp_path: Path
) -> None:
    asked = plan(
        tmp_path,
        {"speed_spread": 1.0, "dropout": 0.1, "online_s": 3, "offline_s": 1},
        algorithm=algorithm,
        algorithm_config={"buffer": 3} if algorithm == "fedbuff" else {},
    )
    one, two = simulate(asked, workers=1), simulate(asked, workers=2)
    assert all(np.array_equal(one.model[n], two.model[n]) for n in one.model)
    assert times(one) == times(two)
    assert one.rounds == 6


def test_fedbuff_takes_a_step_for_every_buffer_and_slow_clients_hold_nobody_up(
    tmp_path: Path,
) -> None:
    devices = {"seconds_per_example": 1.0, "speed_spread": 1.5}
    rounds = simulate(plan(tmp_path, devices), debug=True)
    buffered = simulate(
        plan(tmp_path, devices, algorithm="fedbuff", algorithm_config={"buffer": 4}), debug=True
    )
    assert [row["answered"] for row in buffered.history[1:]] == [4] * 6
    assert times(buffered)[-1] < times(rounds)[-1]


def test_staleness_counts_the_versions_since_a_client_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = FedAsync.server_update

    def spy(self: FedAsync, model: Any, state: Any, combined: Any, facts: Any) -> Any:
        seen.append(facts.staleness)
        return real(self, model, state, combined, facts)

    monkeypatch.setattr(FedAsync, "server_update", spy)
    # Alike in speed, four at work: after the first four answers everyone is three versions late.
    asked = plan(tmp_path, {"seconds_per_example": 0.0, "latency_s": 1.0}, algorithm="fedasync")
    simulate(asked, debug=True)
    assert seen == [0, 1, 2, 3, 3, 3]


def test_a_seed_given_beside_the_file_draws_other_devices(tmp_path: Path) -> None:
    source = plan(tmp_path, {"speed_spread": 1.0}, seed=3)
    found = {seed: read(source, seed=seed).devices for seed in (None, 3, 4)}
    assert found[None] == found[3]
    speeds = [[d.speed(client) for client in range(8)] for d in found.values() if d is not None]
    assert speeds[0] == speeds[1] != speeds[2]
    assert times(simulate(source, seed=3)) != times(simulate(source, seed=4))
