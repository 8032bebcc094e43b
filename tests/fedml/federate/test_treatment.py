# SPDX-License-Identifier: Apache-2.0
"""What is done to updates beside the algorithm: parsed, excluded, undone, and remembered."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedml.federate import algorithm
from fedml.federate.algorithm import BadParameter, NothingToLearn, Update
from fedml.federate.layout import BadUpdate, Layout
from fedml.federate.treatment import Treatment, without_ours
from fedml.protect.accountant import gaussian_epsilon
from fedml.protect.rules import NearestNeighbours, TooFewClients

MODEL = {"w": np.zeros((8, 32), np.float32), "b": np.zeros(4, np.float32)}
LAYOUT = Layout.of(MODEL)


def treatment(**parts: Any) -> Treatment:
    return Treatment.parse(json.dumps(parts))


def update(seed: int, scale: float = 1.0) -> Update:
    rng = np.random.default_rng(seed)
    arrays = {n: (scale * rng.normal(size=a.shape)).astype(a.dtype) for n, a in MODEL.items()}
    return Update(arrays=arrays, weight=10.0, metrics={"loss": 1.0})


def travel(
    given: Treatment, updates: list[Update], state: dict[str, np.ndarray], folder: Path
) -> tuple[Update, dict[str, np.ndarray], dict[str, float]]:
    """Through files, as on the wire, and combined."""
    rng = np.random.default_rng(0)
    sent = given.sent({}, state)
    fold = given.fold(LAYOUT, state, rng)
    for client, one in enumerate(updates):
        out = given.outgoing(one, sent, None, np.random.default_rng(client))
        path = folder / f"{client}.safetensors"
        save_file(out.arrays, path)
        fold.add(client, given.incoming(client, path, LAYOUT), out.weight, out.metrics)
    return given.combined(fold.result(), state, clients=len(updates), rate=1.0)


def test_no_treatment_is_the_weighted_mean(tmp_path: Path) -> None:
    none = Treatment.parse("{}")
    combined, own, told = travel(none, [update(1), update(2)], {}, tmp_path)
    expected = (update(1).arrays["w"].astype(np.float64) + update(2).arrays["w"]) / 2
    np.testing.assert_array_equal(combined.arrays["w"], expected.astype(np.float32))
    assert (own, told) == ({}, {})
    assert combined.weight == 20.0


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("krum", {"byzantine": 1}),
        ("median", {}),
        ("geometric_median", {}),
        ("trimmed_mean", {"trim": 1}),
        ("centred_clipping", {"radius": 20.0}),
        ("krum", {"byzantine": 1, "mixing": "nearest_neighbours"}),
        ("median", {"byzantine": 1, "mixing": ["nearest_neighbours"]}),
        ("geometric_median", {"mixing": [{"kind": "bucketing", "size": 2}]}),
    ],
)
def test_a_rule_withstands_the_liar_that_moves_the_mean(
    tmp_path: Path, rule: str, more: dict[str, Any]
) -> None:
    honest = [update(7, 0.1) for _ in range(8)]
    liars = [*honest, update(99, 1e4)]
    mean, _, _ = travel(Treatment(), liars, {}, tmp_path)
    robust, _, _ = travel(treatment(robust={"rule": rule, **more}), liars, {}, tmp_path)
    truth = honest[0].arrays["w"]
    assert np.abs(mean.arrays["w"] - truth).max() > 100
    assert np.abs(robust.arrays["w"] - truth).max() < 10


def test_centred_clipping_remembers_where_it_was(tmp_path: Path) -> None:
    given = treatment(robust={"rule": "centred_clipping", "radius": 1.0})
    first, own, _ = travel(given, [update(1), update(2)], {}, tmp_path)
    again, _, _ = travel(given, [update(1), update(2)], own, tmp_path)
    assert np.linalg.norm(again.arrays["w"]) > np.linalg.norm(first.arrays["w"])
    assert without_ours(own) == {}


def test_a_rule_that_needs_more_clients_says_how_many(tmp_path: Path) -> None:
    given = treatment(robust={"rule": "krum", "byzantine": 2})
    with pytest.raises(TooFewClients, match="at least 7"):
        travel(given, [update(n) for n in range(3)], {}, tmp_path)


@pytest.mark.parametrize("kind", [{"kind": "topk", "fraction": 1.0}, {"kind": "int8"}])
def test_what_was_compressed_is_read_back(tmp_path: Path, kind: dict[str, Any]) -> None:
    combined, _, _ = travel(treatment(compression=kind), [update(3)], {}, tmp_path)
    step = np.abs(update(3).arrays["w"]).max() / 127
    np.testing.assert_allclose(combined.arrays["w"], update(3).arrays["w"], atol=step)
    np.testing.assert_array_equal(combined.arrays["b"], update(3).arrays["b"])  # small: as it is


def test_what_top_k_leaves_out_comes_with_the_next_round() -> None:
    given = treatment(compression={"kind": "topk", "fraction": 0.25})
    rng = np.random.default_rng(0)
    memory: dict[str, np.ndarray] | None = None
    total = np.zeros(MODEL["w"].size)
    for _ in range(20):
        out = given.outgoing(update(5), {}, memory, rng)
        memory = out.client_state
        total[out.arrays["index::w"]] += out.arrays["value::w"]
    assert memory is not None
    rest = memory["treatment::memory::w"].reshape(-1)
    np.testing.assert_allclose(total + rest, 20 * update(5).arrays["w"].reshape(-1), rtol=1e-4)


def test_what_was_left_out_waits_while_the_client_has_no_examples() -> None:
    class Local:
        examples, supports = 0, frozenset[Any]()

        def train(self, *_: Any, **__: Any) -> Any:
            raise NothingToLearn

        def gradient(self, model: Any) -> Any:
            raise AssertionError("fedavg asks for none")

    topk = treatment(compression={"kind": "topk", "fraction": 0.1})
    memory = topk.outgoing(update(1), {}, None, np.random.default_rng(0)).client_state
    rng = np.random.default_rng(0)
    found = topk.client_update(algorithm.create("fedavg"), MODEL, {}, memory, Local(), rng)
    assert (found.weight, found.client_state) == (0.0, None)  # keeps what it has
    assert not found.arrays["value::w"].any()


def test_a_compressed_update_is_smaller(tmp_path: Path) -> None:
    out = treatment(compression={"kind": "int8"}).outgoing(
        update(1), {}, None, np.random.default_rng(0)
    )
    assert sum(a.nbytes for a in out.arrays.values()) < 0.5 * sum(a.nbytes for a in MODEL.values())


def test_an_update_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    save_file({"code::w": np.zeros(3, np.int8)}, tmp_path / "u")
    given = treatment(compression={"kind": "int8"})
    with pytest.raises(BadUpdate, match="client 4"):
        given.incoming(4, tmp_path / "u", LAYOUT)
    (tmp_path / "u").write_bytes(b"garbage")
    with pytest.raises(BadUpdate, match="cannot be read"):
        given.incoming(4, tmp_path / "u", LAYOUT)


def test_privacy_bounds_each_client_and_tells_what_was_spent(tmp_path: Path) -> None:
    given = treatment(privacy={"noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-5})
    state = given.start({"m": np.ones(2)})
    assert set(without_ours(state)) == {"m"}
    out = given.outgoing(update(1, 100.0), given.sent({}, state), None, np.random.default_rng(0))
    norm = np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in out.arrays.values()))
    assert norm == pytest.approx(0.5, rel=1e-5)
    assert (out.weight, out.metrics) == (1.0, {})
    _, own, told = travel(given, [update(1), update(2)], state, tmp_path)
    assert told["privacy.epsilon"] == gaussian_epsilon(1.0, 1e-5)
    _, _, later = travel(given, [update(1), update(2)], own, tmp_path)
    assert later["privacy.epsilon"] == pytest.approx(gaussian_epsilon(0.5**0.5, 1e-5))


def test_the_bound_follows_the_norms(tmp_path: Path) -> None:
    given = treatment(
        privacy={"noise_multiplier": 0.1, "clip": 100.0, "quantile": 0.5, "bit_noise": 0.06}
    )
    state = given.start({})
    for _ in range(3):
        _, state, told = travel(given, [update(n) for n in range(4)], state, tmp_path)
    assert told["privacy.clip"] < 100.0


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"rubust": {}}, "did you mean 'robust'"),
        ({"robust": {"byzantine": 1}}, "`rule` says which"),
        ({"robust": "krum"}, "robust must be a mapping such as"),
        ({"privacy": 1.0}, "privacy must be a mapping"),
        ({"robust": {"rule": "krumm"}}, "no robust rule is called 'krumm'"),
        ({"robust": {"rule": "krum", "bizantine": 1}}, "bizantine"),
        ({"robust": {"rule": "median", "mixing": "blender"}}, "mixing is one of"),
        ({"privacy": {"clip": 1.0}}, "noise_multiplier"),
        ({"privacy": {"noise_multiplier": 0.0}}, "noise_multiplier"),
        ({"privacy": {"noise_multiplier": 1.0, "delta": 2}}, "delta must be in"),
        ({"compression": {"kind": "zip"}}, "kind is one of topk, int8"),
        ({"compression": {"kind": "topk", "fraction": 0}}, "fraction must be in"),
        (
            {"privacy": {"noise_multiplier": 1.0}, "robust": {"rule": "median"}},
            "exclude each other",
        ),
        (
            {"privacy": {"noise_multiplier": 1.0}, "compression": {"kind": "int8"}},
            "exclude each other",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(parts: dict[str, Any], text: str) -> None:
    with pytest.raises(BadParameter, match=text):
        treatment(**parts)


def test_whole_models_are_neither_clipped_nor_compressed() -> None:
    whole = algorithm.create("fedasync", {})
    with pytest.raises(BadParameter, match="sends whole models"):
        treatment(compression={"kind": "int8"}).check(whole)


@pytest.mark.parametrize(
    "parts", [{"robust": {"rule": "median"}}, {"privacy": {"noise_multiplier": 1.0}}]
)
def test_what_needs_all_of_a_round_goes_with_no_algorithm_without_rounds(
    parts: dict[str, Any],
) -> None:
    with pytest.raises(BadParameter, match="fedbuff takes updates one by one"):
        treatment(**parts).check(algorithm.create("fedbuff", {}))
    treatment(compression={"kind": "topk"}).check(algorithm.create("fedbuff", {}))


def test_what_was_left_out_of_a_gradient_is_not_sent_as_a_step() -> None:
    with pytest.raises(BadParameter, match="means something else the next time"):
        treatment(compression={"kind": "topk"}).check(algorithm.create("mime", {}))
    treatment(compression={"kind": "int8"}).check(algorithm.create("mime", {}))


@pytest.mark.parametrize(
    "robust",
    [
        {"rule": "krum", "byzantine": 2},
        {"rule": "multikrum", "byzantine_client_num": 2, "krum_param_m": 3},
        {"rule": "trimmed_mean", "trim": 2},
        {"rule": "median", "byzantine": 2},
    ],
)
def test_mixing_expects_as_many_liars_as_the_rule_is_told_of(robust: dict[str, Any]) -> None:
    given = treatment(robust={**robust, "mixing": "nearest_neighbours"})
    assert given.mixing == (NearestNeighbours(byzantine=2),)


def test_mixing_that_expects_nobody_to_lie_is_refused() -> None:
    # It would make a mean of all, whatever rule comes after it.
    with pytest.raises(BadParameter, match="how many liars to expect"):
        treatment(robust={"rule": "median", "mixing": "nearest_neighbours"})


def test_the_size_of_what_leaves_is_told_beforehand() -> None:
    for parts in ({}, {"compression": {"kind": "topk"}}, {"compression": {"kind": "int8"}}):
        given = treatment(**parts)
        out = given.outgoing(update(1), {}, None, np.random.default_rng(0))
        assert given.size(LAYOUT, {}) == sum(array.nbytes for array in out.arrays.values())
