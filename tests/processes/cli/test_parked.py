"""``trimig receive``, ``send`` and ``settle`` as processes: exit codes, the record of the owner, no leftovers."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

import trimig
from tests.guests.saved import check, stream
from tests.processes.cli.command import LIMIT, LISTEN, first_line, started, text_of, trimig_command
from tests.qemu.relay import Relay
from trimig.errors import Ownership
from trimig.stream import read_record, record_path


async def test_a_guest_goes_from_file_to_file(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", target) as receiver:
            assert receiver.stdout is not None
            line = await first_line(receiver.stdout)
            assert line.startswith("listening on tcp:127.0.0.1:")
            code, out, err = await trimig_command("send", saved, line.removeprefix("listening on "), "--json")
            assert (code, [w for w in err.splitlines() if "warning" in w]) == (0, [])
            report = json.loads(out)
            assert (report["machine"], report["confirmed"], report["prepared"]) == ("toy-1.0", True, True)
            said = await text_of(receiver.stdout)
            assert await receiver.wait() == 0
    assert "timer, i8259/1, globalstate" in said
    with await trimig.ParkedGuest.load(target) as guest:
        check(guest)
    record = read_record(saved)
    assert record is not None
    assert record.owner is Ownership.DESTINATION
    assert sorted(await trio.to_thread.run_sync(os.listdir, tmp_path)) == ["guest", "guest.owner", "target"]
    # The file may serve as a template, but only with a warning; and without a listener nothing changes.
    code, _, err = await trimig_command("send", saved, "tcp:127.0.0.1:1", "--force")
    assert code == 1
    assert f"was handed over to {record.destination}" in err
    assert "connection refused" in err
    assert read_record(saved) == record
    assert (await trimig_command("settle", saved, "--owner", "source"))[0] == 1


async def test_receive_in_json(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", target, "--json") as receiver:
            assert receiver.stdout is not None
            assert receiver.stderr is not None
            note: dict[str, Any] = {}
            while "address" not in note:
                note = json.loads(await first_line(receiver.stderr))
            with await trimig.ParkedGuest.load(saved) as guest:
                await trimig.migrate(guest, note["address"])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(text_of, receiver.stderr)
                report = json.loads(await text_of(receiver.stdout))
            assert await receiver.wait() == 0
    assert report["file"] == str(target)
    assert report["file_bytes"] == target.stat().st_size
    assert [d["idstr"] for d in report["devices"]] == ["timer", "i8259", "globalstate"]


async def test_a_lost_answer_is_remembered_until_it_is_settled(saved: Path, tmp_path: Path) -> None:
    """T2: exit code 3, and no second attempt before a user has settled the owner."""
    config = tmp_path / "config.toml"
    config.write_text("handover-timeout = 2\n")
    monitor = trimig.Monitor()
    with trimig.ParkedGuest() as target, trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(trimig.receive, target, LISTEN, monitor=monitor))
            while not monitor.addresses:
                await monitor.wait_changed()
            async with Relay(monitor.addresses[0]) as relay:
                relay.back.drop_from = 32  # four PONGs pass, two of them for the mark; the answer does not
                code, _, err = await trimig_command("send", saved, relay.uri, "--config", config)
                uri = relay.uri
        assert target.run_state == "paused"  # it did arrive
    assert code == 3
    assert f"trimig settle {saved} --owner source|destination" in err
    record = read_record(saved)
    assert record is not None
    assert (record.owner, record.destination) == (Ownership.UNKNOWN, uri)

    code, out, _ = await trimig_command("send", saved, uri, "--json")
    assert (code, json.loads(out)["owner"]) == (3, "unknown")
    assert read_record(saved) == record
    assert (await trimig_command("receive", LISTEN, "--save", saved, "--force"))[0] == 3

    assert (await trimig_command("settle", saved, "--owner", "destination"))[0] == 0
    assert json.loads(record_path(saved).read_text())["owner"] == "destination"


async def test_settled_as_source_it_can_be_sent(saved: Path) -> None:
    code, _, err = await trimig_command("settle", saved, "--owner", "source")
    assert (code, "nothing to settle" in err) == (1, True)
    record_path(saved).write_text("damaged")
    code, _, err = await trimig_command("send", saved, "tcp:127.0.0.1:1")
    assert (code, "is damaged" in err) == (3, True)
    assert (await trimig_command("settle", saved, "--owner", "source"))[0] == 0
    code, _, err = await trimig_command("send", saved, "tcp:127.0.0.1:1")
    assert (code, "connection refused" in err) == (1, True)
    assert not record_path(saved).exists()


async def part_of(peer: trio.SocketStream) -> bytes:
    """The next output, which must come."""
    data = await peer.receive_some()
    assert data, "the other side has ended"
    return bytes(data)


async def test_a_signal_before_the_decision_leaves_the_guest_here(saved: Path) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(LIMIT):
        address = f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}"
        async with listener, started("send", saved, address) as sender, await listener.accept() as peer:
            # The relay answers the first PING, as every destination does. Then all arrives except the commit; no PONG
            # comes.
            received, ping = b"", b"\x08\x00\x02\x00\x04"
            while len(received) < received.find(ping) + 9 or ping not in received:
                received += await part_of(peer)
            at = received.index(ping) + len(ping)
            await peer.send_all(b"\x00\x02\x00\x04" + received[at : at + 4])
            while not received.endswith(ping + b"trig"):
                received += await part_of(peer)
            sender.send_signal(signal.SIGINT)
            assert await sender.wait() == 130
    assert not record_path(saved).exists()


async def test_a_signal_while_waiting_leaves_no_file(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", tmp_path / "target") as receiver:
            assert receiver.stdout is not None
            await first_line(receiver.stdout)
            receiver.send_signal(signal.SIGTERM)
            assert await receiver.wait() == 130
    assert await trio.to_thread.run_sync(os.listdir, tmp_path) == []


async def test_a_killed_receiver_leaves_no_file(saved: Path, tmp_path: Path) -> None:
    """SIGKILL while pages are being written, on a file system with unnamed files, like ext4 and tmpfs."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", folder / "target", "--json") as receiver:
            assert receiver.stderr is not None
            note: dict[str, Any] = {}
            while "address" not in note:
                note = json.loads(await first_line(receiver.stderr))
            host, port = note["address"].removeprefix("tcp:").rsplit(":", 1)
            async with await trio.open_tcp_stream(host, int(port)) as source:
                await source.send_all(stream()[:15000])
                descriptors = Path(f"/proc/{receiver.pid}/fd")
                while not any(  # noqa: ASYNC110 - another process
                    os.readlink(entry).startswith(str(folder)) and entry.stat().st_size > 4096
                    for entry in await trio.to_thread.run_sync(lambda: list(descriptors.iterdir()))
                ):
                    await trio.sleep(0.01)
                receiver.kill()
                await receiver.wait()
    assert await trio.to_thread.run_sync(os.listdir, folder) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("receive", LISTEN, "--save", "guest"), 2, "guest exists; --force replaces it"),
        (("receive", LISTEN, "--save", "no/where"), 2, "there is no directory no"),
        (("receive", LISTEN, "--save", "dangling"), 2, "dangling is a symbolic link; --force replaces it"),
        (("receive", LISTEN, "--save", "folder"), 2, "is a directory"),
        (("receive", LISTEN, "--save", "folder", "--force"), 2, "is a directory"),
        (("receive", LISTEN, "--save", "n" * 256), 2, "File name too long"),
        (("receive", "carrier:pigeon", "--save", "x"), 2, "unknown protocol"),
        (("receive", LISTEN, "--save", "x", "-c", "no-such"), 2, "no-such"),
        (("send", "missing", "tcp:127.0.0.1:1"), 1, "No such file"),
        (("send", "junk", "tcp:127.0.0.1:1"), 1, "not a migration stream"),
    ],
)
async def test_wrong_use_is_one_sentence(
    saved: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    monkeypatch.chdir(saved.parent)
    (saved.parent / "junk").write_bytes(b"GIF89a")
    (saved.parent / "dangling").symlink_to("nothing")
    (saved.parent / "folder").mkdir()
    got, out, err = await trimig_command(*arguments)
    assert (got, out) == (code, "")
    assert words in err
    assert len(err.splitlines()) == 1
    assert sorted(await trio.to_thread.run_sync(os.listdir, saved.parent)) == ["dangling", "folder", "guest", "junk"]
