# SPDX-License-Identifier: Apache-2.0
"""FedML's optimisers, defences and privacy as algorithms and treatments of ours."""

from __future__ import annotations

import json
import math
from collections import UserDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedml.errors import ConfigError

if TYPE_CHECKING:
    from fedml.translation import Notes


class Flat(UserDict[str, Any]):
    """The keys of all sections; a null is as good as absent."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        super().__init__({key: value for key, value in keys.items() if value is not None})

    def need(self, key: str, otherwise: Any = None) -> Any:
        """A value that must be there, unless there is something in its place.

        Raises:
            ConfigError: It is not.
        """
        value = self.get(key, otherwise)
        if value is None:
            raise ConfigError(f"there is no `{key}`", "docs/fedml.md has every key")
        return value


def whole(flat: Flat, key: str, otherwise: int | None = None) -> int:
    """A whole number; its text will do.

    Raises:
        ConfigError: It is another thing, or absent with nothing in its place.
    """
    value = flat.need(key, otherwise)
    try:
        found = float(value)
        if isinstance(value, bool) or found != int(found):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"`{key}` must be a whole number, and is {value!r}") from error
    return int(found)


def number(flat: Flat, key: str, otherwise: Any = None) -> float:
    """A finite number; its text will do.

    Raises:
        ConfigError: It is another thing, or absent with nothing in its place.
    """
    value = flat.need(key, otherwise)
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{key}` must be a number, and is {value!r}") from error
    if isinstance(value, bool) or not math.isfinite(found):
        raise ConfigError(f"`{key}` must be a number, and is {value!r}")
    return found


# `federated_optimizer` -> our algorithm and {our parameter: FedML's key}.
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "FedAvg": ("fedavg", {}),
    "FedAvg_seq": ("fedavg", {}),
    "FedAvg_robust": ("fedavg", {}),
    "FedLocalSGD": ("fedavg", {}),
    "FedSeg": ("fedavg", {}),
    "HierarchicalFL": ("fedavg", {}),
    "SA": ("fedavg", {}),
    "LSA": ("fedavg", {}),
    "turbo_aggregate": ("fedavg", {}),
    "FedSGD": ("fedsgd", {"lr": "learning_rate"}),
    "FedOpt": ("fedopt", {"server_lr": "server_lr"}),
    "FedOpt_seq": ("fedopt", {"server_lr": "server_lr"}),
    "FedProx": ("fedprox", {"mu": "fedprox_mu"}),
    "FedNova": ("fednova", {"momentum": "momentum", "mu": "fedprox_mu"}),
    "FedDyn": ("feddyn", {"alpha": "feddyn_alpha"}),
    "SCAFFOLD": ("scaffold", {"server_lr": "server_lr"}),
    "Mime": ("mime", {"server_lr": "server_lr", "beta": "server_momentum"}),
    "Async_FedAvg": ("fedasync", {"alpha": "async_alpha"}),
}

# FedOpt is four algorithms, by the server's optimiser.
_SERVERS = {"sgd": "fedavgm", "adam": "fedadam", "adagrad": "fedadagrad", "yogi": "fedyogi"}

_MASKED = "updates are not masked; in a simulation their mean is the same"
# Those that do something else than the algorithm they become.
_DIFFERS = {"FedSeg": "the loss is the plain cross-entropy"}
_SECURE = ("SA", "LSA", "turbo_aggregate")


def algorithm_of(flat: Flat, notes: Notes, *, deployed: bool) -> tuple[str, dict[str, Any]]:
    """Our algorithm and its parameters.

    Raises:
        ConfigError: There is nothing like it here, or not on agents.
    """
    asked = str(flat.get("federated_optimizer", "FedAvg"))
    plain = {name.lower().replace("_", ""): name for name in OPTIMIZERS}
    called = plain.get(asked.lower().replace("_", "").replace("-", ""))
    if called is None:
        raise ConfigError(
            f"`federated_optimizer`: there is no {asked} here; there are {', '.join(OPTIMIZERS)}",
            "write it in a file of your own: docs/federate.md",
        )
    name, keys = OPTIMIZERS[called]
    parameters = {ours: number(flat, theirs) for ours, theirs in keys.items() if theirs in flat}
    if name == "fedsgd" and "lr" not in parameters:
        parameters["lr"] = number(flat, "lr")
    if name == "fedopt":
        name = _server(flat, notes)
        if "server_momentum" in flat:
            ours = "momentum" if name == "fedavgm" else "beta1"
            parameters[ours] = number(flat, "server_momentum")
    if called in _DIFFERS:
        notes.instead(f"`federated_optimizer`: {called} runs as FedAvg: {_DIFFERS[called]}")
    if called in _SECURE:
        if deployed:
            asked = f"`federated_optimizer`: {called}"
            raise in_the_clear(asked, "secure aggregation", "federated_optimizer: FedAvg")
        notes.no_effect(f"`federated_optimizer`: {called} runs as FedAvg: {_MASKED}")
    return name, parameters


def in_the_clear(asked: str, what: str, instead: str) -> ConfigError:
    """Updates were to be hidden from the broker, and cannot be."""
    return ConfigError(
        f"{asked}: there is no {what} here: whoever runs the broker can look at a machine's update",
        f"{instead} trains in the clear, if that is meant",
    )


def _server(flat: Flat, notes: Notes) -> str:
    asked = str(flat.get("server_optimizer", "adam")).lower()
    if asked not in _SERVERS:
        notes.instead(f"`server_optimizer`: {asked} is none of {', '.join(_SERVERS)}; adam is used")
        return "fedadam"
    return _SERVERS[asked]


def groups_of(flat: Flat, notes: Notes) -> dict[str, int]:
    """Clients in groups; nothing where none are asked for."""
    hierarchical = str(flat.get("federated_optimizer")).lower() == "hierarchicalfl"
    if not hierarchical and flat.get("scenario") != "hierarchical":
        return {}
    if "group_num" not in flat:
        notes.instead("`group_num` is not there: clients are not grouped, one mean is over all")
        return {}
    if str(flat.get("group_method", "random")) != "random":
        notes.instead(f"`group_method`: groups are random, not {flat['group_method']}")
    return {"count": whole(flat, "group_num"), "rounds": whole(flat, "group_comm_round", 1)}


# FedML's `attack_type` -> ours, where it is not the `attack_mode` that says.
_ATTACKS = {"byzantine": None, "label_flipping": "label_flip", "lazy_worker": "zero"}


def attack_of(flat: Flat, notes: Notes, clients: int, *, deployed: bool) -> dict[str, Any]:
    """How some clients of a simulation lie; nothing where none do."""
    if not flat.get("enable_attack"):
        return {}
    asked = str(flat.get("attack_type", "byzantine"))
    if deployed:
        notes.instead("`enable_attack`: real machines are not made to lie; `fedml simulate` does")
        return {}
    if asked not in _ATTACKS:
        known = ", ".join(_ATTACKS)
        notes.instead(f"`attack_type`: there is no {asked} here, only {known}: nobody attacks")
        return {}
    kind = _ATTACKS[asked] or str(flat.get("attack_mode", "random"))
    if asked == "byzantine" and kind not in ("random", "zero", "flip"):
        raise ConfigError(f"`attack_mode`: {kind} is none of random, zero, flip")
    share = number(flat, "ratio_of_poisoned_client", 0.0)
    liars = whole(flat, "byzantine_client_num", max(1, math.floor(share * clients)))
    attack: dict[str, Any] = {"kind": kind, "clients": liars}
    if kind == "label_flip":
        for ours, theirs in (("from", "original_class_list"), ("to", "target_class_list")):
            classes = listed(flat.need(theirs))
            if len(classes) != 1:
                notes.instead(f"`{theirs}`: one class is flipped, the first of {classes}")
            attack[ours] = int(classes[0])
    return attack


def listed(value: Any) -> list[Any]:
    """A list, or its text; anything else is an empty one."""
    if isinstance(value, str):
        try:
            value = json.loads(value.replace("'", '"'))
        except ValueError:
            return []
    return value if isinstance(value, list) else []


# `defense_type` -> our rule and {our parameter: FedML's key}.
DEFENCES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "norm_diff_clipping": ("norm_clipping", {"bound": "norm_bound"}),
    "diff_clipping": ("norm_clipping", {"bound": "norm_bound"}),
    "krum": ("krum", {"byzantine": "byzantine_client_num"}),
    "multikrum": ("krum", {"byzantine": "byzantine_client_num", "keep": "krum_param_m"}),
    "trimmed_mean": ("trimmed_mean", {"trim": "trim_param_b"}),
    "slsgd": ("trimmed_mean", {"trim": "trim_param_b"}),
    "geo_median": ("geometric_median", {}),
    "rfa": ("geometric_median", {}),
    "wise_median": ("median", {}),
    "cclip": ("centred_clipping", {"radius": "tau"}),
}
_MADE_OF_COUNTS = ("byzantine", "keep", "trim")


def treatment_of(
    flat: Flat, notes: Notes, run: dict[str, Any], taking_part: int, *, deployed: bool
) -> dict[str, Any]:
    """Robust rule and privacy.

    Args:
        flat: The configuration.
        notes: What there is to tell.
        run: The run so far; slsgd also sets the server's step.
        taking_part: Clients of a round.
        deployed: Real machines take part: what is not there is refused.

    Raises:
        ConfigError: A protection that was asked for is not there.
    """
    treatment: dict[str, Any] = {}
    robust = _robust(flat, notes, run, taking_part, deployed=deployed)
    if robust:
        treatment["robust"] = robust
    privacy = _privacy(flat, notes, deployed=deployed)
    if privacy:
        treatment["privacy"] = privacy
    return treatment


def _robust(
    flat: Flat, notes: Notes, run: dict[str, Any], taking_part: int, *, deployed: bool
) -> dict[str, Any]:
    old = str(flat.get("federated_optimizer", "")).lower() == "fedavg_robust"
    if not flat.get("enable_defense") and not (old and "norm_bound" in flat):
        return {}
    kind = str(flat.get("defense_type", "norm_diff_clipping")).lower()
    if kind not in DEFENCES:
        _missing("defense_type", f"there is no {kind} here; there are {', '.join(DEFENCES)}",
                 notes, deployed=deployed)  # fmt: skip
        return {}
    rule, keys = DEFENCES[kind]
    found: dict[str, Any] = {"rule": rule}
    for ours, theirs in keys.items():
        if theirs in flat:
            read = whole if ours in _MADE_OF_COUNTS else number
            found[ours] = read(flat, theirs)
    if rule == "trimmed_mean" and "trim" not in found:
        found["trim"] = math.floor(number(flat, "beta", 0.1) * taking_part)
    if rule == "centred_clipping":
        found.setdefault("radius", 10.0)
    if rule == "norm_clipping":
        found["bound"] = number(flat, "norm_bound")
    if rule == "krum":
        found["byzantine"] = whole(flat, "byzantine_client_num")
    if kind == "slsgd" and "alpha" in flat:
        run["algorithm_config"] = {**run.get("algorithm_config", {})}
        run["algorithm_config"]["server_lr"] = number(flat, "alpha")
    if whole(flat, "bucket_size", 1) > 1:
        found["mixing"] = {"kind": "bucketing", "size": whole(flat, "bucket_size")}
    return found


def _privacy(flat: Flat, notes: Notes, *, deployed: bool) -> dict[str, Any]:
    if not flat.get("enable_dp"):
        return {}
    kind = str(flat.get("dp_solution_type", "cdp")).lower()
    if kind not in ("cdp", "dp_clip"):
        _missing("dp_solution_type", f"there is no {kind} here, only cdp and dp_clip: the server "
                 "adds the noise", notes, deployed=deployed)  # fmt: skip
        return {}
    if str(flat.get("mechanism_type", "gaussian")).lower() != "gaussian":
        notes.instead(f"`mechanism_type`: the noise is gaussian, not {flat['mechanism_type']}")
    delta = number(flat, "delta", 1e-5)
    if "noise_multiplier" in flat:
        noise = number(flat, "noise_multiplier")
    else:
        # The classical Gaussian mechanism, as FedML has it: epsilon is of one round.
        epsilon = number(flat, "epsilon")
        if not epsilon > 0 or not 0 < delta < 1:
            raise ConfigError(f"`epsilon` must be > 0 and `delta` in (0, 1): {epsilon}, {delta}")
        noise = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    clip = number(flat, "clipping_norm", flat.get("sensitivity", 1.0))
    return {"noise_multiplier": noise, "clip": clip, "delta": delta}


def _missing(key: str, text: str, notes: Notes, *, deployed: bool) -> None:
    """A protection that is not there: nobody's machine trains without it unawares."""
    if deployed:
        raise ConfigError(f"`{key}`: {text}", "choose one of these, or switch it off")
    notes.instead(f"`{key}`: {text}: the run is without it")
