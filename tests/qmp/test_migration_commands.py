"""``migrate`` and the commands that control it, in every status; descriptors by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.qmp.driver import Talk, hosted, pair, unreachable
from trimig import Blockers, Config
from trimig.qmp.jobs import IncomingState
from trimig.status import Status
from trimig.testing import ScriptedGuest


async def test_nothing_to_query_before_the_first_migration() -> None:
    """G1: an empty object."""
    async with hosted() as talk:
        assert await talk.query() == {}


async def test_cancel_without_a_migration() -> None:
    """F9: the command succeeds, and has no effect."""
    async with hosted() as talk:
        assert await talk.say("migrate_cancel") == {}
        assert (await talk.query(), talk.events) == ({}, [])


async def test_members_of_each_status(tmp_path: Path) -> None:
    """G2, G3, G4, G5, G15: the presence table of config.md part 6.1, and the destination's own status (G10)."""
    async with pair(tmp_path, ScriptedGuest(delays={"save": 0.05})) as (source, destination, uri):
        await source.capabilities(pause_before_switchover=True)
        await source.say("migrate-set-parameters", {"downtime-limit": 777})
        assert "status" not in await destination.query()
        await source.say("migrate", {"uri": uri})
        assert {"total-time", "ram"}.isdisjoint(info := await source.query()), info
        assert info["status"] == "setup"
        await source.until(Status.ACTIVE)
        assert (await source.query())["expected-downtime"] == 777
        await source.until(Status.PRE_SWITCHOVER)
        info = await source.query()
        running = {"status", "total-time", "expected-downtime", "setup-time", "ram"}
        assert (running <= info.keys(), "downtime" in info) == (True, False)
        assert info["ram"].keys() >= {
            "transferred", "total", "duplicate", "skipped", "normal", "normal-bytes", "mbps", "dirty-sync-count",
            "postcopy-requests", "page-size", "remaining", "dirty-pages-rate",
        }  # fmt: skip
        assert (await destination.query())["status"] == "active"
        await source.say("migrate-continue", {"state": "pre-switchover"})
        assert await source.over() is Status.COMPLETED
        info = await source.query()
        assert {"status", "total-time", "downtime", "setup-time", "ram"} <= info.keys()
        assert {"expected-downtime", "error-desc", "xbzrle-cache", "disk"}.isdisjoint(info)
        assert (info["status"], info["ram"]["remaining"], info["ram"]["skipped"]) == ("completed", 0, 0)
        assert (await destination.query())["status"] == "completed"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("tcp:foo", "HOST:PORT"),
        ("tcp:127.0.0.1:port", "HOST:PORT"),
        ("unix:", "path"),
        ("rdma:1", "RDMA"),
        ("fd:nosuch", "File descriptor named 'nosuch' has not been found"),
        ("fd:999999", "File descriptor named '999999' has not been found"),
        ("fd:1x", "number"),
    ],
)
async def test_address_that_cannot_be_used(uri: str, text: str) -> None:
    """B5, F8: the QMP error and ``error-desc`` are the same text, the status is failed; the next migration may
    begin."""
    async with hosted() as talk:
        await talk.capabilities(events=True)
        for _ in range(2):
            refusal = await talk.refused("migrate", {"uri": uri})
            assert text in refusal
            assert await talk.query() == {"status": "failed", "owner": "source", "error-desc": refusal}
        assert talk.names() == ["setup", "failed"] * 2
        assert await talk.state() == "running"


async def test_unknown_scheme_fails_without_a_text() -> None:
    """B6: as in QEMU 7.2 the status is failed, and there is no ``error-desc``."""
    async with hosted() as talk:
        assert "pigeon" in await talk.refused("migrate", {"uri": "pigeon:1"})
        assert await talk.query() == {"status": "failed", "owner": "source"}


async def test_no_listener_at_the_address(tmp_path: Path) -> None:
    """B15, B16: the command returns, then the status is failed, with the reason."""
    async with hosted() as talk:
        assert await talk.say("migrate", {"uri": f"unix:{tmp_path}/absent"}) == {}
        assert await talk.over() is Status.FAILED
        assert "cannot connect" in (await talk.query())["error-desc"]


@pytest.mark.parametrize("arguments", [{"blk": True}, {"inc": True}])
async def test_block_migration_is_refused_and_leaves_nothing(arguments: dict[str, bool]) -> None:
    """Gap G15: in QEMU a command with an error leaves the capability ``block`` on; here nothing changes."""
    async with hosted() as talk:
        before = await talk.say("query-migrate-capabilities"), await talk.say("query-migrate-parameters")
        assert "block migration" in await talk.refused("migrate", {"uri": "tcp:127.0.0.1:1", **arguments})
        assert (await talk.say("query-migrate-capabilities"), await talk.say("query-migrate-parameters")) == before
        assert await talk.query() == {}


async def test_two_migrations_at_the_same_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """F1: exactly one begins, and the refusal of the other does not disturb it."""
    unreachable(monkeypatch)
    async with hosted() as talk:
        outcomes: list[Any] = []

        async def ask() -> None:
            try:
                outcomes.append(await talk.say("migrate", {"uri": "tcp:127.0.0.1:1"}))
            except Exception as error:  # noqa: BLE001  # whatever it is, it is looked at below
                outcomes.append(str(error))

        async with trio.open_nursery() as both:
            both.start_soon(ask)
            both.start_soon(ask)
        assert sorted(map(str, outcomes)) == ["There's a migration process in progress", "{}"]
        assert (await talk.query())["status"] == "setup"
        assert "in progress" in await talk.refused("migrate", {"uri": "pigeon:1"})
        assert (await talk.query())["status"] == "setup"
        assert "'uri' is missing" in await talk.refused("migrate")


async def hold(talk: Talk, status: Status, uri: str) -> None:
    """Begin a migration and bring it into *status*."""
    await talk.capabilities(pause_before_switchover=status is not Status.ACTIVE)
    if status is Status.ACTIVE:
        await talk.say("migrate-set-parameters", {"max-bandwidth": 10_000})
    await talk.say("migrate", {"uri": uri})
    if status is Status.DEVICE:
        await talk.until(Status.PRE_SWITCHOVER)
        await talk.say("migrate-continue", {"state": "pre-switchover"})
    await talk.until(status)


@pytest.mark.parametrize("status", [Status.SETUP, Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE])
@pytest.mark.parametrize("stopped", [False, True])
async def test_cancel_in_each_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status, stopped: bool
) -> None:
    """F10, C2, gaps G4, G5, G12 and G19: after a cancel the guest is as before at once, and the next attempt may begin.
    QEMU leaves a paused guest in postmigrate, where it cannot be migrated again, and waits for a connect that cannot be
    cancelled."""
    guest = ScriptedGuest(blocks={"ram": 256}, delays={"save": 0.2})
    async with pair(tmp_path, guest) as (source, destination, uri):
        if status is Status.SETUP:
            unreachable(monkeypatch)
        if stopped:
            await source.say("stop")
        await hold(source, status, uri)
        row = {"capabilities": [{"capability": "xbzrle", "state": False}]}
        assert "in progress" in await source.refused("migrate-set-capabilities", row)
        assert "in progress" in await source.refused("migrate", {"uri": uri})
        assert await source.say("migrate_cancel") == {}
        assert await source.say("migrate_cancel") == {}
        assert await source.over() is Status.CANCELLED
        assert await source.state() == ("paused" if stopped else "running")
        assert (await source.query())["status"] == "cancelled"
        assert source.names().count("cancelled") == 1
        # Again, and this time to the end; all counters start anew (F7).
        monkeypatch.undo()
        while not destination.machine.incoming.addresses:
            if destination.machine.incoming_state is IncomingState.FAILED:
                await destination.say("migrate-incoming", {"uri": uri})
            await trio.sleep(0.001)
        await source.capabilities(pause_before_switchover=False)
        await source.say("migrate-set-parameters", {"max-bandwidth": 0})
        await source.say("migrate", {"uri": uri})
        assert "error-desc" not in await source.query()
        assert await source.over() is Status.COMPLETED
        assert (await source.query())["ram"]["normal"] <= 2 * 256


async def test_migrate_again_after_a_failure(tmp_path: Path) -> None:
    """F7: no old error remains."""
    async with pair(tmp_path) as (source, _, uri):
        await source.say("migrate", {"uri": f"unix:{tmp_path}/absent"})
        assert await source.over() is Status.FAILED
        await source.refused("migrate", {"uri": "tcp:foo"})
        await source.say("migrate", {"uri": uri, "detach": True})
        assert await source.over() is Status.COMPLETED
        assert "error-desc" not in await source.query()


async def test_continue_only_out_of_the_pause(tmp_path: Path) -> None:
    """F13, F14, F15: the error names the present status; one continue too many does not skip a later pause."""
    async with pair(tmp_path) as (source, _, uri):
        await source.capabilities(pause_before_switchover=True)
        assert "state: none" in await source.refused("migrate-continue", {"state": "pre-switchover"})
        await source.say("migrate", {"uri": uri})
        await source.until(Status.PRE_SWITCHOVER)
        assert "state: pre-switchover" in await source.refused("migrate-continue", {"state": "active"})
        await source.say("migrate-continue", {"state": "pre-switchover"})
        assert await source.over() is Status.COMPLETED
        assert "state: completed" in await source.refused("migrate-continue", {"state": "completed"})


async def test_client_that_goes_away_does_not_take_its_migration_along(tmp_path: Path) -> None:
    async with pair(tmp_path) as (source, destination, uri):
        with trio.CancelScope() as client:
            client.cancel()
            await source.say("migrate", {"uri": uri})
        assert client.cancelled_caught
        await source.until(Status.COMPLETED)
        assert destination.guest.running


class Blockable(ScriptedGuest):
    """A guest with blockers."""

    def __init__(self) -> None:
        super().__init__()
        self.blockers = Blockers(busy=lambda: self.claimed)


async def test_blocked_guest(tmp_path: Path) -> None:
    """F3, I1, I4, I6: the error has the most recent reason, ``blocked-reasons`` all of them; nothing else changes."""
    guest = Blockable()
    async with pair(tmp_path, guest) as (source, _, uri):
        first, second = guest.blockers.add("the disk is copied"), guest.blockers.add("a card is passed through")
        assert await source.refused("migrate", {"uri": uri}) == "a card is passed through"
        assert await source.query() == {"blocked-reasons": ["a card is passed through", "the disk is copied"]}
        first.delete()
        second.delete()
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED


# -- descriptors -------------------------------------------------------------------------------------------------------


def given(talk: Talk) -> socket.socket:
    """A socket pair: one end travels with the next ``getfd``, the other one is returned."""
    ours, theirs = socket.socketpair()
    talk.fds.append(theirs.detach())
    return ours


def ended(sock: socket.socket) -> bool:
    """Check that the other end is closed everywhere."""
    sock.setblocking(False)
    try:
        while sock.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


async def test_named_descriptor_is_used_once() -> None:
    """B4."""
    async with hosted() as source, hosted(waiting=True) as destination:
        one, two = socket.socketpair()
        for talk, sock in ((source, one), (destination, two)):
            talk.fds.append(sock.detach())
            await talk.say("getfd", {"fdname": "line"})
        await destination.say("migrate-incoming", {"uri": "fd:line"})
        await source.say("migrate", {"uri": "fd:line"})
        assert await source.over() is Status.COMPLETED
        assert (source.machine.descriptors, destination.machine.descriptors) == ({}, {})
        assert "'line' not found" in await source.refused("closefd", {"fdname": "line"})


async def test_descriptors_that_are_not_used_are_closed() -> None:
    async with hosted() as talk:
        with given(talk) as one, given(talk) as two, given(talk) as three, given(talk) as four:
            await talk.say("getfd", {"fdname": "a"})
            await talk.say("getfd", {"fdname": "a"})  # replaces the first
            assert (ended(one), ended(two)) == (True, False)
            await talk.say("closefd", {"fdname": "a"})
            assert ended(two)
            assert "not starting with a digit" in await talk.refused("getfd", {"fdname": "1a"})
            assert ended(three)
            await talk.say("getfd", {"fdname": "left"})
            talk.machine.close()
            assert ended(four)
        assert "No file descriptor supplied" in await talk.refused("getfd", {"fdname": "a"})


async def test_descriptor_of_a_refused_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor is kept if the command is refused first, and closed if the command is refused after taking it."""
    unreachable(monkeypatch)
    async with hosted() as talk:
        with given(talk) as ours:
            await talk.say("getfd", {"fdname": "line"})
            await talk.say("migrate", {"uri": "tcp:127.0.0.1:1"})
            assert "in progress" in await talk.refused("migrate", {"uri": "fd:line"})
            await talk.say("migrate_cancel")
            await talk.over()
            assert not ended(ours)
            talk.guest.claim("something else")
            assert "busy" in await talk.refused("migrate", {"uri": "fd:line"})
            assert ended(ours)
            talk.guest.release()


async def test_descriptor_that_the_transport_never_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing TLS credentials are found before the descriptor is checked."""
    config = Config().with_options(parameters=["tls-creds=nowhere"])
    async with hosted(None, config) as talk:
        with given(talk) as ours:
            await talk.say("getfd", {"fdname": "line"})
            await talk.say("migrate", {"uri": "fd:line"})
            assert await talk.over() is Status.FAILED
            assert ended(ours)


async def test_descriptor_that_is_no_stream(tmp_path: Path) -> None:
    async with hosted() as talk:
        talk.fds.append(os.open(tmp_path, os.O_RDONLY))
        await talk.say("getfd", {"fdname": "line"})
        await talk.say("migrate", {"uri": "fd:line"})
        assert await talk.over() is Status.FAILED
        assert "directory" in (await talk.query())["error-desc"]


# -- newer spelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ({"transport": "socket", "type": "inet", "host": "::1", "port": "x"}, r"tcp:\[::1\]:x"),
        ({"transport": "socket", "type": "fd", "str": "nosuch"}, "'nosuch' has not been found"),
        ({"transport": "rdma", "host": "a", "port": "1"}, "RDMA"),
        ({"transport": "exec", "args": ["/bin/sh", "-c", ""]}, "needs a command"),
        ({"transport": "exec", "args": ["cat"]}, "'args' expects"),
        ({"transport": "file", "filename": "x", "offset": "1"}, "'offset', expected: integer"),
        ({"transport": "pigeon"}, "does not accept value 'pigeon'"),
        ({"transport": "socket", "type": "unix"}, "'path' is missing"),
        ({"transport": "socket", "type": "vsock"}, "does not accept value 'vsock'"),
        ({}, "'transport' is missing"),
        ({"transport": "socket"}, "'type' is missing"),
    ],
)
async def test_channels_are_checked(address: dict[str, Any], text: str) -> None:
    async with hosted() as talk:
        with pytest.raises(Exception, match=text):
            await talk.say("migrate", {"channels": [{"channel-type": "main", "addr": address}]})


async def test_channels_carry_a_migration(tmp_path: Path) -> None:
    async with pair(tmp_path) as (source, destination, uri):
        address = {"transport": "socket", "type": "unix", "path": uri.removeprefix("unix:")}
        channels = [{"channel-type": "main", "addr": address}]
        assert "mutually exclusive" in await source.refused("migrate", {"uri": uri, "channels": channels})
        assert "one channel" in await source.refused("migrate", {"channels": []})
        await source.say("migrate", {"channels": channels})
        assert await source.over() is Status.COMPLETED
        assert destination.guest.running
