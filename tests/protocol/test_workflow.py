# SPDX-License-Identifier: Apache-2.0
"""The graph of a workflow, and the laws of its plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol.workflow import (
    OVER,
    BadGraph,
    Graph,
    Node,
    StepState,
    When,
    again,
    check,
    cycle,
    levels,
    plan,
)

S = StepState


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Steps a, b, c …, each of which needs some of those before it."""
    graph: dict[str, Node] = {}
    for n in range(draw(st.integers(1, 7))):
        needs = tuple(draw(st.sets(st.sampled_from(sorted(graph))))) if graph else ()
        when = draw(st.sampled_from(When)) if needs else When.FINISHED
        graph["abcdefgh"[n]] = Node(needs, when)
    return dict(draw(st.permutations(list(graph.items()))))


def test_a_circle_is_named_with_its_whole_way() -> None:
    graph = {"load": Node(), "a": Node(("load", "c")), "b": Node(("a",)), "c": Node(("b",))}
    with pytest.raises(BadGraph, match="in a circle: a → c → b → a"):
        check(graph)


def test_a_step_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(BadGraph, match="evaluate needs trian, which is no step") as told:
        check({"train": Node(), "evaluate": Node(("trian",))})
    assert (told.value.step, told.value.hint) == ("evaluate", "did you mean train?")


def test_a_step_for_failures_must_say_of_what() -> None:
    with pytest.raises(BadGraph, match="names none in `needs`"):
        check({"clean": Node((), When.FAILED)})


def test_a_long_chain_is_no_deep_recursion() -> None:
    chain = {str(n): ([str(n - 1)] if n else []) for n in range(5000)}
    assert cycle(chain) == []
    assert len(cycle(chain | {"0": ["4999"]})) == 5000


@given(graphs())
def test_graphs_without_circles_pass_and_levels_put_needs_first(graph: Graph) -> None:
    check(graph)
    level = {name: n for n, names in enumerate(levels(graph)) for name in names}
    assert set(level) == set(graph)
    for name, node in graph.items():
        assert all(level[needed] < level[name] for needed in node.needs)


@given(graphs(), st.data())
def test_a_plan_begins_nothing_early_runs_all_and_comes_to_an_end(
    graph: Graph, data: st.DataObject
) -> None:
    states = dict.fromkeys(graph, S.WAITING)
    began: list[str] = []
    stopping = False
    for _ in range(4 * len(graph) + 2):
        now = plan(graph, states, stopping=stopping)
        if now.end is not None:
            break
        for name in now.skip:
            assert states[name] is S.WAITING
            states[name] = S.SKIPPED
        for name in now.begin:
            assert states[name] is S.WAITING
            assert all(states[needed] in OVER for needed in graph[name].needs)
            began.append(name)
            states[name] = S.RUNNING
        at_work = [name for name, state in states.items() if state is S.RUNNING]
        assert at_work or now.skip
        if at_work:
            ends = data.draw(st.sampled_from(at_work))
            states[ends] = data.draw(st.sampled_from([S.FINISHED, S.FAILED, S.STOPPED]))
        stopping = stopping or data.draw(st.integers(0, 9)) == 0
    assert now.end is not None
    assert not now.begin
    assert all(state in OVER for state in states.values())
    assert len(began) == len(set(began))
    if not stopping:
        ended_badly = any(state in (S.FAILED, S.STOPPED) for state in states.values())
        assert now.end is (S.FAILED if ended_badly else S.FINISHED)
        for name, node in graph.items():
            needed = [states[n] is S.FINISHED for n in node.needs]
            runs = {When.FINISHED: all(needed), When.FAILED: not all(needed), When.ALWAYS: True}
            assert (states[name] is not S.SKIPPED) is runs[node.when]


@given(graphs(), st.data())
def test_a_new_try_keeps_what_has_finished_and_hangs_on_nothing_new(
    graph: Graph, data: st.DataObject
) -> None:
    states = {n: data.draw(st.sampled_from([S.FINISHED, S.FAILED, S.SKIPPED])) for n in graph}
    changed = data.draw(st.sets(st.sampled_from(sorted(graph))))
    runs = again(graph, states, changed)
    assert changed <= set(runs)
    for name, node in graph.items():
        if name in runs:
            continue
        assert not set(node.needs) & set(runs)
        assert states[name] is S.FINISHED or node.when is When.FAILED


def test_a_workflow_that_has_finished_has_nothing_to_run_again() -> None:
    graph = {"work": Node(), "sorry": Node(("work",), When.FAILED)}
    assert again(graph, {"work": S.FINISHED, "sorry": S.SKIPPED}) == []
    assert again(graph, {"work": S.FAILED, "sorry": S.FINISHED}) == ["work", "sorry"]
