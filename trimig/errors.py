"""Every error that trimig raises, and the owner of the guest for each.

All errors derive from :class:`TrimigError`. The class tells the caller how to go on:

* :class:`MigrationError` and its subclasses, raised by :func:`trimig.migrate`: this side has its guest, in the run state
  that it had. Raised by :func:`trimig.receive`: this side has no guest and never ran one. It is safe to go on.
* :class:`ConfigError` and :class:`StateError` (with :class:`NotOwner`): the call was not possible, and nothing was
  changed. They say nothing about the owner.
* :class:`GuestNotResumed`, :class:`HandoverUncertain` and :class:`PostcopyLost` belong to neither group: the caller must
  act before the guest may be used.

The subclasses of MigrationError are named by the cause: the peer's bytes (:class:`RemoteProtocolError`), a refusal of the
peer (:class:`PeerFailed`), the connection (:class:`TransportFailed`), the guest (:class:`GuestFailed`), this side
(:class:`LocalProtocolError`, :class:`InternalError`), or no fault at all (:class:`MigrationCancelled`,
:class:`NotConverging`). The engine chooses the class by the status of the migration. The class never decides the status.

This module imports nothing of trimig.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType


class Ownership(enum.Enum):
    """Which side may run the guest."""

    SOURCE = "source"
    DESTINATION = "destination"
    #: The decision was sent and its answer is missing: do not start the guest on either side by a guess.
    UNKNOWN = "unknown"


class Owner(enum.Enum):
    """Whether a guest may run in this process: :attr:`trimig.guest.Guest.owner`."""

    #: This side owns the guest.
    HERE = "here"
    #: The guest has been handed over, or it is to be received and has not arrived.
    ELSEWHERE = "elsewhere"
    #: The guest was handed over, and the answer is missing: ``guest.settle`` resolves it.
    UNKNOWN = "unknown"


class TrimigError(Exception):
    """Root of all errors of this package.

    Attributes:
        owner: which side of the migration may run the guest now; None if the error does not tell that.
        others: further errors of the same attempt, less important than this one (for logs; no decision needs them).
    """

    def __init__(self, message: str, *, owner: Ownership | None = None) -> None:
        super().__init__(message)
        self.owner = owner
        self.others: Sequence[BaseException] = ()

    def complete(self, *others: BaseException, owner: Ownership | None = None) -> None:
        """For the engine: set *others*, and the owner if it is given, at the end of the attempt."""
        self.others = others
        if owner is not None:
            self.owner = owner


class MigrationError(TrimigError):
    """The migration did not take place. At the source the guest is unchanged; at the destination there is no guest."""

    def __init__(self, message: str, *, owner: Ownership | None = Ownership.SOURCE) -> None:
        super().__init__(message, owner=owner)


class ConfigError(TrimigError, ValueError):
    """A capability, parameter or option that is unknown, out of range, contradictory or not built yet.

    Attributes:
        name: the option, in QMP spelling (``downtime-limit``), or None where several are concerned.
    """

    def __init__(self, message: str, *, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class StateError(TrimigError):
    """The call is not possible in the present status; nothing was changed.

    Attributes:
        status: the status (QEMU's spelling) that forbids it, or None where the guest itself is busy.
    """

    def __init__(self, message: str, *, status: str | None = None, owner: Ownership | None = None) -> None:
        super().__init__(message, owner=owner)
        self.status = status


class NotOwner(StateError):
    """This side does not own the guest: it was handed over, has not arrived, or its owner is not known.

    Attributes:
        guest_owner: the guest's owner at that moment, ELSEWHERE or UNKNOWN.
    """

    def __init__(self, message: str, *, guest_owner: Owner = Owner.ELSEWHERE) -> None:
        super().__init__(message)
        self.guest_owner = guest_owner


class LocalProtocolError(MigrationError):
    """This side was about to break the protocol: the guest or the caller gave data that cannot be sent."""


class RemoteProtocolError(MigrationError):
    """The peer sent bytes that are not a migration stream, or not one for this guest.

    Attributes:
        offset: position of the offending element in that direction of the stream, in bytes from its start; None
            where the whole stream is meant (something is missing from it).
        section: the section that was being read (``"ram"``, ``"0000:00:01.3/piix4_pm"``, ``"configuration"``), or None.
        reason: the sentence without position.
    """

    def __init__(self, reason: str, *, offset: int | None = None, section: str | None = None) -> None:
        where = "" if offset is None else f"at byte {offset} (0x{offset:x})"
        if section is not None:
            where += f"{', ' if where else ''}in section {section!r}"
        super().__init__(f"{reason} [{where}]" if where else reason)
        self.reason = reason
        self.offset = offset
        self.section = section


class Loss(enum.Enum):
    """How a connection was lost."""

    #: The peer has closed it, or the link broke.
    CLOSED = "closed"
    #: The peer was silent for too long, or took no data.
    SILENT = "silent"


class TransportFailed(MigrationError):
    """The connection could not be made, broke, or ended too early; or the peer was silent for too long.

    Attributes:
        loss: how the connection was lost; None if there was none, or for another fault, such as an alert of TLS.
    """

    def __init__(self, message: str, *, loss: Loss | None = None) -> None:
        super().__init__(message)
        self.loss = loss


class PeerFailed(MigrationError):
    """The peer refused: it reported an error of its own over the return path.

    Attributes:
        code: the number in the SHUT message (QEMU and trimig send 1).
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class GuestFailed(MigrationError):
    """A call into the guest failed (pause, resume, a device, its storage); the message names the call."""


class NotConverging(MigrationError):
    """The bound on iterations or time was reached while the guest dirtied memory faster than it could be sent.

    Attributes:
        reason: why the migration does not converge, with the deciding figures; part of the message.
        advice: measures that would help, one clause each; part of the message, too.
    """

    def __init__(self, message: str, *, reason: str = "", advice: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.advice = tuple(advice)


class MigrationCancelled(MigrationError):
    """:meth:`trimig.Monitor.cancel` was called; the guest is as it was before.

    Attributes:
        reason: the reason given to ``cancel``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the migration was cancelled: {reason}")
        self.reason = reason


class GuestNotResumed(TrimigError):
    """The migration did not take place, and the guest, which is the source's, could not be put back into its run state.

    The guest is stopped. ``guest.resume()`` may be called again.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, owner=Ownership.SOURCE)


class HandoverUncertain(TrimigError):
    """The decision to hand over was sent, and no answer came: the destination may be running the guest.

    The guest stays paused here on purpose. Find out the owner (ask the destination, or fence it), then state it with
    :meth:`settle`, or with the guest's own ``settle``.

    Attributes:
        settled: None until :meth:`settle` has succeeded, then the owner that was given.
    """

    def __init__(
        self,
        message: str,
        *,
        settle: Callable[[Owner], Awaitable[None]] | None = None,
        here: Ownership = Ownership.SOURCE,
    ) -> None:
        """
        Args:
            settle: the guest's ``settle``; None where no guest is in this process.
            here: the side of this process.
        """
        super().__init__(message, owner=Ownership.UNKNOWN)
        self._settle = settle
        self._here = here
        self.settled: Ownership | None = None

    async def settle(self, owner: Ownership) -> None:
        """State the owner of the guest. At the source, SOURCE resumes the guest (if it ran before), DESTINATION gives
        it up.

        Raises:
            TypeError: *owner* is no :class:`Ownership`.
            ValueError: *owner* is UNKNOWN.
            StateError: the owner was settled already, or another task is settling it right now.
            GuestNotResumed: the owner is settled, and the guest could not be resumed; ``guest.resume()`` may be tried
                again.

        **Cancellation:** cancelled before anything was done, or not at all.
        """
        if not isinstance(owner, Ownership):
            raise TypeError(
                f"owner must be trimig.Ownership.SOURCE or trimig.Ownership.DESTINATION, not {owner!r} "
                "(guest.settle is the one that takes a trimig.Owner)"
            )
        if owner is Ownership.UNKNOWN:
            raise ValueError("settle needs a definite owner: Ownership.SOURCE or Ownership.DESTINATION")
        if self.settled is not None:
            raise StateError(f"already settled: the owner is the {self.settled.value}")
        try:
            if self._settle is not None:
                await self._settle(Owner.HERE if owner is self._here else Owner.ELSEWHERE)
        except GuestNotResumed:
            self.settled = self.owner = owner
            raise
        self.settled = self.owner = owner


class PostcopyLost(TrimigError):
    """The guest is at the destination, and the rest of its memory is lost.

    On the destination the guest is stopped. It keeps the pages it has, and cannot be migrated again.
    ``guest.resume()`` runs it with zeros for the missing pages. The source keeps its half, too.

    Attributes:
        missing: on the destination, the pages that never came, by the block's name: pairs of the first page and the
            page after the last. Empty on the source.
    """

    def __init__(self, message: str, *, missing: Mapping[str, Sequence[tuple[int, int]]] | None = None) -> None:
        super().__init__(message, owner=Ownership.DESTINATION)
        self.missing = MappingProxyType(dict(missing or {}))


class InternalError(MigrationError):
    """A fault of trimig, or of the guest's code or a hook that trimig called.

    The traceback of ``__cause__`` ends in the code that raised it. Please report a fault of trimig with that traceback.
    """
