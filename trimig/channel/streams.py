"""What a stream may be able to do, beside what trio's streams can."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Delivering(Protocol):
    """A stream that can confirm the delivery of its bytes: a child has ended with success, a file is on the disk.

    Without a return path this confirmation is the only answer about the migration.
    """

    async def delivered(self) -> None:
        """Wait until all bytes that were sent have been delivered. After this call nothing more is sent.

        Raises:
            TransportFailed: the bytes were not delivered, or that cannot be known.

        **Cancellation:** as for an error.
        """


@runtime_checkable
class PerhapsSilent(Protocol):
    """A stream that can be read from, whose peer may be a program that never answers.

    A command that passes the stream on to a destination answers. A command that stores the stream does not answer.
    """

    @property
    def perhaps_silent(self) -> bool:
        """True if the end of the return path, or silence on it, is no error before the first message of the peer."""


@runtime_checkable
class Layered(Protocol):
    """A stream over another one."""

    @property
    def transport(self) -> object:
        """The stream that carries this stream."""


@runtime_checkable
class IntoBuffer(Protocol):
    """A stream that can receive into a buffer of the caller, without a bytes object in between."""

    async def receive_into(self, view: memoryview) -> int:
        """Receive bytes into *view*, and return their number; 0 at the end of the stream.

        **Cancellation:** nothing was taken.
        """
