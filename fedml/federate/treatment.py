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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedml.federate.aggregate import Fold
from fedml.federate.algorithm import Algorithm, BadParameter, Update
from fedml.federate.arrays import Arrays
from fedml.federate.compress import Int8, Packed, TopK
from fedml.federate.layout import BadUpdate, Given, Layout
from fedml.protect import robust
from fedml.protect.accountant import Accountant, Sampling
from fedml.protect.privacy import GaussianPrivacy, secret_generator
from fedml.protect.rules import Bucketing, CentredClipping, Mixing, NearestNeighbours, Rule

_OWN = "treatment::"
_CLIP, _RDP, _REFERENCE = f"{_OWN}clip", f"{_OWN}rdp", f"{_OWN}reference::"
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
            BadParameter: Clipping, noise and compression are for small changes only.
        """
        if not algorithm.deltas and (self.privacy is not None or self.compression is not None):
            what = "privacy" if self.privacy is not None else "compression"
            raise BadParameter(
                f"{algorithm.name} sends whole models: {what} is for changes to them"
            )

    # ------------------------------------------------------------------ on the device

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
            _RDP: np.array(Accountant().spent),
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
        return Fold(self.privacy.layout(layout) if self.privacy is not None else layout)

    def incoming(self, client: int, path: str | Path, layout: Layout) -> Given:
        """One client's update as a fold takes it.

        Raises:
            BadUpdate: It cannot be decoded.
        """
        if self.compression is None:
            return path
        try:
            return Packed(load_file(path), layout)
        except Exception as error:  # safetensors raises an Exception of its own
            raise BadUpdate(client, None, f"its update cannot be read: {error}") from error

    def combined(
        self, update: Update, state: Arrays, *, clients: int, rate: float
    ) -> tuple[Update, Arrays, dict[str, float]]:
        """After the rule or the mean: noise, our next state, and what is to be told.

        Args:
            update: What the fold made.
            state: The server's, with ours in it.
            clients: How many updates are in it.
            rate: The share of all clients that was asked, in (0, 1].

        Returns:
            The update, our part of the next state, metrics.
        """
        own: Arrays = {}
        metrics: dict[str, float] = {}
        if isinstance(self.rule, CentredClipping):
            own = {_REFERENCE + name: array for name, array in update.arrays.items()}
        if self.privacy is not None:
            clip = float(state[_CLIP])
            update, next_clip = self.privacy.noised(update, clip, clients, secret_generator())
            accountant = Accountant(spent=state[_RDP].tolist())
            sampling = Sampling.FIXED if rate < 1 else Sampling.POISSON
            accountant.add(self.privacy.noise_multiplier, rate, sampling=sampling)
            own = {_CLIP: np.array(next_clip), _RDP: np.array(accountant.spent)}
            metrics = {
                "privacy.epsilon": accountant.epsilon(self.delta),
                "privacy.clip": clip,
            }
        return update, own, metrics


def without_ours(state: Arrays) -> Arrays:
    """The algorithm's own part of a state."""
    return {name: array for name, array in state.items() if not name.startswith(_OWN)}


def _robust(given: Mapping[str, Any]) -> tuple[Rule | None, tuple[Mixing, ...]]:
    if not given:
        return None, ()
    parameters = dict(given)
    name = parameters.pop("rule", None)
    if not isinstance(name, str):
        raise BadParameter("robust: `rule` says which, e.g. krum, median, geometric_median")
    steps = parameters.pop("mixing", [])
    mixing = []
    for step in [steps] if isinstance(steps, str | dict) else steps:
        asked = {"kind": step} if isinstance(step, str) else dict(step)
        kind = asked.pop("kind", None)
        if kind not in _MIXING:
            raise BadParameter(f"robust: mixing is one of {', '.join(_MIXING)}, not {kind!r}")
        if kind == "nearest_neighbours":
            asked.setdefault("byzantine", parameters.get("byzantine", 0))
        mixing.append(_build(f"robust.mixing {kind}", _MIXING[kind], asked))
    accepted = robust.create(name, _meant_for(name, parameters, bool(mixing)))
    return accepted, tuple(mixing)


def _meant_for(name: str, parameters: dict[str, Any], mixed: bool) -> dict[str, Any]:
    """`byzantine` may be said once for the mixing and a rule that does not count liars."""
    if mixed and "byzantine" in parameters:
        try:
            robust.create(name, parameters)
        except BadParameter:
            return {key: value for key, value in parameters.items() if key != "byzantine"}
    return parameters


def _privacy(given: Mapping[str, Any]) -> tuple[GaussianPrivacy | None, float]:
    if not given:
        return None, 1e-5
    asked = dict(given)
    delta = asked.pop("delta", 1e-5)
    if not isinstance(delta, float) or not 0 < delta < 1:
        raise BadParameter(f"privacy: delta must be in (0, 1), got {delta!r}")
    if "noise_multiplier" not in asked:
        raise BadParameter(
            "privacy: there is no `noise_multiplier`: how much noise, in clip bounds"
        )
    return _build("privacy", GaussianPrivacy, asked), delta


def _compression(given: Mapping[str, Any]) -> TopK | Int8 | None:
    if not given:
        return None
    asked = dict(given)
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
