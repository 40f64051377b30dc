"""The two calls: :func:`migrate` and :func:`receive`."""

from __future__ import annotations

import functools

import trio

from . import transport
from .config import Config
from .engine import teardown
from .engine.channel import AnyStream, OpenStream
from .engine.departure import CommitHook, FenceHook
from .engine.destination import receive_stream
from .engine.source import migrate_stream
from .errors import TransportFailed
from .guest import Guest
from .info import Summary
from .monitor import Monitor


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
        to: a URI (``tcp:HOST:PORT``, ``unix:PATH``, …) or a connected stream, which is owned and closed on every path.
            One that can only send has no return path; if it can tell when everything has arrived where it was to
            go (``delivered()``), that is waited for.
        config: capabilities, parameters and options; the defaults if None.
        monitor: watches and steers; may be shared with other tasks.
        commit: called when the destination has proved that it has everything, and before the decision is sent: the
            place to record the decision durably. If it fails, everything is taken back.
        fence: called when the answer to the decision is missing, before HandoverUncertain: returns the owner once that
            is certain (because the destination was asked, or has been fenced off), UNKNOWN otherwise.

    Returns:
        What it took. The destination owns the guest; it is paused here, for good.

    Raises:
        HandoverUncertain: the decision was sent and no answer came. The guest stays paused here, on purpose.
        GuestFailed: also if the guest could not be resumed; its owner is then the source, and it can be tried again.
        MigrationError: anything else; ``owner`` is SOURCE and the guest is in the run state that it had.
        StateError: the guest or the monitor is busy, or the guest is blocked (:class:`trimig.Blockers`); nothing was
            done, but a stream given as *to* is closed.

    **Cancellation:** up to the decision the migration never happened: the guest is in the run state it had, and a new
    attempt may be made at once. From the decision to its answer a cancellation is held off, for at most
    ``handover_timeout`` seconds.
    """
    config = config or Config()
    try:
        opener = _connector(to, config)
        return await migrate_stream(
            guest,
            opener,
            config,
            monitor or Monitor(),
            commit=commit,
            fence=fence,
            reopen=functools.partial(_connect_again, to, config),
        )
    finally:
        await _dispose(to)


async def receive(
    guest: Guest, at: str | trio.abc.ReceiveStream, config: Config | None = None, *, monitor: Monitor | None = None
) -> Summary:
    """Be the destination of one migration.

    Args:
        guest: what to fill; it must not be running.
        at: a URI to listen on (for one connection; the address with its real port is in ``monitor.addresses``), or a
            connected stream, which is owned and closed on every path.
        config: capabilities, parameters and options; the defaults if None.
        monitor: watches and steers.

    Returns:
        What it took. The guest is this side's, and in the run state that it had at the source.

    Raises:
        MigrationError: the guest is not here: its memory and devices are undefined until the next whole migration. The
            source has been told, where there is a return path.

    **Cancellation:** up to the decision of the source as for an error. If the decision has been read, the guest is
    brought to life and the call returns, or fails, within ``handover_timeout`` seconds.
    """
    monitor, config = monitor or Monitor(), config or Config()
    try:
        acceptor = _Acceptor(at, config, monitor)
        return await receive_stream(guest, acceptor.first, config, monitor, reopen=acceptor.again)
    finally:
        await _dispose(at)


def _connector(to: str | trio.abc.SendStream, config: Config) -> OpenStream:
    if not isinstance(to, str):
        return _stream(to)
    transport.check(to)
    return functools.partial(transport.connect, to, config)


async def _connect_again(to: str | trio.abc.SendStream, config: Config, uri: str | None) -> AnyStream:
    """Another connection when one was lost in postcopy: to *uri*, or to where the first one went."""
    uri = uri or _again(to)
    transport.check(uri)
    return await transport.connect(uri, config)


def _again(given: str | AnyStream) -> str:
    if not isinstance(given, str):
        raise TransportFailed("the connection was given as a stream: only recover(uri) knows where to find another one")
    return given


def _stream(stream: AnyStream) -> OpenStream:
    async def given() -> AnyStream:
        await trio.lowlevel.checkpoint()
        return stream

    return given


class _Acceptor:
    """Where a receiver waits: for its first connection, and in postcopy for others."""

    def __init__(self, at: str | trio.abc.ReceiveStream, config: Config, monitor: Monitor) -> None:
        self._at = at
        self._config = config
        self._monitor = monitor

    async def first(self) -> AnyStream:
        """The stream that was given, or one that is accepted at the address that was."""
        if not isinstance(self._at, str):
            await trio.lowlevel.checkpoint()
            return self._at
        return await self._accept(self._at)

    async def again(self, uri: str | None) -> AnyStream:
        """One more: at *uri*, or for None where the first one was."""
        return await self._accept(uri or _again(self._at))

    async def _accept(self, uri: str) -> AnyStream:
        async with transport.listening(uri, self._listening, self._config) as listener:
            return await listener.accept()

    def _listening(self, *addresses: str) -> None:
        if isinstance(self._at, str) and len(addresses) == 1:
            self._at = addresses[0]  # with its real port: a peer that comes again knows no other
        self._monitor.listening(*addresses)


async def _dispose(stream: str | AnyStream) -> None:
    """Close a stream that the engine never got hold of; closing twice is harmless."""
    if not isinstance(stream, str):
        await teardown.close(stream)
