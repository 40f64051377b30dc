"""Marks between trimigs, with a QEMU on either end: a source sends one more PING, and QEMU sees no other part of them.

Every migration here runs twice, with the marks and without them, and both outcomes are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.installed import Installed
from tests.qemu.relay import Relay
from tests.reading import Element, elements
from trimig import MiB, Status
from trimig.engine.destination import commands as taken
from trimig.wire import encoder as wire
from trimig.wire.marks import PING_MARK, PONG_MARK, Mark, trailing_reason

pytestmark = pytest.mark.qemu

#: Command 2 with four bytes, and message 2 with four bytes: QEMU's own form.
PING = bytes.fromhex("08 0002 0004 74726d01")
PING_1 = bytes.fromhex("08 0002 0004 00000001")
PONG = bytes.fromhex("0002 0004 74726d01")
PONG_1 = bytes.fromhex("0002 0004 00000001")
#: The messages of QEMU's return path: SHUT, PONG, two forms of REQ_PAGES, RECV_BITMAP, RESUME_ACK, SWITCHOVER_ACK.
MESSAGES = range(1, 8)
#: The device of ``-M none``.
TIMER = {"timer": 24}


@contextlib.contextmanager
def without_marks() -> Iterator[None]:
    """A trimig without marks."""
    ping = wire.ping
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "ping", lambda value: b"" if value == PING_MARK else ping(value))
        patch.setattr(taken, "PING_MARK", None)
        yield


@dataclasses.dataclass
class Seen:
    """The bytes on the wire, and the outcome."""

    forward: bytes
    back: bytes
    #: Each side's own report of the end, and everything else that must not depend on the marks.
    outcome: tuple[object, ...]


def messages(back: bytes) -> list[tuple[int, bytes]]:
    """Type and payload of each message of a return path; the last one must be whole."""
    found, at = [], 0
    while at < len(back):
        kind, length = (int.from_bytes(back[at + i : at + i + 2], "big") for i in (0, 2))
        assert at + 4 + length <= len(back), f"half a message at {at}"
        found.append((kind, back[at + 4 : at + 4 + length]))
        at += 4 + length
        if kind == 5:  # behind RECV_BITMAP: the bitmap's size, the bitmap, and a mark of its end
            at += 16 + int.from_bytes(back[at : at + 8], "big")
    return found


def commands(found: list[Element]) -> Iterator[str]:
    """The names of all elements, including those of the package."""
    for element in found:
        yield element.word
        yield from commands(list(element.inner))


def without_the_ping(forward: bytes) -> bytes:
    """A source's stream without its one mark, which stands directly behind QEMU's first PING."""
    assert forward.count(PING_1 + PING) == forward.count(PING) == 1
    return forward.replace(PING, b"")


def nothing_but_qemus(back: bytes) -> None:
    """A return path has messages of QEMU only, and no answer to a mark."""
    for kind, payload in messages(back):
        assert kind in MESSAGES, f"message {kind:#x}"
        assert (kind, payload) != (2, PONG_MARK.to_bytes(4)), "the second PONG"


def has_ended(error: trimig.TrimigError) -> tuple[type[trimig.TrimigError], trimig.Ownership | None]:
    """The compared parts of an error."""
    return type(error), error.owner


# -- to QEMU -----------------------------------------------------------------------------------------------------------


async def to_qemu(version: str, *, name: str = "none", cancelled: bool = False) -> Seen:
    """By precopy. A guest without the QEMU's machine type is refused; one is cancelled in the middle."""
    async with peers.target(version=version) as (vm, uri), Relay(uri) as relay:
        relay.forward.keep = relay.back.keep = True
        with peers.source(name=name) as guest:
            monitor = trimig.Monitor()
            events = monitor.events()
            end: object
            # With this limit the pages of a megabyte take several seconds.
            config = peers.settings(bandwidth=64 << 10 if cancelled else 0)
            try:
                if cancelled:
                    steer = functools.partial(cancel_after, monitor, 3)
                    await peers.while_migrating(guest, relay.uri, config, monitor, steer)
                summary = await trimig.migrate(guest, relay.uri, config, monitor=monitor)
                end = summary.confirmed, summary.prepared, summary.normal_pages, summary.zero_pages, summary.warnings
                await vm.wait_status("running")
                assert np.array_equal(vm.ram, peers.memory(guest))
                statuses = vm.migration_statuses()
            except trimig.TrimigError as error:
                end = has_ended(error)
                statuses = [str(await vm.wait_exit())]
            outcome = end, guest.run_state, statuses, peers.statuses([event async for event in events])
        return Seen(bytes(relay.forward.read), bytes(relay.back.read), outcome)


async def cancel_after(monitor: trimig.Monitor, pages: int) -> None:
    async for picture in monitor.watch(0.01):
        if picture.normal_pages >= pages:
            break
    monitor.cancel("a reason that no QEMU can read")


async def test_precopy_to_qemu(qemu: Installed) -> None:
    """The same bytes in both directions except for the PING and its echo; the same end."""
    marked = await to_qemu(qemu.version)
    with without_marks():
        plain = await to_qemu(qemu.version)
    assert without_the_ping(marked.forward) == plain.forward
    assert marked.back.count(PONG_1 + PONG) == 1
    assert marked.back.replace(PONG, b"") == plain.back
    assert marked.outcome == plain.outcome


@pytest.mark.parametrize("how", ["refused", "cancelled"])
async def test_what_does_not_arrive_at_qemu(qemu: Installed, how: str) -> None:
    """No reason is sent to a QEMU, which could not read it."""
    run = functools.partial(
        to_qemu, qemu.version, name="pc" if how == "refused" else "none", cancelled=how == "cancelled"
    )
    marked = await run()
    with without_marks():
        plain = await run()
    left, right = without_the_ping(marked.forward), plain.forward
    both = min(len(left), len(right))  # the progress at the cancel depends on the moment
    assert left[:both] == right[:both]
    assert trailing_reason(marked.forward) is None
    nothing_but_qemus(marked.back)
    assert marked.outcome == plain.outcome


def able(background: int) -> trimig.Config:
    """Postcopy, and precopy too slow to complete before the switch."""
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True),
        parameters=trimig.Parameters(max_bandwidth=MiB, downtime_limit=1, max_postcopy_bandwidth=background),
    )


async def postcopy_to_qemu(version: str, *, cut: bool) -> tuple[list[bytes], list[bytes], tuple[object, ...]]:
    """By postcopy, whole or over two connections: the bytes sent and answered on each."""
    size = 8 * MiB
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(trio.fail_after(peers.LIMIT))
        guest = stack.enter_context(peers.source(size))
        vm = await stack.enter_async_context(Qemu.start("none", "8M", version=version, incoming="defer"))
        await vm.set_capabilities({"postcopy-ram": True})
        relays = [await stack.enter_async_context(relay_to(await vm.incoming(peers.LISTEN)))]
        monitor = trimig.Monitor()

        async def steer() -> None:
            await monitor.wait_status(Status.ACTIVE)
            monitor.start_postcopy()
            if not cut:
                return
            await monitor.wait_status(Status.POSTCOPY_ACTIVE)
            await vm.wait_migration_status("postcopy-active")
            monitor.pause("the test cuts it")
            await vm.wait_migration_status("postcopy-paused")
            await vm.qmp.execute("migrate-recover", {"uri": peers.LISTEN})
            await monitor.wait_status(Status.POSTCOPY_PAUSED)
            async with relay_to(await vm.incoming_uri(peers.LISTEN)) as relay:
                relays.append(relay)
                monitor.recover(relay.uri)
                await monitor.wait_status(Status.COMPLETED, Status.FAILED)

        summary = await peers.while_migrating(guest, relays[0].uri, able(4 * MiB if cut else 0), monitor, steer)
        await vm.wait_migration_status("completed")
        assert np.array_equal(vm.ram, peers.memory(guest))
        outcome = summary.confirmed, await vm.wait_status("running", "paused"), vm.migration_statuses()
        return [bytes(r.forward.read) for r in relays], [bytes(r.back.read) for r in relays], outcome


def relay_to(uri: str) -> Relay:
    """A relay that keeps all bytes."""
    relay = Relay(uri)
    relay.forward.keep = relay.back.keep = True
    return relay


async def test_postcopy_to_qemu(qemu: Installed) -> None:
    """One more PING, no id of the attempt; the same end."""
    (forward,), (back,), outcome = await postcopy_to_qemu(qemu.version, cut=False)
    found = list(commands(elements(forward, TIMER)))
    assert found.count("PING 0x74726d01") == 1
    assert not [word for word in found if word.startswith("command")]
    nothing_but_qemus(back)
    with without_marks():
        *_, plain = await postcopy_to_qemu(qemu.version, cut=False)
    assert outcome == plain


async def test_recovery_towards_qemu(qemu: Installed) -> None:
    """The second connection of a recovery has no mark at all, because the first mark had no answer."""
    forward, back, outcome = await postcopy_to_qemu(qemu.version, cut=True)
    assert len(forward) == 2
    found = list(commands(elements(forward[1], TIMER, head=False)))
    assert "PING 0x74726d01" not in found
    assert not [word for word in found if word.startswith("command")]
    nothing_but_qemus(back[1])
    with without_marks():
        *_, plain = await postcopy_to_qemu(qemu.version, cut=True)
    assert outcome == plain


# -- from QEMU ---------------------------------------------------------------------------------------------------------


async def from_qemu(version: str, *, block: str = "m0", cancelled: bool = False) -> Seen:
    """By precopy. A guest whose memory has another name is refused; one is cancelled by the destination."""
    async with Qemu.start("none", "1M", version=version) as vm:
        peers.mix(vm.ram, seed=31)
        with peers.machine(running=False, block=block) as guest:
            async with peers.arriving(guest) as arrival, relay_to(arrival.uri) as relay:
                limit = 64 << 10 if cancelled else 0
                await vm.set_capabilities({"return-path": True})
                await vm.migrate(relay.uri, parameters={"max-bandwidth": limit}, wait=False)
                if cancelled:
                    await arrival.wait_pages(3)
                    arrival.monitor.cancel("a reason that no QEMU can read")
                await arrival.done.wait()
                await vm.wait_migration_status("completed", "failed", fail_on=())
            end: object
            if isinstance(arrival.outcome, trimig.TrimigError):
                end = has_ended(arrival.outcome)
                await vm.wait_status("running")
            else:
                end = (await arrival.summary()).confirmed
                assert np.array_equal(vm.ram, peers.memory(guest))
            outcome = end, guest.run_state, await vm.wait_status("running", "postmigrate"), vm.migration_statuses()
        return Seen(bytes(relay.forward.read), bytes(relay.back.read), outcome)


@pytest.mark.parametrize("how", ["arrives", "is refused", "is cancelled"])
async def test_precopy_from_qemu(qemu: Installed, how: str) -> None:
    """Exactly the answers without marks: no second PONG, and no reason after a failure."""
    run = functools.partial(
        from_qemu, qemu.version, block="other" if how == "is refused" else "m0", cancelled=how == "is cancelled"
    )
    marked = await run()
    with without_marks():
        plain = await run()
    assert marked.back == plain.back
    assert [kind for kind, _ in messages(marked.back)] == [2, 1]
    assert PING not in marked.forward
    assert marked.outcome == plain.outcome


async def postcopy_from_qemu(version: str) -> Seen:
    """By postcopy, into a guest that is parked."""
    async with Qemu.start("none", "8M", version=version) as vm:
        vm.ram[:] = random_ram(8 * MiB, seed=32)
        with trimig.ParkedGuest() as guest:
            async with peers.arriving(guest, able(0)) as arrival, relay_to(arrival.uri) as relay:
                limits = {"max-bandwidth": MiB, "downtime-limit": 1}
                await vm.migrate(relay.uri, capabilities={"postcopy-ram": True}, parameters=limits, wait=False)
                await arrival.wait_pages(1)
                await vm.qmp.execute("migrate-start-postcopy")
                await vm.wait_migration_status("completed")
                summary = await arrival.summary()
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)
        outcome = summary.confirmed, await vm.wait_status("postmigrate"), vm.migration_statuses()
        return Seen(bytes(relay.forward.read), bytes(relay.back.read), outcome)


async def test_postcopy_from_qemu(qemu: Installed) -> None:
    """Only messages that a QEMU knows; the same end."""
    marked = await postcopy_from_qemu(qemu.version)
    with without_marks():
        plain = await postcopy_from_qemu(qemu.version)
    nothing_but_qemus(marked.back)
    assert PONG not in marked.back
    assert marked.outcome == plain.outcome


def test_marks_are_numbers_of_no_qemu() -> None:
    """The marks that the tests above look for."""
    assert not {int(mark) for mark in Mark} & set(MESSAGES)
    assert PONG_MARK.to_bytes(4) != PING[5:]
    assert wire.ping(PING_MARK) == PING
