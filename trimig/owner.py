"""Who owns a guest, as this process knows it: kept by each guest, set by the engine, asked before anything runs.

A guest is HERE until it has been handed over. From the first byte of the decision until the answer its owner is UNKNOWN,
and after it ELSEWHERE. A guest that waits to be received is ELSEWHERE until it has arrived. The engine sets the owner
where it sets the status of the migration, so that the two never differ.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from .errors import GuestFailed, NotOwner, Owner, StateError
from .expected import expect

#: Says who owns the guest: resumes it here, or gives it up.
Settle = Callable[[Owner], Awaitable[None]]


class Owned(Protocol):
    """What has an owner: every guest."""

    @property
    def owner(self) -> Owner:
        """Now."""


_WHY: Final = {
    Owner.ELSEWHERE: "it was handed over, or has not arrived here",
    Owner.UNKNOWN: "it was handed over and the answer is missing, so it may run at the destination; look there, then say "
    "with guest.settle() who owns it",
}


def refusal(what: str, owner: Owner) -> NotOwner:
    """The refusal of *what* ("be resumed") for a guest with that *owner*, which is not HERE."""
    return NotOwner(f"the guest cannot {what}: {_WHY[owner]}", guest_owner=owner)


def already_settled(owner: Owner) -> StateError:
    """The refusal to settle what is certain, or is asked anew by a later attempt: the guest's owner is *owner* now."""
    if owner is Owner.UNKNOWN:
        return StateError(
            "already settled; who owns the guest is the question of a later attempt, which has its own error"
        )
    where = "here" if owner is Owner.HERE else "at the other side"
    return StateError(f"already settled: it is certain that the guest is {where}")


def check_here(guest: Owned) -> None:
    """Refuse to migrate a guest that is not this side's. NotOwner."""
    if guest.owner is not Owner.HERE:
        raise refusal("be migrated", guest.owner)


class OwnerState:
    """The owner of one guest, and the way out where it is not known.

    Args:
        owner: at first.
        runs: whether the guest executes now; it is asked before the guest is given away.
    """

    def __init__(self, owner: Owner, runs: Callable[[], bool]) -> None:
        self._owner = owner
        self._runs = runs
        self._settle: Settle | None = None
        self._settling = False
        self._starting = 0
        self._starts = 0
        self._gone = False

    @property
    def owner(self) -> Owner:
        """The owner now."""
        return self._owner

    @property
    def gone(self) -> bool:
        """It was this side's, and is the other side's for certain."""
        return self._gone

    @property
    def starts(self) -> int:
        """Rises when the guest begins to be started, and again when that has come to its end."""
        return self._starts

    def set(self, owner: Owner, *, gone: bool = False, settle: Settle | None = None) -> None:
        """For the engine: the owner from now on.

        Args:
            gone: with ELSEWHERE, it was handed over for certain.
            settle: what :meth:`settle` calls; only with UNKNOWN, and only once no answer is waited for any more.

        Raises:
            GuestFailed: it was this side's, and runs or is being started. A guest that executes is not handed over.
        """
        if self._owner is Owner.HERE and owner is Owner.UNKNOWN and (self._starting or self._runs()):
            raise GuestFailed("the guest was started in the moment in which it was to be handed over")
        self._gone = owner is Owner.ELSEWHERE and (self._gone or gone)
        self._owner = owner
        self._settle = settle if owner is Owner.UNKNOWN else None

    def check(self, what: str) -> None:
        """Refuse *what* ("be resumed") for a guest that is not this side's.

        Raises:
            NotOwner: it was handed over, has not arrived, or its owner is not known.
        """
        if self._owner is not Owner.HERE:
            raise refusal(what, self._owner)

    @contextmanager
    def starting(self, what: str = "be resumed") -> Iterator[None]:
        """The guest is being started inside the block: it is this side's, and is not given away meanwhile.

        Raises:
            NotOwner: as :meth:`check`; also at the end of a block in which it has ceased to be this side's.
        """
        self.check(what)
        self._starting += 1
        self._starts += 1
        try:
            yield
            self.check(what)
        finally:
            self._starting -= 1
            self._starts += 1

    async def settle(self, owner: Owner) -> None:
        """State who owns the guest: HERE resumes it (if it ran before), ELSEWHERE gives it up.

        Raises:
            TypeError: *owner* is no :class:`trimig.Owner`.
            ValueError: *owner* is UNKNOWN.
            StateError: its owner is known, the answer is still waited for, or it is being settled by another task.
            GuestNotResumed: it is here and could not be resumed; ``guest.resume()`` may be tried again.

        **Cancellation:** cancelled before anything was done, or not at all: the resume is bounded by
        ``teardown_grace``.
        """
        expect("owner", owner, Owner, "trimig.Owner.HERE or trimig.Owner.ELSEWHERE")
        if owner is Owner.UNKNOWN:
            raise ValueError("settle needs a definite owner: Owner.HERE or Owner.ELSEWHERE")
        if self._owner is not Owner.UNKNOWN:
            raise already_settled(self._owner)
        if self._settling:
            raise StateError("another task is settling it right now")
        if self._settle is None:
            raise StateError("there is nothing to settle yet: the answer of the destination is still waited for")
        self._settling = True
        try:
            await self._settle(owner)
        finally:
            self._settling = False
