# SPDX-License-Identifier: Apache-2.0
"""The moves of a workflow's walker: whatever dies between two of them, the end is the same.

`World` is a store and runs that are nothing but dictionaries. A move is made in it as the walker
makes it, and the walker may die after each: the next one begins with what is in the store.
"""

from hypothesis import given
from hypothesis import strategies as st

from fedml_broker.walk import (
    ANSWERS,
    ENDED,
    Begin,
    End,
    Move,
    Running,
    Settle,
    Skip,
    Stop,
    Submit,
    moves,
)
from fedml_protocol.workflow import Graph, Node, StepState, When
from tests.protocol.test_workflow import graphs

S = StepState


class World:
    """What is written down, and what runs.

    Args:
        ends: How the run of each step ends, when its turn has come.
    """

    def __init__(self, graph: Graph, ends: dict[str, str]) -> None:
        self.graph = graph
        self.ends = ends
        self.states = dict.fromkeys(graph, S.WAITING)
        self.run_of: dict[str, str] = {}
        self.runs: dict[str, str] = {}
        self.submitted: list[str] = []
        self.stopping = False
        self.end: StepState | None = None
        self._ids = iter(range(1000))

    def look(self) -> list[Move]:
        """What a walker that knows nothing would do."""
        at_work = {n for n, s in self.states.items() if s in (S.STARTING, S.RUNNING)}
        found = {name: self.runs.get(self.run_of[name]) for name in at_work}
        return moves(self.graph, self.states, found, stopping=self.stopping)

    def make(self, move: Move) -> None:
        match move:
            case Begin(step):
                assert self.states[step] is S.WAITING
                self.states[step] = S.STARTING
                self.run_of[step] = f"r-{next(self._ids)}"
            case Submit(step):
                if self.run_of[step] not in self.runs:  # the id makes it once
                    self.runs[self.run_of[step]] = "RUNNING"
                    self.submitted.append(step)
            case Running(step):
                assert self.states[step] is S.STARTING
                assert self.run_of[step] in self.runs
                self.states[step] = S.RUNNING
            case Settle(step, state, _):
                assert self.states[step] in (S.STARTING, S.RUNNING)
                self.states[step] = state
            case Skip(step, _):
                assert self.states[step] is S.WAITING
                self.states[step] = S.SKIPPED
            case Stop(step):
                if self.runs[self.run_of[step]] == "RUNNING":
                    self.runs[self.run_of[step]] = "STOPPED"
            case End(state):
                self.end = state

    def time_passes(self, name: str) -> None:
        """The run of a step ends as it is to end."""
        self.runs[self.run_of[name]] = self.ends[name]

    def at_work(self) -> list[str]:
        return [n for n, run in self.run_of.items() if self.runs.get(run) == "RUNNING"]


def _walk(world: World, dies: st.SearchStrategy[bool], data: st.DataObject) -> None:
    for _ in range(20 * len(world.graph)):
        made = world.look()
        for move in made:
            world.make(move)
            if world.end is not None:
                return
            if data.draw(dies):
                break  # the next walker looks anew
        at_work = world.at_work()
        if at_work and (not made or data.draw(st.booleans())):
            world.time_passes(data.draw(st.sampled_from(at_work)))
    raise AssertionError(f"it never ended: {world.states}")


_ENDS = st.sampled_from(["FINISHED", "FINISHED", "FAILED", "LOST", ANSWERS, ENDED])


@given(graphs(), st.data())
def test_whoever_dies_between_two_moves_the_end_is_the_same_and_each_step_ran_once(
    graph: Graph, data: st.DataObject
) -> None:
    ends = {name: data.draw(_ENDS) for name in graph}
    calm, hit = World(graph, ends), World(graph, ends)
    _walk(calm, st.just(False), data)
    _walk(hit, st.booleans(), data)
    assert (hit.end, hit.states) == (calm.end, calm.states)
    assert sorted(hit.submitted) == sorted(calm.submitted)
    assert len(hit.submitted) == len(set(hit.submitted))
    assert set(hit.submitted) == {n for n, state in hit.states.items() if state is not S.SKIPPED}


@given(graphs(), st.data())
def test_a_stopped_workflow_leaves_nothing_running(graph: Graph, data: st.DataObject) -> None:
    world = World(graph, dict.fromkeys(graph, "FINISHED"))
    for _ in range(data.draw(st.integers(0, 10))):
        for move in world.look():
            world.make(move)
        if at_work := world.at_work():
            world.time_passes(data.draw(st.sampled_from(at_work)))
    if world.end is not None:
        return
    world.stopping = True
    began = set(world.submitted)
    _walk(world, st.booleans(), data)
    assert world.end is S.STOPPED
    assert set(world.submitted) == began
    assert not world.at_work()


def test_a_step_whose_run_was_deleted_has_failed() -> None:
    graph = {"one": Node(), "two": Node(("one",), When.ALWAYS)}
    states = {"one": S.RUNNING, "two": S.WAITING}
    made = moves(graph, states, {"one": None}, stopping=False)
    assert made == [Settle("one", S.FAILED, "its run was deleted")]
