"""A parked guest that ``trimig run`` hosts and migrates away: the record beside its file names the owner."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

import trimig
from tests.guests.saved import stream as saved_stream
from tests.processes.cli.hosted import hosting, status
from trimig import cli, stream
from trimig.errors import Ownership


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(saved_stream())
    return path


async def test_after_it_was_migrated_the_file_is_not_sent_again(guest: Path, tmp_path: Path) -> None:
    with trimig.ParkedGuest() as there, trio.fail_after(60):
        monitor = trimig.Monitor()
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                await trimig.receive(there, "tcp:127.0.0.1:0", monitor=monitor)

            nursery.start_soon(receive)
            while not monitor.addresses:
                await monitor.wait_changed()
            async with hosting(f"unix:{tmp_path}/qmp", "--guest", f"parked:{guest}") as (_, client):
                assert stream.read_record(guest) is None
                settle = CliRunner().invoke(cli.main, ["send", str(guest), "tcp:127.0.0.1:1"])
                held = "is held by another trimig (send, settle, receive or run); end that one first"
                assert (settle.exit_code, held in settle.stderr) == (1, True), settle.stderr
                await client.execute("migrate", {"uri": monitor.addresses[0]})
                await status(client, "completed")
        record = stream.read_record(guest)
        assert record is not None
        assert record.owner is Ownership.DESTINATION
        assert record.destination.startswith("tcp:127.0.0.1:")
    result = CliRunner().invoke(cli.main, ["send", str(guest), "tcp:127.0.0.1:1"])
    assert (result.exit_code, "--force" in result.stderr) == (1, True)


async def test_a_migration_that_fails_leaves_no_record(guest: Path, tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with hosting(f"unix:{tmp_path}/qmp", "--guest", f"parked:{guest}") as (_, client):
            await client.execute("migrate", {"uri": f"unix:{tmp_path}/nothing"})
            await status(client, "failed")
    assert stream.read_record(guest) is None


async def test_an_answer_that_is_missing_is_recorded_and_settled(guest: Path, tmp_path: Path) -> None:
    """The destination takes everything and then sends nothing more."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    uri = f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}"
    toml = tmp_path / "trimig.toml"
    toml.write_text("[engine]\nhandover-timeout = 2.0\n")

    async def destination() -> None:
        """Echo every PING, and no more."""
        peer = await listener.accept()
        async with peer:
            read = b""
            at = 0
            while data := await peer.receive_some():
                read += data
                while (at := read.find(b"\x08\x00\x02\x00\x04", at)) >= 0 and len(read) >= at + 9:
                    await peer.send_all(b"\x00\x02\x00\x04" + read[at + 5 : at + 9])
                    at += 9
                at = max(0, at if at >= 0 else len(read) - 8)

    with trio.fail_after(60):
        async with (
            listener,
            hosting(f"unix:{tmp_path}/qmp", "--guest", f"parked:{guest}", "--config", str(toml)) as (_, client),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(destination)
            await client.execute("migrate", {"uri": uri})
            await status(client, "failed")
            record = stream.read_record(guest)
            assert record is not None
            assert (record.owner, record.destination) == (Ownership.UNKNOWN, uri)
            await client.execute("x-trimig-settle", {"owner": "source"})
            assert stream.read_record(guest) is None
            nursery.cancel_scope.cancel()
