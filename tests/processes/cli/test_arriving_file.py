"""A parked guest that arrives at a ``trimig run``: from the arrival on its file has a lock and a record, so that no other
command takes the guest for its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

import trimig
from tests.guests.saved import check
from tests.guests.saved import stream as saved_stream
from tests.processes.cli.command import LIMIT, LISTEN, first_line, started, text_of, trimig_command
from tests.processes.cli.hosted import hosting, status
from trimig import cli, qmp, stream
from trimig.errors import Ownership

CLOSED = "tcp:127.0.0.1:1"


def command(*words: object) -> Result:
    """A command in this process, which neither hosts nor sends the guest."""
    return CliRunner().invoke(cli.main, [*map(str, words)])


def record_of(file: Path) -> Ownership | None:
    record = stream.read_record(file)
    return None if record is None else record.owner


@asynccontextmanager
async def arrived(saved: Path, via: Path, *words: object) -> AsyncIterator[tuple[trio.Process, qmp.Client]]:
    """A ``trimig run`` at which the guest in *saved* has arrived; it keeps the guest in *via*."""
    address = f"unix:{via}.sock"
    guest = ("--guest", f"parked:{via}", "--incoming", address)
    async with hosting(f"unix:{via}.qmp", *guest, *words) as (process, client):
        code, _, err = await trimig_command("send", saved, address, "--force")
        assert code == 0, err
        await status(client, "completed")
        yield process, client


@asynccontextmanager
async def listening(guest: trimig.ParkedGuest) -> AsyncIterator[str]:
    """The address at which *guest* is received."""
    monitor = trimig.Monitor()

    async def receive() -> None:
        await trimig.receive(guest, LISTEN, monitor=monitor)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        while not monitor.addresses:
            await monitor.wait_changed()
        yield monitor.addresses[0]


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[str, trio.Event]]:
    """The address of a destination that answers every PING and nothing else; the event is set by the decision."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    decided = trio.Event()

    async def destination() -> None:
        ping, mark, read, at = b"\x08\x00\x02\x00\x04", b"trig", b"", 0
        async with await listener.accept() as peer:
            while data := await peer.receive_some():
                read += data
                while (found := read.find(ping, at)) >= 0 and len(read) >= found + 9:
                    at = found + 9
                    await peer.send_all(b"\x00\x02\x00\x04" + read[found + 5 : at])
                    if read[found + 5 : at] == mark and len(read) > at:
                        decided.set()
                if read[at - 4 : at] == mark and len(read) > at:
                    decided.set()

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(destination)
        yield f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}", decided
        nursery.cancel_scope.cancel()


async def test_no_other_command_takes_the_guest_of_a_run(saved: Path, tmp_path: Path) -> None:
    via = tmp_path / "via"
    with trimig.ParkedGuest() as there, trio.fail_after(LIMIT):
        async with arrived(saved, via) as (_, client):
            assert record_of(via) is None
            for words in (
                ("send", via, CLOSED),
                ("send", via, CLOSED, "--force"),
                ("settle", via, "--owner", "source"),
                ("receive", LISTEN, "--save", via, "--force"),
                ("merge", saved, saved, "--out", via, "--force"),
                ("merge", saved, via, "--out", tmp_path / "merged"),
            ):
                result = command(*words)
                assert (result.exit_code, "by another trimig" in result.stderr) == (1, True), (words, result.stderr)
            other = ("run", "--guest", f"parked:{via}", "--qmp", f"unix:{tmp_path}/other.qmp")
            code, _, err = await trimig_command(*other)
            assert (code, "by another trimig" in err) == (1, True), err
            async with listening(there) as address:
                await client.execute("migrate", {"uri": address})
                await status(client, "completed")
                assert record_of(via) is Ownership.DESTINATION
        check(there)
    assert record_of(via) is Ownership.DESTINATION
    for again in (("send", str(via), CLOSED), other):
        code, _, err = await trimig_command(*again)
        assert (code, "to tcp:127.0.0.1:" in err) == (1, True), err


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_a_run_that_ends_with_its_guest_leaves_it_in_the_file(how: str, saved: Path, tmp_path: Path) -> None:
    via = tmp_path / "via"
    with trimig.ParkedGuest() as there, trio.fail_after(LIMIT):
        async with arrived(saved, via) as (process, client):
            await client.execute("migrate", {"uri": f"unix:{tmp_path}/nothing"})
            await status(client, "failed")
            getattr(process, how)()
            await process.wait()
        assert record_of(via) is None
        async with listening(there) as address:
            code, _, err = await trimig_command("send", via, address)
            assert code == 0, err
        check(there)


async def test_a_run_that_is_killed_before_the_arrival_leaves_no_file(tmp_path: Path) -> None:
    via = tmp_path / "via"
    guest = ("--guest", f"parked:{via}", "--incoming", f"unix:{via}.sock")
    async with hosting(f"unix:{via}.qmp", *guest) as (process, _):
        process.kill()
        await process.wait()
    assert not via.exists()
    assert record_of(via) is None


async def test_a_run_that_is_killed_behind_its_decision_leaves_an_open_question(saved: Path, tmp_path: Path) -> None:
    via = tmp_path / "via"
    with trio.fail_after(LIMIT):
        async with silent() as (address, decided), arrived(saved, via) as (process, client):
            await client.execute("migrate", {"uri": address})
            await decided.wait()
            assert record_of(via) is Ownership.UNKNOWN
            process.kill()
            await process.wait()
    assert record_of(via) is Ownership.UNKNOWN
    result = command("send", via, CLOSED)
    assert (result.exit_code, f"trimig settle {via}" in result.stderr) == (3, True)
    assert command("settle", via, "--owner", "source").exit_code == 0
    assert record_of(via) is None


async def test_an_answer_that_is_missing_is_settled_over_qmp(saved: Path, tmp_path: Path) -> None:
    via, toml = tmp_path / "via", tmp_path / "trimig.toml"
    toml.write_text("[engine]\nhandover-timeout = 2.0\n")
    with trio.fail_after(LIMIT):
        async with silent() as (address, _), arrived(saved, via, "--config", toml) as (_, client):
            await client.execute("migrate", {"uri": address})
            await status(client, "failed")
            assert record_of(via) is Ownership.UNKNOWN
            await client.execute("x-trimig-settle", {"owner": "destination"})
            assert record_of(via) is Ownership.DESTINATION


@pytest.mark.parametrize("where", ["run", "receive"])
async def test_the_record_of_a_guest_that_had_the_name_before_is_forgotten(
    where: str, saved: Path, tmp_path: Path
) -> None:
    """The file was removed, and its record was not: the guest that arrives was never sent."""
    via = tmp_path / "via"
    stream.write_record(via, stream.OwnerRecord.now(Ownership.DESTINATION, "tcp:b:1"))
    with trio.fail_after(LIMIT):
        if where == "run":
            async with arrived(saved, via):
                assert record_of(via) is None
        else:
            async with started("receive", LISTEN, "--save", via) as receiver:
                assert receiver.stdout is not None
                address = (await first_line(receiver.stdout)).removeprefix("listening on ")
                assert (await trimig_command("send", saved, address))[0] == 0
                await text_of(receiver.stdout)
                assert await receiver.wait() == 0
    assert record_of(via) is None
    assert "connection refused" in (await trimig_command("send", via, CLOSED))[2]


@pytest.mark.parametrize("words", [("run", "--guest", "parked:via", "--incoming", LISTEN), ("receive", LISTEN)])
def test_a_name_whose_owner_is_not_known_is_not_used_again(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream.write_record(Path("via"), stream.OwnerRecord.now(Ownership.UNKNOWN, "tcp:b:1"))
    result = command(*words, *(("--save", "via") if words[0] == "receive" else ()))
    assert (result.exit_code, "no answer came" in result.stderr) == (3, True), result.stderr


def test_a_file_where_no_file_can_be_is_refused_before_a_guest_comes(tmp_path: Path) -> None:
    result = command("run", "--guest", f"parked:{tmp_path}/nothing/via", "--incoming", LISTEN)
    assert (result.exit_code, "No such file or directory" in result.stderr) == (2, True), result.stderr


def test_a_link_to_a_file_has_the_record_of_the_file(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    stream.write_record(link, stream.OwnerRecord.now(Ownership.DESTINATION, "tcp:b:1"))
    assert json.loads(Path(f"{saved}.owner").read_text())["file"] == saved.name
    for name in (link, saved):
        result = command("send", name, CLOSED)
        assert (result.exit_code, "was handed over to tcp:b:1" in result.stderr) == (1, True), result.stderr


def test_a_file_that_was_replaced_while_it_was_locked_is_not_taken(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock belongs to the file, and another file has the name now."""
    new = tmp_path / "new"
    new.write_bytes(saved.read_bytes())
    flock = fcntl.flock

    def replaced(fd: int, how: int) -> None:
        flock(fd, how)
        new.replace(saved)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with contextlib.ExitStack() as stack, pytest.raises(trimig.StateError, match="was replaced"):
        stack.enter_context(stream.locked(saved))


async def test_a_run_listens_again_after_a_source_that_left(saved: Path, tmp_path: Path) -> None:
    """Until then a source says that nothing listens there."""
    via = tmp_path / "via"
    address, monitor = f"unix:{via}.sock", f"unix:{via}.qmp"
    guest = ("--guest", f"parked:{via}", "--incoming", "defer")
    async with hosting(monitor, *guest) as (_, client):
        assert (await trimig_command("incoming", address, "--qmp", monitor))[
            1
        ] == f"the destination waits at {address}\n"
        async with await trio.open_unix_socket(f"{via}.sock") as source:
            await source.send_all(saved_stream()[:300])
        await status(client, "failed")
        code, _, err = await trimig_command("send", saved, address)
        assert (code, "No such file or directory (does a destination listen there?)" in err) == (1, True), err
        assert (await trimig_command("incoming", address, "--qmp", monitor))[0] == 0
        assert (await trimig_command("send", saved, address))[0] == 0
        await status(client, "completed")
