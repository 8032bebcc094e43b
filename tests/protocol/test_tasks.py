# SPDX-License-Identifier: Apache-2.0
"""The life of a task: what may follow what, and that every task can come to an end."""

import pytest

from fedml_protocol.errors import IllegalMove, ProtocolError
from fedml_protocol.tasks import FINAL, HELD, NEXT, PERMANENT, RejectReason, TaskState, move

S = TaskState

each_pair = pytest.mark.parametrize(("now", "to"), [(now, to) for now in S for to in S])


def reachable(start: TaskState) -> set[TaskState]:
    """Every state that a task in `start` can still come to."""
    found: set[TaskState] = set()
    ahead = set(NEXT[start])
    while ahead:
        state = ahead.pop()
        if state not in found:
            found.add(state)
            ahead |= NEXT[state]
    return found


def test_the_table_names_every_state() -> None:
    assert set(NEXT) == set(S)


def test_finished_failed_stopped_and_lost_are_final_and_have_no_exits() -> None:
    assert {S.FINISHED, S.FAILED, S.STOPPED, S.LOST} == FINAL
    assert not any(NEXT[state] for state in FINAL)


@pytest.mark.parametrize("state", sorted(set(S) - FINAL))
def test_every_other_state_can_come_to_every_end(state: TaskState) -> None:
    assert reachable(state) >= FINAL


@pytest.mark.parametrize("state", sorted(set(S) - FINAL))
def test_a_task_can_be_stopped_fail_or_be_lost_at_any_time(state: TaskState) -> None:
    for end in (S.STOPPED, S.FAILED, S.LOST):
        assert move(state, end) is end


def test_a_task_that_no_machine_has_cannot_finish_or_run() -> None:
    for to in (S.LEASED, S.RUNNING, S.FINISHED):
        with pytest.raises(IllegalMove):
            move(S.QUEUED, to)


@pytest.mark.parametrize("state", sorted(HELD))
def test_what_a_machine_has_can_be_offered_again(state: TaskState) -> None:
    assert move(move(state, S.QUEUED), S.OFFERED) is S.OFFERED


def test_a_machine_has_what_is_neither_queued_nor_final() -> None:
    assert set(S) - FINAL - {S.QUEUED} == HELD


def test_a_result_may_overtake_the_acceptance() -> None:
    for state in (S.RUNNING, S.FINISHED):
        assert move(S.OFFERED, state) is state


@pytest.mark.parametrize("state", S)
def test_no_state_follows_itself(state: TaskState) -> None:
    assert state not in NEXT[state]


@each_pair
def test_a_move_is_in_the_table_or_our_fault(now: TaskState, to: TaskState) -> None:
    if to in NEXT[now]:
        assert move(now, to) is to
    else:
        with pytest.raises(IllegalMove, match=f"{now.name} cannot become {to.name}") as error:
            move(now, to)
        assert error.value.fault == "ours"
        assert isinstance(error.value, ProtocolError)


def test_asking_again_helps_unless_the_answer_cannot_change() -> None:
    assert {RejectReason.SIGNATURE, RejectReason.POLICY_REFUSED, RejectReason.UNSUPPORTED} == (
        PERMANENT
    )
