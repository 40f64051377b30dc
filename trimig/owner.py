"""The owner of a guest, as far as this process knows: kept by each guest, set by the engine, checked before the guest
runs.

A guest is HERE until it has been handed over. From the first byte of the decision until the answer its owner is
UNKNOWN, and after the answer ELSEWHERE. A guest that waits to be received is ELSEWHERE until it has arrived. The engine
sets the owner together with the status of the migration, so that the two never differ.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from .errors import GuestFailed, NotOwner, Owner, StateError
from .expected import expect

#: Settles the owner of the guest: resumes it here, or gives it up.
Settle = Callable[[Owner], Awaitable[None]]


class Owned(Protocol):
    """An object with an owner: every guest."""

    @property
    def owner(self) -> Owner:
        """The owner now."""


_WHY: Final = {
    Owner.ELSEWHERE: "it was handed over, or has not arrived here",
    Owner.UNKNOWN: "it was handed over and the answer is missing, so it may run at the destination; look there, then say "
    "with guest.settle() who owns it",
}


def refusal(what: str, owner: Owner) -> NotOwner:
    """The error for *what* ("be resumed") on a guest whose *owner* is not HERE."""
    return NotOwner(f"the guest cannot {what}: {_WHY[owner]}", guest_owner=owner)


def already_settled(owner: Owner) -> StateError:
    """The error for settling an owner that is certain, or that a later attempt has to settle; *owner* is the owner
    now.
    """
    if owner is Owner.UNKNOWN:
        return StateError(
            "already settled; the owner of the guest is now the question of a later attempt, which has its own error"
        )
    where = "here" if owner is Owner.HERE else "at the other side"
    return StateError(f"already settled: it is certain that the guest is {where}")


def check_here(guest: Owned) -> None:
    """Raise NotOwner unless this side owns the guest."""
    if guest.owner is not Owner.HERE:
        raise refusal("be migrated", guest.owner)


class OwnerState:
    """The owner of one guest, and the way to settle an unknown owner.

    Args:
        owner: the first owner.
        runs: tells whether the guest executes now; called before the guest is handed over.
    """

    def __init__(self, owner: Owner, runs: Callable[[], bool]) -> None:
        self._owner = owner
        self._runs = runs
        self._settle: Settle | None = None
        self._settling = False
        self._starting = 0
        self._starts = 0
        self._handed_over = False

    @property
    def owner(self) -> Owner:
        """The owner now."""
        return self._owner

    @property
    def handed_over(self) -> bool:
        """Whether this side owned the guest, and the other side owns it now for certain."""
        return self._handed_over

    @property
    def starts(self) -> int:
        """A counter that rises at the begin of each start of the guest, and again at its end."""
        return self._starts

    def set(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """Set the owner; for the engine.

        Args:
            handed_over: with ELSEWHERE, the guest was handed over for certain.
            settle: the function that :meth:`settle` calls; only with UNKNOWN, and only once no answer is expected any
                more.

        Raises:
            GuestFailed: this side owned the guest, and the guest runs or is being started. A guest that executes is not
                handed over.
        """
        if self._owner is Owner.HERE and owner is Owner.UNKNOWN and (self._starting or self._runs()):
            raise GuestFailed("the guest was started in the moment in which it was to be handed over")
        self._handed_over = owner is Owner.ELSEWHERE and (self._handed_over or handed_over)
        self._owner = owner
        self._settle = settle if owner is Owner.UNKNOWN else None

    def check(self, what: str) -> None:
        """Refuse *what* ("be resumed") unless this side owns the guest.

        Raises:
            NotOwner: the guest was handed over, has not arrived, or its owner is not known.
        """
        if self._owner is not Owner.HERE:
            raise refusal(what, self._owner)

    @contextmanager
    def starting(self, what: str = "be resumed") -> Iterator[None]:
        """Start the guest inside the ``with`` block: this side owns the guest, and it cannot be handed over meanwhile.

        Raises:
            NotOwner: as :meth:`check`; also at the end of a block in which this side lost the guest.
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
        """State the owner of the guest: HERE resumes it (if it ran before), ELSEWHERE gives it up.

        Raises:
            TypeError: *owner* is no :class:`trimig.Owner`.
            ValueError: *owner* is UNKNOWN.
            StateError: the owner is known, the answer may still come, or another task is settling the owner.
            GuestNotResumed: the guest is here and could not be resumed; ``guest.resume()`` may be tried again.

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
            raise StateError("there is nothing to settle yet: the answer of the destination may still come")
        self._settling = True
        try:
            await self._settle(owner)
        finally:
            self._settling = False
