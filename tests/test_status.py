"""The table of statuses: its laws, the owner in each, and the predicates over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import pytest

from tests import diagram
from trimig import status as sets
from trimig.errors import Ownership, RemoteProtocolError, StateError
from trimig.status import (
    BEGINNINGS,
    CANCELLABLE,
    ENDS,
    IDLE,
    IN_POSTCOPY,
    NOT_BUILT,
    RETURN_PATH,
    STREAM,
    TERMINAL,
    TRANSITIONS,
    Item,
    ReturnPath,
    Role,
    Status,
    Stream,
    after,
    check,
    end_of,
    owner,
)

S = Status
BOTH = [Role.SOURCE, Role.DESTINATION]
#: What a destination has no use for: it is told, it does not decide.
SOURCE_ONLY = {S.PRE_SWITCHOVER, S.DEVICE}


def reachable(role: Role, start: Status) -> set[Status]:
    """Every status that can follow *start*, near or far."""
    seen: set[Status] = set()
    todo = [start]
    while todo:
        for new in TRANSITIONS[role].get(todo.pop(), ()):
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return seen


@pytest.mark.parametrize("role", BOTH)
def test_every_status_of_the_table_can_be_reached(role: Role) -> None:
    assert reachable(role, S.NONE) == set(TRANSITIONS[role]) - {S.NONE}


def test_roles_have_the_statuses_they_need() -> None:
    assert set(TRANSITIONS[Role.SOURCE]) == set(Status)
    assert set(TRANSITIONS[Role.DESTINATION]) == set(Status) - SOURCE_ONLY


@pytest.mark.parametrize("role", BOTH)
def test_every_status_leads_to_an_end(role: Role) -> None:
    table = TRANSITIONS[role]
    assert S.SETUP in table
    for status in table.keys() - TERMINAL:
        assert reachable(role, status) & TERMINAL, status


@pytest.mark.parametrize("role", BOTH)
def test_end_of_an_attempt_leads_to_a_new_one_only(role: Role) -> None:
    """T7: `migrate` can be repeated without manual steps; gap G19."""
    for status in (TERMINAL & IDLE) | {S.NONE}:
        assert TRANSITIONS[role][status] == {S.SETUP}, status


def test_uncertain_is_left_by_an_answer_only() -> None:
    """Gap G1: never back to running by itself, and no new attempt before it is settled."""
    assert TRANSITIONS[Role.SOURCE][S.UNCERTAIN] == {S.COMPLETED, S.FAILED}
    assert TRANSITIONS[Role.DESTINATION][S.UNCERTAIN] == {S.COMPLETED, S.POSTCOPY_LOST, S.FAILED}
    assert S.UNCERTAIN not in IDLE


def test_decision_cannot_be_cancelled() -> None:
    """Gap G2: there is no way from handover to cancelling, not even over another status."""
    for role in BOTH:
        after = {S.HANDOVER} | TRANSITIONS[role][S.HANDOVER]
        assert not after & {S.CANCELLING, S.CANCELLED}
        assert not after & CANCELLABLE


@pytest.mark.parametrize("role", BOTH)
def test_cancellable_is_what_may_become_cancelling(role: Role) -> None:
    """F10."""
    table = TRANSITIONS[role]
    assert {status for status in table if S.CANCELLING in table[status]} == CANCELLABLE & set(table)


@pytest.mark.parametrize("role", BOTH)
def test_transitions_of_the_table_are_allowed_and_all_others_refused(role: Role) -> None:
    """H3: an illegal change raises, naming the side and both statuses, instead of being lost in silence (gap G11)."""
    for old in Status:
        for new in Status:
            if new in TRANSITIONS[role].get(old, ()):
                check(role, old, new)
                continue
            with pytest.raises(StateError) as caught:
                check(role, old, new)
            assert str(caught.value) == f"a {role.value} cannot go from {old.value} to {new.value}"
            assert caught.value.status == old.value


def test_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[Role.SOURCE][S.NONE] = frozenset()  # type: ignore[index] # that it cannot is the point


SRC, DST, UNKNOWN = Ownership.SOURCE, Ownership.DESTINATION, Ownership.UNKNOWN

#: status: (owner on the source, owner on the destination)
OWNERS = {
    S.NONE: (SRC, SRC),
    S.SETUP: (SRC, SRC),
    S.ACTIVE: (SRC, SRC),
    S.PRE_SWITCHOVER: (SRC, SRC),
    S.DEVICE: (SRC, SRC),
    S.HANDOVER: (UNKNOWN, DST),
    S.UNCERTAIN: (UNKNOWN, UNKNOWN),
    S.COMPLETED: (DST, DST),
    S.FAILED: (SRC, SRC),
    S.CANCELLING: (SRC, SRC),
    S.CANCELLED: (SRC, SRC),
    S.POSTCOPY_ACTIVE: (DST, DST),
    S.POSTCOPY_PAUSED: (DST, DST),
    S.POSTCOPY_RECOVER: (DST, DST),
    S.POSTCOPY_UNCERTAIN: (UNKNOWN, UNKNOWN),
    S.POSTCOPY_LOST: (DST, DST),
}


@pytest.mark.parametrize("status", list(Status))
def test_owner(status: Status) -> None:
    assert (owner(Role.SOURCE, status), owner(Role.DESTINATION, status)) == OWNERS[status]


def test_guest_changes_hands_at_the_handover_only() -> None:
    """No other transition of the source changes who may run the guest, new attempts aside."""
    table = TRANSITIONS[Role.SOURCE]
    changes = {
        (old, new)
        for old in table
        for new in table[old]
        if new is not S.SETUP and owner(Role.SOURCE, old) is not owner(Role.SOURCE, new)
    }
    assert changes == {
        (S.DEVICE, S.HANDOVER),
        (S.HANDOVER, S.COMPLETED),
        (S.HANDOVER, S.FAILED),
        (S.UNCERTAIN, S.COMPLETED),
        (S.UNCERTAIN, S.FAILED),
        (S.HANDOVER, S.POSTCOPY_ACTIVE),
        (S.POSTCOPY_UNCERTAIN, S.POSTCOPY_ACTIVE),
        (S.POSTCOPY_UNCERTAIN, S.POSTCOPY_PAUSED),
        (S.POSTCOPY_UNCERTAIN, S.FAILED),
    }


@pytest.mark.parametrize("role", BOTH)
def test_postcopy_never_gives_the_guest_back(role: Role) -> None:
    """Gaps G6 and G7: behind the first word of the destination no status of the source's follows, and no cancel."""
    for status in (S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER):
        assert status in IN_POSTCOPY
        assert not TRANSITIONS[role][status] & {S.FAILED, S.CANCELLING, S.CANCELLED}
        assert owner(role, status) is Ownership.DESTINATION


#: status: idle, terminal, cancellable, QEMU's word for it
PREDICATES = {
    S.NONE: (True, False, False, "none"),
    S.SETUP: (False, False, True, "setup"),
    S.ACTIVE: (False, False, True, "active"),
    S.PRE_SWITCHOVER: (False, False, True, "pre-switchover"),
    S.DEVICE: (False, False, True, "device"),
    S.HANDOVER: (False, False, False, "device"),
    S.UNCERTAIN: (False, True, False, "failed"),
    S.COMPLETED: (True, True, False, "completed"),
    S.FAILED: (True, True, False, "failed"),
    S.CANCELLING: (False, False, False, "cancelling"),
    S.CANCELLED: (True, True, False, "cancelled"),
    S.POSTCOPY_ACTIVE: (False, False, False, "postcopy-active"),
    S.POSTCOPY_PAUSED: (False, False, False, "postcopy-paused"),
    S.POSTCOPY_RECOVER: (False, False, False, "postcopy-recover"),
    S.POSTCOPY_UNCERTAIN: (False, False, False, "postcopy-paused"),
    S.POSTCOPY_LOST: (True, True, False, "failed"),
}


@pytest.mark.parametrize("status", list(Status))
def test_predicates(status: Status) -> None:
    """H6: the truth table over all statuses."""
    assert (status in IDLE, status in TERMINAL, status in CANCELLABLE, status.qmp) == PREDICATES[status]


@pytest.mark.parametrize("cancelled", [True, False])
@pytest.mark.parametrize("role", list(Role))
def test_an_interrupted_attempt_has_an_end(role: Role, *, cancelled: bool) -> None:
    """Each status either leads to its end by a legal transition, or is an end, or is on the way to `cancelled`."""
    for status in TRANSITIONS[role]:
        end = end_of(role, status, cancelled=cancelled)
        if end is None:
            assert status in TERMINAL | {S.NONE, S.CANCELLING}
        else:
            check(role, status, end)
            assert end in TERMINAL | {S.CANCELLING}
            # An interruption changes no owner, but that a destination which could not start its guest gives it back.
            given_back = (role, status) == (Role.DESTINATION, S.HANDOVER)
            assert owner(role, end) is (Ownership.SOURCE if given_back else owner(role, status))


@pytest.mark.parametrize("role", list(Role))
def test_every_status_is_reached_and_in_the_table_of_ends(role: Role) -> None:
    reached, found = set(), {S.NONE}
    while found:
        status = found.pop()
        reached.add(status)
        found |= TRANSITIONS[role][status] - reached
    assert reached == set(TRANSITIONS[role])
    assert set(ENDS[role]) - {S.PRE_SWITCHOVER, S.DEVICE} <= reached


# -- the order of the streams ------------------------------------------------------------------------------------------


def test_every_state_of_a_stream_is_reached_and_leads_to_its_end() -> None:
    """From the begin of a connection; a guest that is only kept ends in its devices."""
    reached, found = set(), set(BEGINNINGS)
    while found:
        state = found.pop()
        reached.add(state)
        found |= set(STREAM[state].values()) - reached
    assert reached == set(Stream) == set(STREAM)
    for state in Stream:
        seen, todo = set(), {state}
        while todo:
            seen.add(now := todo.pop())
            todo |= set(STREAM[now].values()) - seen
        assert seen & {Stream.ENDED, Stream.TAIL}, state


def test_every_element_is_legal_in_some_state() -> None:
    """COLO is not built."""
    legal = {item for row in (*STREAM.values(), *RETURN_PATH.values()) for item in row}
    assert set(Item) - legal == set(NOT_BUILT) == {Item.ENABLE_COLO}


State = TypeVar("State", Stream, ReturnPath)


def check_pair(row: Mapping[Item, State], state: State, item: Item) -> None:
    if item in row:
        assert after(state, item) is row[item]
        return
    with pytest.raises(RemoteProtocolError) as caught:
        after(state, item, offset=7)
    assert f"{item.value} has no place {state.value}" in str(caught.value)
    assert caught.value.offset == 7


@pytest.mark.parametrize("state", list(Stream))
@pytest.mark.parametrize("item", list(Item))
def test_an_element_is_legal_or_refused_with_both_names(state: Stream, item: Item) -> None:
    check_pair(STREAM[state], state, item)


@pytest.mark.parametrize("state", list(ReturnPath))
@pytest.mark.parametrize("item", list(Item))
def test_an_answer_is_legal_or_refused_with_both_names(state: ReturnPath, item: Item) -> None:
    check_pair(RETURN_PATH[state], state, item)


def test_a_return_path_ends_with_shut_only() -> None:
    """Every state but the last takes a refusal. Only behind the commit may the guest have arrived."""
    assert set(RETURN_PATH) == set(ReturnPath)
    for state, row in RETURN_PATH.items():
        ends = {item for item, then in row.items() if then is ReturnPath.ENDED}
        arrived = {Item.ARRIVED} if state is not ReturnPath.BEFORE else set()
        assert ends == (set() if state is ReturnPath.ENDED else {Item.REFUSED} | arrived), state


def test_the_only_place_of_an_element_is_told() -> None:
    with pytest.raises(RemoteProtocolError, match="RESUME has no place in a package; its place is in a recovery"):
        after(Stream.LISTENING, Item.POSTCOPY_RESUME)


def test_nothing_goes_back_to_memory_behind_the_commit() -> None:
    """What the guest may have written is not sent again by the stream that has handed it over."""
    for state in (Stream.DEVICES, Stream.TAIL, Stream.ENDED):
        seen, todo = set(), {state}
        while todo:
            seen.add(now := todo.pop())
            assert not {Item.PAGES, Item.PART, Item.RAM_LIST} & set(STREAM[now]), now
            todo |= set(STREAM[now].values()) - seen


@pytest.mark.parametrize("place", diagram.PLACES, ids=lambda place: place.name)
def test_pictures_show_the_table(place: diagram.Place) -> None:
    """`python -m tests.diagram` writes them."""
    assert place.path.read_text(encoding="utf-8") == place.written()


def test_sets_of_statuses_are_what_their_names_say() -> None:
    """Most of them are derived from the tables; here they are spelt out."""
    assert set(Status) - IDLE - {S.UNCERTAIN} == sets.IN_PROGRESS
    assert {S.DEVICE, S.HANDOVER} == sets.SWITCHOVER
    assert {S.PRE_SWITCHOVER, S.DEVICE} == sets.REVOCABLE
    assert {S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER} == sets.BEFORE_POSTCOPY
    assert {S.POSTCOPY_ACTIVE, S.POSTCOPY_RECOVER} == sets.PAUSABLE
    assert {S.UNCERTAIN, S.POSTCOPY_UNCERTAIN} == sets.UNSETTLED
    assert IN_POSTCOPY | {S.COMPLETED, S.POSTCOPY_LOST, S.UNCERTAIN} == sets.ARRIVED
    assert {S.POSTCOPY_LOST, S.UNCERTAIN} == sets.ARRIVED_PAUSED
    assert sets.RECOVERABLE | {S.FAILED, S.UNCERTAIN, S.POSTCOPY_LOST} == sets.WITH_ERROR
    assert IDLE | {S.CANCELLING, S.UNCERTAIN} == sets.CANCEL_IGNORED
    assert not sets.CANCEL_IGNORED & CANCELLABLE


def test_words_of_qmp_are_sorted_into_sets() -> None:
    assert {"none", "completed", "failed", "cancelled"} == sets.QMP_IDLE
    assert {"completed", "failed", "cancelled"} == sets.QMP_TERMINAL
    assert {"device", "postcopy-device"} == sets.QMP_COMMITTING
    moving = {"postcopy-active", "postcopy-recover", "postcopy-recover-setup"}
    assert moving == sets.QMP_PAUSABLE
    assert moving | {"completed", "postcopy-paused"} == sets.QMP_HANDED_OVER
    assert moving | {"postcopy-paused", "postcopy-uncertain"} == sets.QMP_IN_POSTCOPY
    assert {
        "none", "setup", "wait-unplug", "cancelling", "cancelled", "failing", "failed", "pre-switchover",
    } == sets.QMP_KEPT  # fmt: skip
