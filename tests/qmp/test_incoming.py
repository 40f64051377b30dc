"""``migrate-incoming``: once, or again after a failure."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
import trio

import trimig
from tests.qmp.driver import Talk, hosted
from trimig import api
from trimig.errors import Owner, Ownership
from trimig.monitor.monitor import core_of
from trimig.status import Role, Status
from trimig.wire import encoder as wire


async def arrives(source: Talk, destination: Talk, uri: str) -> None:
    """A whole migration, which shows that the destination still works."""
    await destination.say("migrate-incoming", {"uri": uri})
    await source.say("migrate", {"uri": uri})
    assert await source.over() is Status.COMPLETED
    await destination.over()
    assert await destination.state() == "running"


async def test_machine_that_does_not_wait() -> None:
    """B11."""
    async with hosted() as talk:
        assert "'-incoming' was not specified" in await talk.refused("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        assert talk.events == []


async def test_deferred_machine_waits_for_its_address(tmp_path: Path) -> None:
    """B9, B10, B12, F2: inmigrate with nothing listening; the second address is refused and changes nothing."""
    async with hosted() as source, hosted(waiting=True) as talk:
        assert (await talk.state(), await talk.query()) == ("inmigrate", {})
        assert "waiting for an incoming" in await talk.refused("migrate", {"uri": "tcp:127.0.0.1:1"})
        assert "defer" in await talk.refused("migrate-incoming", {"uri": "defer"})
        uri = f"unix:{tmp_path}/s"
        await talk.say("migrate-incoming", {"uri": uri})
        before = await talk.query()
        assert before["socket-address"]
        assert "status" not in before
        assert "already been started" in await talk.refused("migrate-incoming", {"uri": f"unix:{tmp_path}/t"})
        assert (await talk.query(), os.listdir(tmp_path)) == (before, ["s"])
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED
        await talk.over()
        assert "was not specified" in await talk.refused("migrate-incoming", {"uri": uri})


@pytest.mark.parametrize("uri", ["pigeon:1", "tcp:foo", "fd:nosuch", "fd:999999", "exec:", "file:"])
async def test_address_that_cannot_be_understood(tmp_path: Path, uri: str) -> None:
    """B8, B13, B14: ``setup`` is emitted before the address is checked, with events on or off; the status stays none,
    and the command may be repeated."""
    async with hosted() as source, hosted(waiting=True) as talk:
        for _ in range(2):
            await talk.refused("migrate-incoming", {"uri": uri})
            assert await talk.query() == {}
        assert talk.names() == ["setup", "setup"]
        await arrives(source, talk, f"unix:{tmp_path}/s")


async def test_address_that_is_in_use(tmp_path: Path) -> None:
    """B13."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with hosted() as source, hosted(waiting=True) as talk:
            uri = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
            assert "in use" in await talk.refused("migrate-incoming", {"uri": uri})
            assert await talk.state() == "inmigrate"
            await arrives(source, talk, f"unix:{tmp_path}/s")


async def test_stream_that_is_none(tmp_path: Path) -> None:
    """Gap G13: a QEMU exits, and its monitor and the reason with it. A trimig drops a connection that does not begin
    like a source. A source that fails later makes the attempt fail with a reason, and the next attempt may succeed."""
    async with hosted() as source, hosted(waiting=True) as talk:
        await talk.capabilities(events=True)
        await talk.say("migrate-incoming", {"uri": f"unix:{tmp_path}/s"})
        stream = await trio.open_unix_socket(f"{tmp_path}/s")
        async with stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert await stream.receive_some() == b""
        assert talk.machine.incoming.status is Status.SETUP
        stream = await trio.open_unix_socket(f"{tmp_path}/s")
        async with stream:
            await stream.send_all(wire.file_header() + wire.configuration(talk.guest.name, ()) + b"\xff")
            await talk.over()
        info = await talk.query()
        assert (info["status"], info["owner"]) == ("failed", "source")
        assert info["error-desc"]
        assert (await talk.state(), talk.names()) == ("inmigrate", ["setup", "active", "failed"])
        await arrives(source, talk, f"unix:{tmp_path}/s")


@pytest.mark.parametrize("kind", ["exec", "file", "fd"])
async def test_guest_comes_from_what_was_kept(tmp_path: Path, kind: str) -> None:
    """B7: from a command, a file, a pipe. Without a wait for a connection, the migration may end before the
    command returns."""
    path = tmp_path / "kept"
    async with hosted() as source, hosted(waiting=True) as talk:
        await source.say("migrate", {"uri": f"file:{path}"})
        assert await source.over() is Status.COMPLETED
        if kind == "fd":
            reading, writing = os.pipe()
            talk.fds.append(reading)
            await talk.say("getfd", {"fdname": "line"})
            os.write(writing, path.read_bytes())
            os.close(writing)
        uri = {"exec": f"exec:cat {path}", "file": f"file:{path}", "fd": "fd:line"}[kind]
        await talk.say("migrate-incoming", {"uri": uri})
        await talk.over()
        assert (await talk.query())["status"] == "completed"
        assert await talk.state() == "running"


async def test_guest_goes_on_from_where_it_has_come_to(tmp_path: Path) -> None:
    """G10, U1: the destination's part of query-migrate; the members of an outgoing migration replace it."""
    async with hosted() as first, hosted(waiting=True) as second, hosted(waiting=True) as third:
        await arrives(first, second, f"unix:{tmp_path}/s")
        assert {**await second.query(), "owner": ""} == {"status": "completed", "owner": ""}
        await second.refused("migrate", {"uri": "tcp:foo"})
        assert (await second.query())["owner"] == "source"
        await arrives(second, third, f"unix:{tmp_path}/t")
        assert [await talk.state() for talk in (first, second, third)] == ["postmigrate", "postmigrate", "running"]
        assert (await second.query())["owner"] == "destination"


async def test_after_a_failed_attempt_nothing_listens_until_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """B13: the machine listens exactly where it says: without an address there is no socket; migrate-incoming makes
    one."""
    async with hosted() as source, hosted(waiting=True) as talk:
        first, second = f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"
        await talk.say("migrate-incoming", {"uri": first})
        stream = await trio.open_unix_socket(f"{tmp_path}/a")
        async with stream:
            await stream.send_all(b"QEVM\0\0\0\x03\x07" + (8).to_bytes(4) + b"scripted\x7f" * 40)
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_eof()
            await talk.over()
        assert "nothing listens here until trimig incoming (migrate-incoming) gives an address" in caplog.text
        info = await talk.query()
        assert info["status"] == "failed"
        assert "socket-address" not in info
        assert os.listdir(tmp_path) == []
        await talk.say("migrate-incoming", {"uri": second})
        assert os.listdir(tmp_path) == ["b"]
        await source.say("migrate", {"uri": second})
        assert await source.over() is Status.COMPLETED


@pytest.mark.parametrize("owner", ["source", "destination"])
async def test_a_guest_that_its_source_may_have_taken_back_is_settled(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has arrived, so the machine waits for nothing. The guest does not run before a client settles the
    owner."""
    said: list[Owner] = []
    statuses = (Status.ACTIVE, Status.HANDOVER, Status.POSTCOPY_ACTIVE, Status.POSTCOPY_UNCERTAIN, Status.UNCERTAIN)

    async def receive(
        guest: trimig.Guest, uri: str, config: trimig.Config, *, monitor: trimig.Monitor
    ) -> trimig.Summary:
        core = core_of(monitor)

        async def settle(which: Owner) -> None:
            await trio.lowlevel.checkpoint()
            said.append(which)
            core.advance(Status.COMPLETED if which is Owner.HERE else Status.FAILED)

        core.begin(Role.DESTINATION, config, guest)
        for status in statuses:
            core.advance(status)
        await trio.lowlevel.checkpoint()
        raise trimig.HandoverUncertain("perhaps the source runs it", settle=settle, here=Ownership.DESTINATION)

    monkeypatch.setattr(api, "receive", receive)
    async with hosted(waiting=True) as talk:
        await talk.say("migrate-incoming", {"uri": f"unix:{tmp_path}/s"})
        await talk.over()
        info = await talk.query()
        assert (info["status"], info["owner"]) == ("failed", "unknown")
        assert await talk.state() != "inmigrate"
        assert "not certain which side owns" in await talk.refused("cont")
        assert "was not specified" in await talk.refused("migrate-incoming", {"uri": f"unix:{tmp_path}/t"})
        assert await talk.say("x-trimig-settle", {"owner": owner}) == {}
        assert said == [Owner.HERE if owner == "destination" else Owner.ELSEWHERE]
        assert "nothing is to be settled" in await talk.refused("x-trimig-settle", {"owner": owner})
