"""Reasons why a guest cannot be migrated now.

A *blocker* is a reason against migration. A component adds it while it needs the guest to stay (a device is passed
through, a disk is being copied), and deletes it afterwards. A device may also declare that it cannot be migrated at
all. Both refuse a migration before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import ConfigError, GuestFailed, StateError
from ..guest import MortalGuest

if TYPE_CHECKING:
    from ..guest import DeviceProtocol, Guest


class Blocker:
    """One reason, in force until it is deleted. Made by :meth:`Blockers.add`."""

    def __init__(self, reason: str, delete: Callable[[Blocker], None]) -> None:
        self._reason = reason
        self._delete = delete

    def __repr__(self) -> str:
        return f"<Blocker {self._reason!r}>"

    @property
    def reason(self) -> str:
        """The reason as a sentence for people."""
        return self._reason

    def delete(self) -> None:
        """Delete the blocker. Always allowed, also during a migration; idempotent."""
        self._delete(self)


class Blockers:
    """The blockers of one guest.

    Args:
        busy: returns the purpose that the guest is reserved for, or None; during a migration no blocker can be added.
        only_migratable: nothing that prevents a migration is allowed at all: QEMU's ``--only-migratable``.
    """

    def __init__(self, *, busy: Callable[[], str | None] = lambda: None, only_migratable: bool = False) -> None:
        self._busy = busy
        self._blockers: list[Blocker] = []
        self._only_migratable = only_migratable
        self._lacking: str | None = None

    @property
    def only_migratable(self) -> bool:
        """Whether everything that prevents a migration is refused."""
        return self._only_migratable

    def refuse_all(self) -> None:
        """Refuse everything that prevents a migration from now on, as the argument ``only_migratable`` does."""
        self._only_migratable = True

    def set_lacking(self, reason: str | None) -> None:
        """For the engine: the reason after a lost postcopy (missing pages), or None. It stays until the next guest is
        received. It is no blocker that could be refused.
        """
        self._lacking = reason

    def add(self, reason: str) -> Blocker:
        """Refuse migrations from now on, until the blocker is deleted.

        Raises:
            ConfigError: ``only_migratable`` is on; its ``name`` is ``only-migratable``.
            StateError: a migration is under way, and comes too late to be refused.
        """
        if self._only_migratable:
            raise ConfigError(
                f"no migration blocker is allowed (only-migratable), for: {reason}", name="only-migratable"
            )
        if (purpose := self._busy()) is not None:
            raise StateError(f"no migration blocker can be added now (in progress: {purpose}), for: {reason}")
        blocker = Blocker(reason, self._remove)
        self._blockers.append(blocker)
        return blocker

    def _remove(self, blocker: Blocker) -> None:
        if blocker in self._blockers:
            self._blockers.remove(blocker)

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons, the most recent first."""
        explicit = tuple(blocker.reason for blocker in reversed(self._blockers))
        return explicit if self._lacking is None else (self._lacking, *explicit)

    def check(self) -> None:
        """Refuse if there is a blocker.

        Raises:
            StateError: with the first of :attr:`reasons`.
        """
        for reason in self.reasons[:1]:
            raise StateError(f"the migration is blocked: {reason}")


@runtime_checkable
class Blockable(Protocol):
    """A guest that has blockers."""

    @property
    def blockers(self) -> Blockers:
        """The blockers of the guest."""


@runtime_checkable
class DeclaringDevice(Protocol):
    """A device that declares whether it can be migrated."""

    @property
    def unmigratable(self) -> str | None:
        """Why the device cannot be migrated; None if it can."""


def why_unmigratable(device: DeviceProtocol) -> str | None:
    """Why *device* cannot be migrated; None if it can, or declares nothing."""
    return (device.unmigratable or None) if isinstance(device, DeclaringDevice) else None


def unmigratable(guest: Guest) -> Iterator[str]:
    """One sentence for each device that declares that it cannot be migrated."""
    for (idstr, _), device in (guest.devices or {}).items():
        if reason := why_unmigratable(device):
            yield f"device {idstr!r} cannot be migrated: {reason}"


def reasons(guest: Guest) -> tuple[str, ...]:
    """All reasons against a migration of *guest*: QEMU's ``blocked-reasons``."""
    explicit = guest.blockers.reasons if isinstance(guest, Blockable) else ()
    lost = why_lost(guest)
    return (*(() if lost is None else (lost,)), *explicit, *unmigratable(guest))


def why_lost(guest: Guest) -> str | None:
    """Why *guest* is lost; None if it is not, or cannot tell."""
    return guest.lost if isinstance(guest, MortalGuest) else None


def check_alive(guest: Guest) -> None:
    """Raise GuestFailed if *guest* is lost."""
    if (lost := why_lost(guest)) is not None:
        raise GuestFailed(lost)


def check_outgoing(guest: Guest) -> None:
    """Refuse to migrate a blocked guest.

    Raises:
        StateError: the guest is lost; naming the device; or with the most recent reason.
    """
    if (lost := why_lost(guest)) is not None:
        raise StateError(f"the migration is blocked: {lost}")
    check_incoming(guest)
    if isinstance(guest, Blockable):
        guest.blockers.check()


def lacks(guest: Guest, pages: int) -> None:
    """For the engine: *guest* lacks *pages* pages, so it must not be sent; 0 if none is missing, or the next guest
    comes.
    """
    if isinstance(guest, Blockable):
        what = f"{pages} pages of the guest's memory never came, as a postcopy was lost; receive it anew"
        guest.blockers.set_lacking(what if pages else None)


def check_incoming(guest: Guest) -> None:
    """Refuse to fill a guest with a device that cannot be migrated. Blockers do not affect an incoming migration.

    Raises:
        StateError: naming the device.
    """
    for reason in unmigratable(guest):
        raise StateError(reason)
