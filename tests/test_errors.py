"""The errors: one root, who owns the guest, and what the messages say."""

from __future__ import annotations

import inspect
import pickle

import pytest
import trio

import trimig
from trimig import errors
from trimig.errors import HandoverUncertain, Owner, Ownership, RemoteProtocolError, StateError

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)]


@pytest.mark.parametrize("cls", ALL)
def test_every_error_has_the_root_and_is_public(cls: type[Exception]) -> None:
    assert issubclass(cls, errors.TrimigError)
    assert getattr(trimig, cls.__name__) is cls


def test_the_error_that_means_as_it_was_catches_no_other() -> None:
    """A program that serves on after MigrationError must not do so where two guests could run."""
    safe = {cls for cls in ALL if issubclass(cls, errors.MigrationError)}
    assert {cls.__name__ for cls in ALL if cls not in safe} == {
        "TrimigError",
        "ConfigError",
        "StateError",
        "NotOwner",
        "GuestNotResumed",
        "HandoverUncertain",
        "PostcopyLost",
    }
    assert issubclass(errors.NotOwner, StateError)


def test_owner_is_the_source_unless_said() -> None:
    assert errors.MigrationError("x").owner is Ownership.SOURCE
    assert errors.GuestNotResumed("x").owner is Ownership.SOURCE
    assert errors.PostcopyLost("x").owner is Ownership.DESTINATION
    assert HandoverUncertain("x").owner is Ownership.UNKNOWN
    assert [cls for cls in ALL if "UNKNOWN" in inspect.getsource(cls.__init__)] == [HandoverUncertain]


def test_a_call_that_was_not_possible_says_nothing_about_the_owner() -> None:
    for error in (errors.ConfigError("x"), StateError("x"), errors.NotOwner("x")):
        assert error.owner is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RemoteProtocolError("bad"), "bad"),
        (RemoteProtocolError("bad", offset=0), "bad [at byte 0 (0x0)]"),
        (RemoteProtocolError("bad", offset=4096, section="ram"), "bad [at byte 4096 (0x1000), in section 'ram']"),
        (RemoteProtocolError("bad", section="timer"), "bad [in section 'timer']"),
    ],
)
def test_place_in_the_stream_is_in_the_text(error: RemoteProtocolError, text: str) -> None:
    assert str(error) == text
    assert error.reason == "bad"


def test_attributes() -> None:
    assert errors.ConfigError("x", name="downtime-limit").name == "downtime-limit"
    assert isinstance(errors.ConfigError("x"), ValueError)
    assert StateError("x", status="active").status == "active"
    assert errors.PeerFailed("x", code=1).code == 1
    cancelled = errors.MigrationCancelled("maintenance is over")
    assert cancelled.reason == "maintenance is over"
    assert str(cancelled) == "the migration was cancelled: maintenance is over"
    assert errors.MigrationError("x").others == ()


def test_errors_without_needed_arguments_can_be_pickled() -> None:
    """They cross process borders in test runners and workers."""
    for error in (errors.TransportFailed("x"), errors.GuestFailed("y"), StateError("z", status="active")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


# -- settle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "owner", "told"),
    [
        (Ownership.SOURCE, Ownership.SOURCE, Owner.HERE),
        (Ownership.SOURCE, Ownership.DESTINATION, Owner.ELSEWHERE),
        (Ownership.DESTINATION, Ownership.DESTINATION, Owner.HERE),
        (Ownership.DESTINATION, Ownership.SOURCE, Owner.ELSEWHERE),
    ],
)
async def test_settling_tells_the_guest_where_it_is(here: Ownership, owner: Ownership, told: Owner) -> None:
    heard: list[Owner] = []

    async def settle(where: Owner) -> None:
        heard.append(where)

    error = HandoverUncertain("no answer", settle=settle, here=here)
    await error.settle(owner)
    assert (heard, error.settled, error.owner) == ([told], owner, owner)
    with pytest.raises(StateError, match=f"already settled: the owner is the {owner.value}"):
        await error.settle(owner)


async def test_settling_needs_a_definite_owner() -> None:
    error = HandoverUncertain("no answer")
    with pytest.raises(ValueError, match="definite owner"):
        await error.settle(Ownership.UNKNOWN)
    assert (error.settled, error.owner) == (None, Ownership.UNKNOWN)


async def test_settled_guest_that_could_not_be_resumed_is_settled_all_the_same() -> None:
    async def settle(where: Owner) -> None:
        raise errors.GuestNotResumed("it does not answer")

    error = HandoverUncertain("no answer", settle=settle)
    with pytest.raises(errors.GuestNotResumed):
        await error.settle(Ownership.SOURCE)
    assert (error.settled, error.owner) == (Ownership.SOURCE, Ownership.SOURCE)


async def test_cancelled_settling_has_not_settled_anything() -> None:
    async def settle(where: Owner) -> None:
        await trio.sleep_forever()

    error = HandoverUncertain("no answer", settle=settle)
    with trio.CancelScope() as scope:
        scope.cancel(reason="the operator thinks again")
        await error.settle(Ownership.SOURCE)
    assert (error.settled, error.owner) == (None, Ownership.UNKNOWN)
