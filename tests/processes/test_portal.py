"""The border: synchronous and asyncio callers, their ways of cancelling, and streams of anyio as channels.

Two portals stand for two processes, on real sockets of the loopback; the clock is the real one and nothing is measured.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
import trio
import trio.testing

import trimig
from trimig.errors import Ownership
from trimig.portal import Handle, Portal, from_anyio

LIMIT = 30
LISTEN = "tcp:127.0.0.1:0"
SIZE = 1 << 20


_MACHINES: list[trimig.AppGuest] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No memory and no portal's thread is left. (trio keeps idle helper threads for ten seconds; they are its own.)"""
    yield
    while _MACHINES:
        _MACHINES.pop().close()
    assert [t.name for t in threading.enumerate() if t.name == "trimig.portal"] == []


def machine(*, running: bool, on_pause: Callable[[], Awaitable[None]] | None = None) -> trimig.AppGuest:
    guest = trimig.AppGuest("portal", running=running, on_pause=on_pause)
    guest.add_ram("ram", SIZE)
    _MACHINES.append(guest)
    if running:
        guest.ram[0].pages[:] = 7
    return guest


def slow() -> trimig.Config:
    """A second and more for the memory: time to interrupt."""
    return trimig.Config(parameters=trimig.Parameters(max_bandwidth=SIZE // 8))


@pytest.fixture
def portal() -> Iterator[Portal]:
    with Portal() as made:
        yield made


@dataclasses.dataclass
class Arrival:
    """A receiver, where it listens, and what it fills."""

    handle: Handle
    uri: str
    guest: trimig.AppGuest


@pytest.fixture
def arrival(portal: Portal) -> Iterator[Arrival]:
    guest = machine(running=False)
    handle = portal.start_receive(guest, LISTEN)
    (uri,) = handle.wait_listening(LIMIT)
    made = Arrival(handle, uri, guest)
    yield made
    handle.cancel("the test is over")
    vars(made).clear()  # pytest keeps the object, and with the handle's error the memory would stay mapped


def arrives(guest: trimig.AppGuest) -> None:
    """*guest* can be migrated: whatever was tried before has left nothing behind."""
    there = machine(running=False)
    with Portal() as portal:
        handle = portal.start_receive(there, LISTEN)
        (uri,) = handle.wait_listening(LIMIT)
        assert portal.migrate(guest, uri).confirmed
        handle.result(LIMIT)
    assert there.run_state == "running"
    assert bytes(there.ram[0].pages.data) == bytes(guest.ram[0].pages.data)


# -- synchronous callers -----------------------------------------------------------------------------------------------


def test_synchronous_caller_migrates(portal: Portal, arrival: Arrival) -> None:
    handle, uri, there = arrival.handle, arrival.uri, arrival.guest
    guest = machine(running=True)
    monitor = trimig.Monitor()
    summary = portal.migrate(guest, uri, monitor=monitor)
    assert summary.confirmed
    assert handle.result(LIMIT).role is trimig.Role.DESTINATION
    assert monitor.owner is handle.owner is Ownership.DESTINATION
    assert (guest.run_state, there.run_state) == ("paused", "running")
    assert (there.ram[0].pages == 7).all()


def test_errors_come_across_as_themselves(portal: Portal) -> None:
    guest = machine(running=True)
    with pytest.raises(trimig.ConfigError, match="unknown protocol"):
        portal.migrate(guest, "pigeon:1")
    with pytest.raises(trimig.TransportFailed, match="refused") as caught:
        portal.migrate(guest, "tcp:127.0.0.1:1")
    assert caught.value.owner is Ownership.SOURCE
    assert guest.run_state == "running"


def test_running_migration_is_watched_tuned_and_cancelled(portal: Portal, arrival: Arrival) -> None:
    guest = machine(running=True)
    handle = portal.start_migrate(guest, arrival.uri, slow())
    with pytest.raises(TimeoutError):
        handle.result(0.05)
    assert not handle.done
    assert handle.set_parameters(downtime_limit=5).downtime_limit == 5
    assert portal.call(trio.current_time) > 0
    while handle.statistics().status is not trimig.Status.ACTIVE:
        assert not handle.done
    assert handle.info()["status"] == "active"
    handle.cancel("enough")
    with pytest.raises(trimig.MigrationCancelled, match="enough"):
        handle.result(LIMIT)
    assert (handle.status, guest.run_state) == (trimig.Status.CANCELLED, "running")
    handle.cancel("again")  # harmless
    arrives(guest)


def test_cancel_right_after_the_start_is_not_lost(portal: Portal, tmp_path: Path) -> None:
    """Whether the migration has begun in its thread or not."""
    guest = machine(running=True)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf.listen()
        for _ in range(5):
            handle = portal.start_migrate(guest, f"unix:{tmp_path}/deaf", slow())
            handle.cancel("at once")
            with pytest.raises(trimig.MigrationCancelled, match="at once"):
                handle.result(LIMIT)
            assert guest.run_state == "running"


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A shell that starts this in the background without job control makes it deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    """Ctrl-C, for the main thread, which is the one that waits."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_keyboard_interrupt_cancels_and_waits_until_the_guest_is_back(portal: Portal, arrival: Arrival) -> None:
    """It strikes while the guest is stopped; it is raised when the guest runs again."""

    async def on_pause() -> None:
        interrupt()
        await trio.sleep(0.05)

    guest = machine(running=True, on_pause=on_pause)
    monitor = trimig.Monitor()

    def wait_for_ever() -> None:
        portal.migrate(guest, arrival.uri, slow_switchover(), monitor=monitor, commit=trio.sleep_forever)

    with pytest.raises(KeyboardInterrupt) as caught:
        wait_for_ever()
    assert (monitor.status, guest.run_state) == (trimig.Status.CANCELLED, "running")
    assert caught.value.__notes__ == ["the migration was cancelled; the owner of the guest is the source"]


@pytest.mark.parametrize("begun", [False, True])
def test_keyboard_interrupt_while_it_begins(portal: Portal, monkeypatch: pytest.MonkeyPatch, *, begun: bool) -> None:
    """Between the call and the wait: there is no moment in which the migration goes on by itself."""
    start = portal._running().start_task_soon

    def interrupted(*arguments: Any, **options: Any) -> object:
        if begun:
            start(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(portal._running(), "start_task_soon", interrupted)
    guest = machine(running=True)
    for call in (portal.migrate, portal.start_migrate):
        with pytest.raises(KeyboardInterrupt) as caught:
            call(guest, "tcp:127.0.0.1:1")
        assert caught.value.__notes__ == ["the migration was cancelled; the owner of the guest is the source"]
        assert not portal._handles
        assert guest.run_state == "running"


def slow_switchover() -> trimig.Config:
    return trimig.Config(teardown_grace=5.0)


def test_keyboard_interrupt_after_the_decision_says_that_it_was_too_late(portal: Portal, arrival: Arrival) -> None:
    """The destination's answer is on its way: the call ends with the truth, not with a guess."""
    handle, uri, there = arrival.handle, arrival.uri, arrival.guest
    guest = machine(running=True)
    monitor = trimig.Monitor()
    waiting = threading.Event()

    async def when_decided() -> None:
        await monitor.wait_status(trimig.Status.HANDOVER)
        # A signal outside of wait() would end the whole run of the tests.
        await trio.to_thread.run_sync(waiting.wait, LIMIT)
        interrupt()

    future = portal._running().start_task_soon(when_decided)
    started = portal.start_migrate(guest, uri, monitor=monitor)

    def wait() -> None:
        waiting.set()
        started.result()
        future.result(LIMIT)  # the signal may come when the result is there already

    with pytest.raises(KeyboardInterrupt) as caught:
        wait()
    handle.result(LIMIT)
    started.result(LIMIT)
    assert monitor.owner is Ownership.DESTINATION
    assert there.run_state == "running"
    assert all("too late" in note for note in getattr(caught.value, "__notes__", ()))


def test_leaving_the_portal_by_an_exception_cancels_first() -> None:
    guest = machine(running=True)
    there = machine(running=False)
    handles: list[Handle] = []

    def leave() -> None:
        with Portal() as portal:
            receiver = portal.start_receive(there, LISTEN)
            (uri,) = receiver.wait_listening(LIMIT)
            handles.extend((receiver, portal.start_migrate(guest, uri, slow())))
            raise LookupError("something else")

    with pytest.raises(LookupError):
        leave()
    assert all(handle.done for handle in handles)
    for handle in handles:
        with pytest.raises(trimig.MigrationError):
            handle.result(0)
    assert (guest.run_state, there.run_state) == ("running", "inmigrate")
    arrives(guest)


def test_leaving_the_portal_waits_for_what_is_under_way() -> None:
    guest = machine(running=True)
    with Portal() as portal:
        receiver = portal.start_receive(machine(running=False), LISTEN)
        handle = portal.start_migrate(guest, receiver.wait_listening(LIMIT)[0])
    assert handle.result(0).confirmed
    assert receiver.result(0).role is trimig.Role.DESTINATION
    with pytest.raises(RuntimeError, match="not open"):
        portal.migrate(guest, LISTEN)


def test_portal_is_not_opened_twice(portal: Portal) -> None:
    with pytest.raises(RuntimeError, match="open already"), portal:
        pass


def test_plain_hook_runs_in_a_thread_and_may_refuse(portal: Portal, arrival: Arrival) -> None:
    seen: list[int] = []

    def commit() -> None:
        seen.append(threading.get_ident())
        raise OSError("the journal is full")

    guest = machine(running=True)
    with pytest.raises(trimig.MigrationError, match="the journal is full") as caught:
        portal.migrate(guest, arrival.uri, commit=commit)
    assert caught.value.owner is Ownership.SOURCE
    assert guest.run_state == "running"
    assert seen
    assert seen[0] not in (threading.get_ident(), portal.call(threading.get_ident))


def test_context_manager_of_the_trio_side(portal: Portal) -> None:
    """What a guest needs may be opened from outside."""
    steps: list[str] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[str]:
        await trio.lowlevel.checkpoint()
        yield "it"
        steps.append("closed")

    with portal.context(opened()) as name:
        steps.append(name)
    assert steps == ["it", "closed"]


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_asyncio_caller_awaits_the_migration() -> None:
    there = machine(running=False)

    async def main() -> trimig.Summary:
        async with Portal() as portal:
            receiver = portal.start_receive(there, LISTEN)
            summary = await portal.start_migrate(machine(running=True), receiver.wait_listening(LIMIT)[0])
            await receiver
            return summary

    assert asyncio.run(main()).confirmed
    assert there.run_state == "running"


def test_asyncio_cancellation_is_raised_when_the_guest_is_back() -> None:
    """The pause is slow: the cancelled task ends after it, not before."""
    guest = machine(running=True)
    seen: list[str] = []

    async def main() -> None:
        async with Portal() as portal:
            receiver = portal.start_receive(machine(running=False), LISTEN)
            handle = portal.start_migrate(guest, receiver.wait_listening(LIMIT)[0], slow())

            async def wait() -> None:
                try:
                    await handle
                except asyncio.CancelledError as error:
                    seen.extend((guest.run_state, handle.status.value, *error.__notes__))
                    raise

            task = asyncio.create_task(wait())
            await asyncio.to_thread(lambda: portal.call(handle._monitor.wait_status, trimig.Status.ACTIVE))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(trimig.MigrationError):
                await receiver

    asyncio.run(main())
    assert seen[:2] == ["running", "cancelled"]
    assert "the owner of the guest is the source" in seen[2]
    arrives(guest)


def test_asyncio_time_limit_is_the_callers() -> None:
    guest = machine(running=True)

    async def main() -> None:
        async with Portal() as portal:
            receiver = portal.start_receive(machine(running=False), LISTEN)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(portal.start_migrate(guest, receiver.wait_listening(LIMIT)[0], slow()), 0.2)
            assert guest.run_state == "running"
            with pytest.raises(trimig.MigrationError):
                await receiver

    asyncio.run(main())


# -- streams of anyio --------------------------------------------------------------------------------------------------


async def pair() -> tuple[anyio.abc.SocketStream, anyio.abc.SocketStream]:
    """Both ends of a connection, as anyio gives them to an application on trio."""
    ours, theirs = socket.socketpair()
    return await anyio.abc.SocketStream.from_socket(ours), await anyio.abc.SocketStream.from_socket(theirs)


async def test_stream_of_anyio_is_a_stream_of_trio() -> None:
    """trio's own examination: order, end, errors, conflicts, cancellation."""

    async def make() -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
        one, other = await pair()
        return from_anyio(one), from_anyio(other)

    with trio.fail_after(LIMIT):
        await trio.testing.check_half_closeable_stream(make, None)


async def test_guest_goes_over_a_stream_of_anyio() -> None:
    guest, there = machine(running=True), machine(running=False)
    with trio.fail_after(LIMIT):
        one, other = await pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, there, from_anyio(other))
            summary = await trimig.migrate(guest, from_anyio(one))
    assert summary.confirmed
    assert there.run_state == "running"
    assert (there.ram[0].pages == 7).all()


async def test_cut_stream_of_anyio_is_a_transport_failure() -> None:
    guest = machine(running=True)
    with trio.fail_after(LIMIT):
        one, other = await pair()
        await other.aclose()
        with pytest.raises(trimig.TransportFailed):
            await trimig.migrate(guest, from_anyio(one))
    assert guest.run_state == "running"


async def test_one_way_stream_of_anyio_has_no_return_path() -> None:
    """The types tell: what can only send is only a SendStream."""
    one, other = await pair()

    class OnlySends(anyio.abc.ByteSendStream):
        async def send(self, item: bytes) -> None:
            await one.send(item)

        async def aclose(self) -> None:
            await one.aclose()

    class OnlyReceives(anyio.abc.ByteReceiveStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            return await other.receive(max_bytes)

        async def aclose(self) -> None:
            await other.aclose()

    sending, receiving = from_anyio(OnlySends()), from_anyio(OnlyReceives())
    assert not isinstance(sending, trio.abc.ReceiveStream)
    assert not isinstance(receiving, trio.abc.SendStream)
    guest, there = machine(running=True), machine(running=False)
    config = trimig.Config(capabilities=trimig.Capabilities(return_path=False))
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, there, receiving, config)
            summary = await trimig.migrate(guest, sending, config)
    assert not summary.confirmed
    assert there.run_state == "running"


def test_what_is_no_byte_stream_is_refused() -> None:
    with pytest.raises(TypeError, match="not a byte stream"):
        from_anyio("tcp:127.0.0.1:1")  # type: ignore[call-overload]  # that is the test
