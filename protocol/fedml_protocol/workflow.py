# SPDX-License-Identifier: Apache-2.0
"""The steps of a workflow: a graph, a state for each, and what may begin next. No I/O.

Whoever carries a workflow out (the broker; a script of FedML's in its own process) asks `plan`
after each change and does what it says. As it is asked with nothing but the states, it may die at
any moment and go on from what it has written down.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum

from fedml_protocol.errors import MalformedMessage


class StepState(StrEnum):
    """Where a step is.

    STARTING has a run by name, which may not have been submitted yet: so that whoever dies in
    between submits that very run again, and no other one. SKIPPED will not run in this try.
    """

    WAITING = "WAITING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    SKIPPED = "SKIPPED"


class When(StrEnum):
    """When a step runs, those that it needs being over: they have finished; one has not; ever."""

    FINISHED = "finished"
    FAILED = "failed"
    ALWAYS = "always"


_S = StepState

# Anything absent from this table is illegal.
NEXT: Mapping[StepState, Set[StepState]] = {
    _S.WAITING: {_S.STARTING, _S.SKIPPED},
    _S.STARTING: {_S.RUNNING, _S.FAILED, _S.STOPPED},
    _S.RUNNING: {_S.FINISHED, _S.FAILED, _S.STOPPED},
    _S.FINISHED: set(),
    _S.FAILED: set(),
    _S.STOPPED: set(),
    _S.SKIPPED: set(),
}

OVER: Set[StepState] = frozenset(state for state, after in NEXT.items() if not after)
_AT_WORK: Set[StepState] = frozenset({_S.STARTING, _S.RUNNING})


@dataclass(frozen=True, slots=True)
class Node:
    """A step as the graph sees it: the names of those that it needs, and when it runs."""

    needs: tuple[str, ...] = ()
    when: When = When.FINISHED


Graph = Mapping[str, Node]


class BadGraph(MalformedMessage):
    """Steps that cannot be put in an order.

    Attributes:
        step: The one to blame.
        hint: What may have been meant.
    """

    def __init__(self, step: str, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.step = step
        self.hint = hint


def check(graph: Graph) -> None:
    """Whether the steps can be carried out.

    Raises:
        BadGraph: One needs a step that is not there, or, in the end, itself.
    """
    for name, node in graph.items():
        for needed in node.needs:
            if needed == name:
                raise BadGraph(name, f"the step {name} needs itself")
            if needed not in graph:
                near = difflib.get_close_matches(needed, graph, n=1)
                hint = f"did you mean {near[0]}?" if near else f"steps are {', '.join(graph)}"
                raise BadGraph(name, f"the step {name} needs {needed}, which is no step", hint)
        if node.when is not When.FINISHED and not node.needs:
            text = f"the step {name} runs when others are over, and names none in `needs`"
            raise BadGraph(name, text)
    if found := cycle({name: node.needs for name, node in graph.items()}):
        path = " → ".join([*found, found[0]])
        raise BadGraph(found[0], f"steps need each other in a circle: {path}")


def cycle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Steps of which each needs the next, and the last one the first; empty: there are none."""
    over: set[str] = set()
    for start in needs:
        path: list[str] = []
        # A stack of what is left to be looked at, not recursion: a chain may be long.
        left = [iter([start])]
        while left:
            name = next(left[-1], None)
            if name is None:
                left.pop()
                if path:
                    over.add(path.pop())
            elif name in path:
                return path[path.index(name) :]
            elif name not in over:
                path.append(name)
                left.append(iter(needs.get(name, ())))
    return []


def levels(graph: Graph) -> list[list[str]]:
    """The steps by the length of the longest way to them; in a level, in their own order."""
    depth: dict[str, int] = {}
    left = list(graph)
    while left:
        ready = [n for n in left if all(needed in depth for needed in graph[n].needs)]
        for name in ready:
            depth[name] = 1 + max((depth[needed] for needed in graph[name].needs), default=-1)
        left = [name for name in left if name not in depth]
    found: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for name in graph:
        found[depth[name]].append(name)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done now.

    Attributes:
        begin: Steps that start.
        skip: Steps that will not run, each with the reason; before any begins.
        stop: Steps at work that are to be ended.
        end: How the workflow has ended, all its steps being over: FINISHED, FAILED or STOPPED.
    """

    begin: tuple[str, ...] = ()
    skip: Mapping[str, str]
    stop: tuple[str, ...] = ()
    end: StepState | None = None


def plan(graph: Graph, states: Mapping[str, StepState], *, stopping: bool = False) -> Plan:
    """What is to be done now, from nothing but the states."""
    begin: list[str] = []
    skip: dict[str, str] = {}
    # What is skipped here counts at once, so that a whole branch is skipped in one go.
    after = dict(states)
    for name in (name for level in levels(graph) for name in level):
        if states[name] is not _S.WAITING:
            continue
        node = graph[name]
        needed = {n: after[n] for n in node.needs}
        if stopping:
            skip[name] = "the workflow was stopped"
        elif not all(state in OVER for state in needed.values()):
            continue
        elif reason := _unmet(node.when, needed):
            skip[name] = reason
        else:
            begin.append(name)
            continue
        after[name] = _S.SKIPPED
    stop = tuple(n for n, state in states.items() if stopping and state in _AT_WORK)
    over = all(state in OVER for state in states.values())
    end = _end(states, stopping=stopping) if over else None
    return Plan(begin=tuple(begin), skip=skip, stop=stop, end=end)


def again(
    graph: Graph, states: Mapping[str, StepState], changed: Collection[str] = ()
) -> list[str]:
    """The steps that a new try runs: what has not finished or was changed, and what needs it."""
    found: set[str] = set()
    for name in (name for level in levels(graph) for name in level):
        done = name not in changed and _is_done(graph[name], states.get(name), states)
        if not done or found.intersection(graph[name].needs):
            found.add(name)
    return [name for name in graph if name in found]


def _is_done(node: Node, state: StepState | None, states: Mapping[str, StepState]) -> bool:
    """Whether a step need not run again: it has finished, or what it is for has not happened."""
    if state is _S.SKIPPED and node.when is When.FAILED:
        return all(states.get(needed) is _S.FINISHED for needed in node.needs)
    return state is _S.FINISHED


def _unmet(when: When, needed: Mapping[str, StepState]) -> str:
    """Why a step will not run, those that it needs being over; empty: it runs."""
    bad = [name for name, state in needed.items() if state is not _S.FINISHED]
    if when is When.FINISHED and bad:
        return "; ".join(f"{name} {_did(needed[name])}" for name in bad)
    if when is When.FAILED and not bad:
        return "all that it needs has finished"
    return ""


def _did(state: StepState) -> str:
    return {_S.FAILED: "failed", _S.STOPPED: "was stopped"}.get(state, "was skipped")


def _end(states: Mapping[str, StepState], *, stopping: bool) -> StepState:
    """How a workflow has ended all of whose steps are over."""
    if stopping:
        return _S.STOPPED
    if any(state in (_S.FAILED, _S.STOPPED) for state in states.values()):
        return _S.FAILED
    return _S.FINISHED
