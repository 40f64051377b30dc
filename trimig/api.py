"""The two calls: :func:`migrate` and :func:`receive`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from . import transport
from .channel import closing
from .channel.connections import Connections
from .config.config import Config
from .engine.destination import receive_stream
from .engine.source import migrate_stream
from .errors import TransportFailed
from .expected import expect, expect_callable
from .guest import Guest
from .monitor.monitor import Monitor, core_of

if TYPE_CHECKING:
    from .channel.channel import AnyStream
    from .engine.source.outgoing import CommitHook, FenceHook
    from .monitor.statistics import Summary
    from .transport._interface import Listener


async def migrate(
    guest: Guest,
    to: str | trio.abc.SendStream,
    config: Config | None = None,
    *,
    monitor: Monitor | None = None,
    commit: CommitHook | None = None,
    fence: FenceHook | None = None,
) -> Summary:
    """Move a running guest to another process or host.

    Args:
        guest: what to move. It keeps running until the switchover.
        to: a URI (``tcp:HOST:PORT``, ``unix:PATH``, …) or a connected stream. The call owns the stream and closes it on
            every path. A stream that can only send has no return path. If the stream has a method ``delivered()``, the
            call waits for it: it returns when all bytes have reached their target.
        config: capabilities, parameters and options; the defaults if None.
        monitor: watches and steers the migration; other tasks may use it as well.
        commit: called after the destination has proved that it has everything, and before the decision is sent. Record
            the decision durably here. If it fails, the migration is undone.
        fence: called when the answer to the decision is missing, before HandoverUncertain is raised. It returns the
            owner once the owner is certain (because it asked the destination, or fenced it off), UNKNOWN otherwise.

    Returns:
        The figures of the migration. The destination owns the guest; here the guest stays paused for good.

    Raises:
        MigrationError: this side has its guest, in the run state that it had; it is safe to go on.
        GuestNotResumed: this side has its guest, and the guest is stopped; ``guest.resume()`` may be tried again.
        HandoverUncertain: the decision was sent and no answer came. The guest stays paused here, on purpose, until
            ``guest.settle()``.
        PostcopyLost: the destination has the guest, without all of its memory.
        NotOwner: this side does not own the guest. Nothing was done, except that a stream given as *to* is closed.
        StateError: the guest or the monitor is busy, or the guest is blocked (:class:`trimig.Blockers`). Nothing was
            done, as for NotOwner.
        ConfigError: the configuration contradicts itself or the transport. Nothing was done, as for NotOwner.

    **Cancellation:** up to the decision the migration never happened: the guest is in the run state it had, and a new
    attempt may be made at once. From the decision to its answer a cancellation is held off, for at most
    ``handover_timeout`` seconds; then the call returns, or raises the error that fits the outcome. In postcopy the
    switch is the decision. After the switch a cancellation is held off for as long as memory is sent over a connection,
    however long that takes. While the connection is lost, a cancellation ends the call: with PostcopyLost, or with
    HandoverUncertain if the destination has not confirmed yet that it has the guest.
    """
    _check_trio("trimig.migrate")
    try:
        check_migrate(guest, to, config, monitor, commit, fence)
        config = config or Config()
        caller = _Caller(to, config)
        return await migrate_stream(
            guest, caller.connections(), config, core_of(monitor or Monitor()), commit=commit, fence=fence
        )
    finally:
        await _dispose(to)


async def receive(
    guest: Guest, at: str | trio.abc.ReceiveStream, config: Config | None = None, *, monitor: Monitor | None = None
) -> Summary:
    """Be the destination of one migration.

    Args:
        guest: the guest to fill; it must not be running.
        at: a URI to listen on (the address with its real port is in ``monitor.addresses``), or a connected stream. The
            call owns the stream and closes it on every path. At a URI the source is recognised by its first bytes.
            Other connections are dropped, or wait without an answer, and do not end the call. Without TLS, any peer
            that sends a source's first bytes is taken for the source.
        config: capabilities, parameters and options; the defaults if None.
        monitor: watches and steers the migration.

    Returns:
        The figures of the migration. This side owns the guest, in the run state that it had at the source.

    Raises:
        MigrationError: the guest is not here and never ran here: its memory and devices are undefined until the next
            whole migration. If there is a return path, the source was told that.
        PostcopyLost: the guest is here without all of its memory, and is stopped.
        HandoverUncertain: the guest came by postcopy, and its source, a QEMU from 11.1 on, may have taken it back. The
            guest stands still here until its owner is settled.
        NotOwner: the owner of the guest given is not known: call ``guest.settle()`` first.
        StateError, ConfigError: the call was not possible. Nothing was done, except that a stream given as *at* is
            closed.

    **Cancellation:** up to the decision of the source as for a MigrationError. If the decision has been read, the guest
    is activated and the call returns, or raises the error that fits the outcome, within ``handover_timeout`` seconds.
    In postcopy the package is the decision. After it a cancellation is held off for as long as memory is received over
    a connection, however long that takes. While the connection is lost, a cancellation ends the call with PostcopyLost,
    or with HandoverUncertain if the source may have taken its guest back; then the guest stays stopped here.
    """
    _check_trio("trimig.receive")
    try:
        check_receive(guest, at, config, monitor)
        monitor, config = monitor or Monitor(), config or Config()
        acceptor = _Acceptor(at, config, monitor)
        try:
            return await receive_stream(guest, acceptor.connections(), config, core_of(monitor))
        finally:
            acceptor.close()
    finally:
        await _dispose(at)


def _check_trio(what: str) -> None:
    """Raise RuntimeError, as trio does, unless this is a task of trio."""
    if not trio.lowlevel.in_trio_task():
        raise RuntimeError(
            f"{what} must be called in a task of trio; a program on asyncio, or without an event loop, calls it through "
            "trimig.portal"
        )


def check_migrate(
    guest: object, to: object, config: object, monitor: object, commit: object = None, fence: object = None
) -> None:
    """Raise TypeError, naming the argument, if :func:`migrate` cannot be called with these."""
    _check_both(guest, config, monitor)
    _check_way("to", to, trio.abc.SendStream)
    expect_callable("commit", commit, "an async function without arguments, or None")
    expect_callable("fence", fence, "an async function that returns a trimig.Ownership, or None")


def check_receive(guest: object, at: object, config: object, monitor: object) -> None:
    """Raise TypeError, naming the argument, if :func:`receive` cannot be called with these."""
    _check_both(guest, config, monitor)
    _check_way("at", at, trio.abc.ReceiveStream)


def _check_both(guest: object, config: object, monitor: object) -> None:
    expect("guest", guest, Guest, "a trimig.Guest such as a trimig.AppGuest")
    expect("config", config, (Config, type(None)), "a trimig.Config, or None for the defaults")
    expect("monitor", monitor, (Monitor, type(None)), "a trimig.Monitor, or None")


def _check_way(name: str, way: object, stream: type[object]) -> None:
    what = "a URI (a str such as 'tcp:host:4444' or 'unix:/path') or a trio stream"
    expect(name, way, (str, stream), what)


class _Caller:
    """Opens the connections of a source: the first one, the second one of postcopy-preempt, and those of a recovery."""

    def __init__(self, to: str | trio.abc.SendStream, config: Config) -> None:
        self._to = to
        self._config = config
        if isinstance(to, str):
            transport.check(to)

    def connections(self) -> Connections:
        """What the engine calls."""
        several = isinstance(self._to, str) and transport.multiple_channels(self._to)
        return Connections(first=self._first, again=self._again, beside=self._beside if several else None)

    async def _first(self) -> AnyStream:
        if isinstance(self._to, str):
            return await self._beside()
        await trio.lowlevel.checkpoint()
        return self._to

    async def _again(self, uri: str | None) -> AnyStream:
        """Connect again after a loss: to *uri*, or to the address of the last connection."""
        uri = uri or _address(self._to)
        transport.check(uri)
        stream = await transport.connect(uri, self._config)
        self._to = uri
        return stream

    async def _beside(self) -> AnyStream:
        return await transport.connect(_address(self._to), self._config)


class _Acceptor:
    """Accepts the connections of a receiver: several connections at an address, or the one stream of the caller."""

    def __init__(self, at: str | trio.abc.ReceiveStream, config: Config, monitor: Monitor) -> None:
        self._at = at
        self._config = config
        self._monitor = monitor
        self._listener: Listener | None = None

    def connections(self) -> Connections:
        """What the engine calls."""
        several = isinstance(self._at, str) and transport.multiple_channels(self._at)
        return Connections(first=self._first, again=self._again, entrance=self._open if several else None)

    async def _first(self) -> AnyStream:
        if not isinstance(self._at, str):
            await trio.lowlevel.checkpoint()
            return self._at
        return await self._accept(self._at)

    async def _open(self, uri: str | None) -> Listener:
        """Listen at *uri*, or for None at the last address."""
        self.close()
        listener = self._listener = await transport.listen(uri or _address(self._at), self._config)
        self._listening(listener.uri)
        return listener

    async def _again(self, uri: str | None) -> AnyStream:
        """Accept one more connection: at *uri*, or for None at the last address."""
        self.close()
        return await self._accept(uri or _address(self._at))

    async def _accept(self, uri: str) -> AnyStream:
        listener = self._listener = await transport.listen(uri, self._config)
        try:
            self._listening(listener.uri)
            return await listener.accept()
        finally:
            self.close()  # a stream is one connection

    def _listening(self, *addresses: str) -> None:
        if isinstance(self._at, str) and len(addresses) == 1:
            self._at = addresses[0]  # with its real port: a peer that reconnects uses that one
        core_of(self._monitor).listening(*addresses)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()


def _address(given: str | AnyStream) -> str:
    if not isinstance(given, str):
        raise TransportFailed("the connection was given as a stream: only recover(uri) knows where to find another one")
    return given


async def _dispose(stream: object) -> None:
    """Close a stream that was never passed to the engine; closing twice is harmless."""
    if isinstance(stream, trio.abc.AsyncResource):
        await closing.close(stream)
