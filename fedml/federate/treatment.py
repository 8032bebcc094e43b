# SPDX-License-Identifier: Apache-2.0
"""What is done to updates beside the algorithm: on their way out, and where they are combined.

One object for both roles, made from the `treatment` of a run (JSON)::

    robust        {"rule": "krum", "byzantine": 1, "mixing": ["nearest_neighbours"]}
    privacy       {"noise_multiplier": 1.0, "clip": 1.0, "quantile": 0.5, "delta": 1e-5}
    compression   {"kind": "topk", "fraction": 0.01}, or {"kind": "int8"}

The device clips, then compresses; the server decodes, combines by the rule or the mean, and adds
noise. What the server keeps between rounds lies beside the algorithm's state under names of its
own (`treatment::…`), so that a run resumes with it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedml.federate.aggregate import Fold
from fedml.federate.algorithm import (
    Algorithm,
    BadParameter,
    Kind,
    Local,
    Update,
    client_part,
    nothing,
)
from fedml.federate.arrays import Arrays
from fedml.federate.compress import Int8, Packed, TopK
from fedml.federate.layout import BadUpdate, Given, Layout
from fedml.protect import robust
from fedml.protect.accountant import Accountant, Sampling
from fedml.protect.privacy import GaussianPrivacy, secret_generator
from fedml.protect.rules import Bucketing, CentredClipping, Mixing, NearestNeighbours, Rule

_OWN = "treatment::"
_CLIP, _REFERENCE = f"{_OWN}clip", f"{_OWN}reference::"
_RDP, _PRECISION = f"{_OWN}rdp", f"{_OWN}precision"  # what the accountant is to remember
_MEMORY = f"{_OWN}memory::"
_MIXING: Mapping[str, type[NearestNeighbours] | type[Bucketing]] = {
    "nearest_neighbours": NearestNeighbours,
    "bucketing": Bucketing,
}


@dataclass(frozen=True, slots=True)
class Treatment:
    """The treatment of one run; the default one is none.

    Attributes:
        rule: Combines updates in the place of the mean.
        mixing: Done before the rule, in order.
        privacy: Clips each update and adds noise to the mean.
        delta: At which the privacy that was spent is told, in (0, 1).
        compression: Fewer bytes on the way to the server.
    """

    rule: Rule | None = None
    mixing: tuple[Mixing, ...] = ()
    privacy: GaussianPrivacy | None = None
    delta: float = 1e-5
    compression: TopK | Int8 | None = None

    @classmethod
    def parse(cls, text: str) -> Treatment:
        """From JSON; ``{}`` and an empty text are no treatment.

        Raises:
            BadParameter: A key or a value is unknown, or two parts exclude each other.
        """
        given = json.loads(text or "{}")
        _known("treatment", given, ("robust", "privacy", "compression"))
        rule, mixing = _robust(given.get("robust") or {})
        privacy, delta = _privacy(given.get("privacy") or {})
        compression = _compression(given.get("compression") or {})
        if privacy is not None and rule is not None:
            raise BadParameter(
                "privacy and a robust rule exclude each other: the noise is made for a mean of "
                "clipped updates. Leave one out; `privacy` alone bounds what one client can do, too"
            )
        if privacy is not None and compression is not None:
            raise BadParameter(
                "privacy and compression exclude each other: what is decoded may be longer than "
                "the bound that the noise is made for. Leave one out"
            )
        return cls(rule, mixing, privacy, delta, compression)

    def check(self, algorithm: Algorithm) -> None:
        """Refuse what makes no sense with the algorithm.

        Raises:
            BadParameter: Clipping, noise and compression are for small changes only; a rule and
                noise are for all updates of a round together.
        """
        if not algorithm.deltas and (self.privacy is not None or self.compression is not None):
            what = "privacy" if self.privacy is not None else "compression"
            raise BadParameter(
                f"{algorithm.name} sends whole models: {what} is for changes to them"
            )
        rounds = self.rule is not None or self.privacy is not None
        if rounds and algorithm.kind is Kind.ASYNCHRONOUS:
            what = "privacy" if self.privacy is not None else "a robust rule"
            raise BadParameter(
                f"{algorithm.name} takes updates one by one, and {what} needs all of a round: "
                "leave it out, or choose an algorithm in rounds such as fedavg"
            )
        if isinstance(self.compression, TopK) and algorithm.stages > 1:
            raise BadParameter(
                f"topk sends later what it left out, and what clients of {algorithm.name} send "
                "means something else the next time: choose int8, or another algorithm"
            )

    # ------------------------------------------------------------------ on the device

    def client_update(
        self,
        algorithm: Algorithm,
        model: Arrays,
        sent: Arrays,
        memory: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """One client's part of a round, as it leaves the device.

        Args:
            algorithm: What is run.
            model: That training starts from.
            sent: What the server sent beside it, ours included.
            memory: The client's state from its last round, ours included; None the first time.
            local: The client's training.
            rng: The client's generator.
        """
        own = without_ours(memory) if memory is not None else None
        update = client_part(algorithm, model, without_ours(sent), own or None, local, rng)
        with np.errstate(all="ignore"):  # what is not finite is refused where it arrives
            if not update.weight:
                # What the compression remembers is to be sent with an update that counts.
                return replace(self.outgoing(update, sent, None, rng), client_state=None)
            return self.outgoing(update, sent, memory, rng)

    def outgoing(
        self, update: Update, sent: Arrays, memory: Arrays | None, rng: np.random.Generator
    ) -> Update:
        """One client's update as it leaves the device.

        Args:
            update: What the algorithm's client made; its `client_state` gets the memory of the
                compression.
            sent: What the server sent beside the model.
            memory: The client's state before this round, with that memory.
            rng: The client's generator, after its training.
        """
        if self.privacy is not None:
            update = self.privacy.clipped(update, float(sent[_CLIP]))
        if isinstance(self.compression, TopK):
            before = {
                name.removeprefix(_MEMORY): array
                for name, array in (memory or {}).items()
                if name.startswith(_MEMORY)
            }
            update, rest = self.compression.compress(update, before or None)
            kept = {_MEMORY + name: array for name, array in rest.items()}
            update = replace(update, client_state={**(update.client_state or {}), **kept})
        elif isinstance(self.compression, Int8):
            update = self.compression.compress(update, rng)
        return update

    # ------------------------------------------------------------------ on the server

    def start(self, state: Arrays) -> Arrays:
        """The algorithm's first state with ours beside it."""
        if self.privacy is None:
            return state
        return {
            **state,
            _CLIP: np.array(self.privacy.clip),
            **_remembered(Accountant()),
        }

    def sent(self, sent: Arrays, state: Arrays) -> Arrays:
        """What goes to the devices beside the model, the bound of the clipping with it."""
        return {**sent, _CLIP: state[_CLIP]} if self.privacy is not None else sent

    def fold(
        self, layout: Layout, state: Arrays, rng: np.random.Generator
    ) -> Fold | robust.RobustFold:
        """What takes the updates of one round."""
        if self.rule is not None:
            reference = {
                name.removeprefix(_REFERENCE): array
                for name, array in state.items()
                if name.startswith(_REFERENCE)
            }
            return robust.RobustFold(
                self.rule,
                mixing=self.mixing,
                layout=layout,
                reference=reference or None,
                rng=rng,
            )
        return Fold(self.layout(layout))

    def incoming(self, client: int, given: Arrays | str | Path, layout: Layout) -> Given:
        """One client's update as a fold takes it.

        Args:
            client: Whose it is.
            given: What left the device: arrays, or the file that they came in.
            layout: Of the algorithm's updates.

        Raises:
            BadUpdate: It cannot be decoded.
        """
        if self.compression is None:
            return given
        try:
            return Packed(given if isinstance(given, dict) else load_file(given), layout)
        except Exception as error:  # safetensors raises an Exception of its own
            raise BadUpdate(client, None, f"its update cannot be read: {error}") from error

    def decoded(self, client: int, path: str | Path, layout: Layout) -> Arrays:
        """One client's update as arrays, all in memory.

        Raises:
            BadUpdate: It cannot be decoded.
        """
        return in_memory(self.incoming(client, path, layout))

    def layout(self, layout: Layout) -> Layout:
        """What `incoming` gives, where the algorithm's updates are of ``layout``."""
        return self.privacy.layout(layout) if self.privacy is not None else layout

    def size(self, layout: Layout, state: Arrays) -> int:
        """Bytes of the tensors that one client sends for an update of ``layout``."""
        sent = self.sent({}, state)
        out = self.outgoing(nothing(layout), sent, None, np.random.default_rng(0))
        return sum(array.nbytes for array in out.arrays.values())

    def combined(
        self,
        update: Update,
        state: Arrays,
        *,
        clients: int,
        rate: float,
        releases: int = 1,
        noise: np.random.Generator | None = None,
    ) -> tuple[Update, Arrays, dict[str, float]]:
        """After the rule or the mean: noise, our next state, and what is to be told.

        Args:
            update: What the fold made.
            state: The server's, with ours in it.
            clients: How many updates are in it.
            rate: The share of clients that was asked of those who could have been, in (0, 1].
            releases: How many means of these very clients to account for now; 0 where an earlier
                stage of the round has done so.
            noise: For the noise of privacy; None is one that nobody can repeat.

        Returns:
            The update, our part of the next state, metrics.
        """
        own: Arrays = {}
        metrics: dict[str, float] = {}
        if isinstance(self.rule, CentredClipping):
            own = {_REFERENCE + name: array for name, array in update.arrays.items()}
        if self.privacy is not None:
            clip = float(state[_CLIP])
            rng = noise or secret_generator()
            update, next_clip = self.privacy.noised(update, clip, clients, rng)
            accountant = Accountant(
                spent=state[_RDP].tolist(), precision=float(state.get(_PRECISION, np.nan))
            )
            if releases:
                # So many Gaussians on one sample are one Gaussian of less noise on it.
                multiplier = self.privacy.noise_multiplier / math.sqrt(releases)
                sampling = Sampling.FIXED if rate < 1 else Sampling.POISSON
                accountant.add(multiplier, rate, sampling=sampling)
            own = {_CLIP: np.array(next_clip), **_remembered(accountant)}
            metrics = {
                "privacy.epsilon": accountant.epsilon(self.delta),
                "privacy.clip": clip,
            }
        return update, own, metrics


def _remembered(accountant: Accountant) -> Arrays:
    return {_RDP: np.array(accountant.spent), _PRECISION: np.array(accountant.precision)}


def in_memory(given: Given) -> Arrays:
    """What `Treatment.incoming` gives, as arrays."""
    if isinstance(given, Packed):
        return given.expand()
    if isinstance(given, str | Path):
        return load_file(given)
    if isinstance(given, dict):
        return given
    raise TypeError(f"a {type(given).__name__} is read in pieces only")


def without_ours(state: Arrays) -> Arrays:
    """The algorithm's own part of a state."""
    return {name: array for name, array in state.items() if not name.startswith(_OWN)}


def _robust(given: Any) -> tuple[Rule | None, tuple[Mixing, ...]]:
    if not given:
        return None, ()
    if not isinstance(given, Mapping):
        raise BadParameter(f"robust must be a mapping such as {{rule: median}}, not {given!r}")
    name = given.get("rule")
    if not isinstance(name, str):
        raise BadParameter("robust: `rule` says which, e.g. krum, median, geometric_median")
    said = {key: value for key, value in given.items() if key not in ("rule", "mixing")}
    parameters = robust.spelt(name, said)
    steps = given.get("mixing", [])
    mixing = tuple(
        _mixing(step, parameters) for step in ([steps] if isinstance(steps, str | dict) else steps)
    )
    # Said once, for the mixing and for a rule that does not count liars itself.
    if mixing and "byzantine" not in robust.parameter_names(name):
        parameters.pop("byzantine", None)
    return robust.create(name, parameters), mixing


def _mixing(step: Any, parameters: Mapping[str, Any]) -> Mixing:
    asked = {"kind": step} if isinstance(step, str) else dict(step)
    kind = asked.pop("kind", None)
    if kind not in _MIXING:
        raise BadParameter(f"robust: mixing is one of {', '.join(_MIXING)}, not {kind!r}")
    if kind == "nearest_neighbours" and "byzantine" not in asked:
        liars = parameters.get("byzantine", parameters.get("trim"))
        if liars is None:
            # With 0 it would make a mean of all, and every rule after it useless.
            raise BadParameter(
                "robust: mixing with nearest_neighbours needs `byzantine`: how many liars to expect"
            )
        asked["byzantine"] = liars
    built: Mixing = _build(f"robust.mixing {kind}", _MIXING[kind], asked)
    return built


def _privacy(given: Any) -> tuple[GaussianPrivacy | None, float]:
    if not given:
        return None, 1e-5
    if not isinstance(given, Mapping):
        raise BadParameter(f"privacy must be a mapping of its parameters, not {given!r}")
    asked = dict(given)
    delta = asked.pop("delta", 1e-5)
    if not isinstance(delta, float) or not 0 < delta < 1:
        raise BadParameter(f"privacy: delta must be in (0, 1), got {delta!r}")
    if "noise_multiplier" not in asked:
        raise BadParameter(
            "privacy: there is no `noise_multiplier`: how much noise, in clip bounds"
        )
    return _build("privacy", GaussianPrivacy, asked), delta


def _compression(given: Any) -> TopK | Int8 | None:
    if not given:
        return None
    asked = {"kind": given} if isinstance(given, str) else dict(given)
    kinds = {"topk": TopK, "int8": Int8}
    kind = asked.pop("kind", None)
    if kind not in kinds:
        raise BadParameter(f"compression: kind is one of {', '.join(kinds)}, not {kind!r}")
    built: TopK | Int8 = _build(f"compression {kind}", kinds[kind], asked)
    return built


def _build(what: str, kind: Any, asked: Mapping[str, Any]) -> Any:
    _known(what, asked, tuple(inspect.signature(kind).parameters))
    return kind(**asked)


def _known(what: str, given: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise BadParameter(f"{what} must be a mapping, not {given!r}")
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            known = f"known are {', '.join(keys) or 'none'}"
            hint = f"did you mean {near[0]!r}?" if near else known
            raise BadParameter(f"{what}: unknown key {key!r}; {hint}")
