"""Connections wait here until their first bytes show which of them comes from the source.

Other programs than the source can reach the port of a listener: port checks, browsers, programs with another protocol.
So each connection is a *visitor* with a task of its own. The task makes the handshakes of TLS and of a websocket, and
reads up to 16 KiB. A function, the *judge*, examines these bytes. Before a visitor is chosen, only the handshakes are
written to it. A silent visitor is kept, because a source may be slow to send. It costs a descriptor. It is dropped when
the lobby closes, or when too many visitors wait.

A program that has read a stream can copy the bytes that a judge accepts. TLS keeps such a program out; a judge does not.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import logging
import math
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

import trio

from ..errors import RemoteProtocolError, TransportFailed, TrimigError
from . import closing

if TYPE_CHECKING:
    from .channel import AnyStream

log = logging.getLogger("trimig.lobby")

#: The number of visitors that may wait, beside those that are wanted. If one more comes, the visitor that has waited longest is dropped.
MOST_WAITING: Final = 64
#: Bytes that are read from a visitor before it is chosen.
MOST_READ: Final = 16 << 10
#: Drops that are reported one by one. After them only the 20th, 40th, 80th drop and so on are reported.
_TOLD_SINGLY: Final = 10
#: Seconds for which a visitor with the verdict ALONE must be the only visitor before it is chosen.
_ALONE_SECONDS: Final = 0.2
#: Errors of accept() that mean that no descriptor or memory is free at the moment.
_SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SHORTAGE_SECONDS: Final = 0.1
#: Errors of accept() that belong to the new connection, not to the listener: the next connection may be good.
_OF_ONE: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EINTR,
    }
)


class Verdict(enum.Enum):
    """The result of a judge for the first bytes of a visitor. To drop the visitor, a judge raises :class:`NotTheOne`."""

    #: The bytes are too few for a verdict.
    MORE = enum.auto()
    #: The visitor is another connection of the same source, which a later judge chooses. It waits, with any number of bytes.
    LATER = enum.auto()
    #: The visitor is chosen if no other visitor comes for a moment.
    ALONE = enum.auto()
    #: The visitor is chosen.
    YES = enum.auto()


#: Gets all bytes that a visitor has sent so far.
Judge: TypeAlias = Callable[[bytes], Verdict]
#: Called for a dropped visitor with its address and the reason.
Told: TypeAlias = Callable[[str, str], None]


class NotTheOne(Exception):
    """A judge refuses a visitor, which is dropped. The message is the reason.

    Attributes:
        telling: what its first bytes show about other settings of the source (such as multifd). The error of a failed
            migration has this text. None if the bytes show nothing.
    """

    def __init__(self, reason: str, telling: str | None = None) -> None:
        super().__init__(reason)
        self.telling = telling


class NotWanted(NotTheOne):
    """A judge refuses a visitor that is a connection of a source with other settings. It is kept open, and never chosen.

    A QEMU whose data channel is closed while it waits for another one may hang. It is told first that the migration fails.
    """


class Entrance(Protocol):
    """A listener, as far as a lobby needs one."""

    async def meet(self) -> AnyStream:
        """The next connection, as it is accepted.

        Raises:
            OSError: accept() failed.
            trio.ClosedResourceError: it was closed, perhaps in the moment in which a connection came.
            TrimigError: no connection can come any more.

        **Cancellation:** nothing was accepted.
        """

    async def admit(self, stream: AnyStream) -> AnyStream:
        """*stream* after the opening handshakes of this address. The method owns *stream*, and has no timeout.

        Raises:
            TrimigError: a handshake failed.

        **Cancellation:** *stream* is closed.
        """

    def close(self) -> None:
        """Accept no more. Idempotent."""


@runtime_checkable
class Certified(Protocol):
    """A stream whose peer may have proved who it is."""

    def peer_certificate(self) -> bytes | None:
        """The verified certificate of the peer; None if the peer sent none."""


def accept_pause(error: OSError) -> float | None:
    """Seconds after which accept() may be called again; None if the listening socket itself cannot be used any more."""
    if error.errno in _SHORTAGE:
        return _SHORTAGE_SECONDS
    return 0.0 if error.errno in _OF_ONE else None


class _Visitor:
    """One connection that waits.

    Attributes:
        address: the address of the peer, for messages.
        origins: properties that connections of one source share: address, user, certificate.
        stream: the stream after the handshakes; None before.
        data: the bytes that were read so far.
        possible: True if the judge's verdict was ALONE.
        later: True if the judge's verdict was LATER, or if there was no judge for the bytes that came last.
        unwanted: True if a judge has raised :class:`NotWanted` for it.
        chosen: True if the visitor was chosen; then its stream belongs to the caller of :meth:`Lobby.choose`.
        left: set when the visitor's task does not use the stream any more.
    """

    def __init__(self, raw: AnyStream) -> None:
        self.address, self.origins = _origin(raw)
        self.stream: AnyStream | None = None
        self.data = bytearray()
        self.scope = trio.CancelScope()
        self.possible = False
        self.later = False
        self.unwanted = False
        self.chosen = False
        self.left = trio.Event()

    def behind_tls(self) -> bool:
        """True if this side has finished the TLS handshake."""
        return isinstance(self.stream, Certified)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The connection that a judge accepted.

    Attributes:
        stream: the stream; it belongs to the caller.
        first: the bytes that were already read from it. They come before the bytes that are still in the stream.
        origins: see :meth:`Lobby.prefer`.
    """

    stream: AnyStream
    first: bytes
    origins: frozenset[str]


class Lobby:
    """The visitors of one address.

    Args:
        nursery: of the attempt; the tasks of the visitors run in it.
        told: called for dropped visitors. If many are dropped, it is called for some of them.
        wanted: number of the connections that are wanted beside the main one. So many more visitors may wait.
    """

    def __init__(self, nursery: trio.Nursery, entrance: Entrance, told: Told, *, wanted: int = 0) -> None:
        self._most = MOST_WAITING + wanted
        self._nursery = nursery
        self._entrance = entrance
        self._told = told
        self._scope = trio.CancelScope()
        self._visitors: list[_Visitor] = []
        self._judge: Judge | None = None
        self._found: _Visitor | None = None
        self._failure: TrimigError | None = None
        self._changed = trio.Event()
        self._preferred: frozenset[str] = frozenset()
        #: The number of dropped visitors.
        self.dropped = 0
        #: The reason of the last drop.
        self.last_reason: str | None = None
        #: The text of :attr:`NotTheOne.telling` of the last dropped visitor that had such a text.
        self.telling: str | None = None
        self._telling_origins: frozenset[str] = frozenset()

    def open(self) -> None:
        """Begin to accept connections."""
        self._nursery.start_soon(self._accept, name="trimig.accept")

    def close(self) -> None:
        """Accept no more connections, and close those that wait. Idempotent."""
        self._scope.cancel("the lobby is closed")  # before the entrance closes: accept() of a closed socket is an error
        self._entrance.close()
        for waiting in self._visitors:
            waiting.scope.cancel("its place is taken")
        self._visitors.clear()
        self._judge = None

    @property
    def waiting(self) -> int:
        """The number of visitors that wait, with or without finished handshakes."""
        return len(self._visitors)

    @property
    def _candidates(self) -> list[_Visitor]:
        """The visitors that may be chosen."""
        return [visitor for visitor in self._visitors if not visitor.unwanted]

    @property
    def handshaking(self) -> bool:
        """True if a visitor has not finished its handshakes."""
        return any(visitor.stream is None for visitor in self._visitors)

    def prefer(self, origins: frozenset[str]) -> None:
        """If too many visitors wait, drop those that share one of *origins* last."""
        self._preferred = origins

    def hint(self, origins: frozenset[str] | None = None) -> str | None:
        """A reason for the failed migration that a dropped visitor shows; None if there is none.

        Args:
            origins: if given, only a dropped visitor that shares one of them counts.
        """
        if origins is not None and not origins & self._telling_origins:
            return None
        return self.telling

    # -- visitors --------------------------------------------------------------------------------------------------

    async def wait_visitor(self) -> None:
        """Wait until a visitor has finished its handshakes.

        Raises:
            TransportFailed: no visitor waits, and none can come any more.

        **Cancellation:** no effect.
        """
        while not any(visitor.stream is not None for visitor in self._candidates):
            self._check()
            await self._changed.wait()

    async def choose(self, judge: Judge, *, lonely: float = math.inf) -> Chosen:
        """The first visitor that *judge* accepts. The visitors that *judge* does not refuse go on waiting.

        Args:
            lonely: seconds without any visitor after which this method fails.

        Raises:
            TransportFailed: no visitor waits, and none can come any more; or *lonely* has passed, with the reason of the
                last drop.

        **Cancellation:** nothing was chosen.
        """
        self._judge, self._found = judge, None
        for waiting in self._visitors:
            waiting.possible = False
        taken = False
        try:
            for waiting in tuple(self._visitors):
                self._look(waiting)
            while (visitor := self._chosen_one()) is None:
                self._check()
                candidates = self._candidates
                only = candidates[0] if len(candidates) == 1 and candidates[0].possible else None
                patience = lonely if not candidates else math.inf if only is None else _ALONE_SECONDS
                with trio.move_on_after(patience) as alone:
                    await self._changed.wait()
                if not alone.cancelled_caught:
                    continue
                if only is None:
                    raise TransportFailed(self.last_reason or "there is no connection")
                self._choose(only)
            await visitor.left.wait()
            assert visitor.stream is not None
            taken = True
            return Chosen(stream=visitor.stream, first=bytes(visitor.data), origins=visitor.origins)
        finally:
            self._judge = None
            found, self._found = self._chosen_one(), None
            if not taken and found is not None and found.stream is not None:
                await closing.close(found.stream)

    def _chosen_one(self) -> _Visitor | None:
        return self._found

    def watch(self, judge: Judge) -> None:
        """Let *judge* examine visitors that are not needed. They may show why the migration is going to fail."""
        self._judge = judge
        for visitor in tuple(self._visitors):
            self._look(visitor)

    def _check(self) -> None:
        if self._failure is not None and not self._candidates:
            raise TransportFailed(str(self._failure)) from self._failure

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _look(self, visitor: _Visitor) -> None:
        """Let the judge examine the bytes of *visitor*, and act on the verdict."""
        if visitor.unwanted:
            return
        visitor.later = self._judge is None
        if self._judge is None or not visitor.data or visitor.chosen:
            return
        try:
            verdict = self._judge(bytes(visitor.data))
        except NotWanted as refusal:
            visitor.unwanted = visitor.later = True
            self._note(visitor, str(refusal), refusal.telling)
            return
        except NotTheOne as refusal:
            self._drop(visitor, str(refusal), refusal.telling)
            return
        except RemoteProtocolError as error:
            self._drop(visitor, str(error))
            return
        if verdict is Verdict.YES:
            self._choose(visitor)
        elif verdict is Verdict.ALONE:
            visitor.possible = True
            self._tell()
        elif verdict is Verdict.LATER:
            visitor.later = True
        elif verdict is Verdict.MORE and len(visitor.data) >= MOST_READ:
            self._drop(visitor, f"{len(visitor.data)} bytes came, and they do not say what it is")

    def _choose(self, visitor: _Visitor) -> None:
        visitor.chosen = True
        self._judge, self._found = None, visitor
        self._visitors.remove(visitor)
        visitor.scope.cancel("it was chosen")
        self._tell()

    def _drop(self, visitor: _Visitor, reason: str, telling: str | None = None) -> None:
        if visitor not in self._visitors:
            return
        self._visitors.remove(visitor)
        visitor.scope.cancel(reason)
        self._note(visitor, reason, telling)

    def _note(self, visitor: _Visitor, reason: str, telling: str | None) -> None:
        """Count a visitor that was refused, and report it."""
        self.last_reason = reason
        if telling is not None:
            self.telling, self._telling_origins = telling, visitor.origins
        self.dropped += 1
        more, left = divmod(self.dropped, _TOLD_SINGLY)
        if self.dropped <= _TOLD_SINGLY or (not left and more.bit_count() == 1):
            so_far = f" ({self.dropped} were dropped so far)" if self.dropped > _TOLD_SINGLY else ""
            self._told(visitor.address, f"{reason}{so_far}")
        self._tell()

    # -- tasks -----------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        with self._scope:
            try:
                while True:
                    try:
                        raw = await self._entrance.meet()
                    except OSError as error:
                        await self._rest(error)
                        continue
                    self._enter(raw)
            except TrimigError as error:
                self._failure = error
                self._tell()
            except trio.ClosedResourceError:
                # The lobby was closed in the moment in which a connection came. The connection is not needed.
                self._failure = TransportFailed("the listener was closed")
                self._tell()
            finally:
                self._entrance.close()

    async def _rest(self, error: OSError) -> None:
        pause = accept_pause(error)
        if pause is None:
            raise TransportFailed(f"no more connections can be accepted: {error.strerror or error}") from error
        if pause:
            log.warning("a connection cannot be accepted: %s", error.strerror)
            oldest = self._oldest() if self._visitors else None
            if oldest is not None and not oldest.origins & self._preferred:
                self._drop(oldest, "its descriptor is needed for another connection")
        await trio.sleep(pause)

    def _enter(self, raw: AnyStream) -> None:
        if len(self._visitors) >= self._most:
            self._drop(self._oldest(), f"{self._most} connections wait, and it has waited longest")
        visitor = _Visitor(raw)
        self._visitors.append(visitor)
        self._nursery.start_soon(self._visit, visitor, raw, name="trimig.visitor")

    def _oldest(self) -> _Visitor:
        """The visitor that is dropped first."""
        strange = [visitor for visitor in self._visitors if not visitor.origins & self._preferred]
        return (strange or self._visitors)[0]

    async def _visit(self, visitor: _Visitor, raw: AnyStream) -> None:
        handed_over = False  # True once the entrance owns *raw*: it closes the stream if the handshakes fail
        try:
            with visitor.scope:
                await trio.lowlevel.checkpoint_if_cancelled()
                handed_over = True
                visitor.stream = await self._entrance.admit(raw)
                if isinstance(visitor.stream, Certified) and (certificate := visitor.stream.peer_certificate()):
                    visitor.origins |= {f"certificate {certificate.hex()}"}
                self._tell()
                await self._listen(visitor, visitor.stream)
        except TrimigError as error:
            self._drop(visitor, str(error), f"the last connection that failed was from {visitor.address}: {error}")
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            reason = f"the connection broke: {error.__cause__ or error}"
            # With TLS 1.3 this side has finished the handshake before a client that refuses its certificate closes.
            refused = visitor.behind_tls() and not visitor.data
            telling = f"the last connection that failed was from {visitor.address}: {reason}" if refused else None
            self._drop(visitor, reason, telling)
        finally:
            visitor.left.set()
            if not visitor.chosen and (stream := visitor.stream or (None if handed_over else raw)) is not None:
                await closing.close(stream)

    async def _listen(self, visitor: _Visitor, stream: AnyStream) -> None:
        """Read from *stream* until the visitor is chosen or dropped; both cancel this method."""
        assert isinstance(stream, trio.abc.ReceiveStream)
        while len(visitor.data) < MOST_READ:
            data = await stream.receive_some(min(4096, MOST_READ - len(visitor.data)))
            if not data:
                if visitor.possible or visitor.later:
                    break  # it may still be chosen; the reader of the stream then finds the end
                said = f"after {len(visitor.data)} bytes" if visitor.data else "without sending anything"
                self._drop(visitor, f"it closed the connection {said}")
                return
            visitor.data += data
            self._look(visitor)
        await trio.sleep_forever()  # the cancellation by _choose(), _drop() or close() ends this


def _origin(raw: AnyStream) -> tuple[str, frozenset[str]]:
    """The address of the peer of *raw* for messages, and its origins for :meth:`Lobby.prefer`."""
    if not isinstance(raw, trio.SocketStream):
        return "a stream", frozenset()
    try:
        if raw.socket.family == socket.AF_UNIX:
            size = struct.calcsize("3i")
            pid, user, _ = struct.unpack("3i", raw.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            return f"process {pid} of user {user}", frozenset({f"user {user}"})
        host, port = raw.socket.getpeername()[:2]
    except OSError:
        return "an unknown address", frozenset()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", frozenset({f"address {host}"})
