"""The harness itself, QEMU to QEMU: its assumptions must hold before it tests trimig."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from tests.qemu.bootsector import assert_no_gap, boot_sector, parse_counts
from tests.qemu.harness import Machine, Qemu, QemuExited, QmpError, parse_size, random_ram
from tests.qemu.relay import Relay

LIMIT = 60.0


# Real QEMUs


@pytest.mark.qemu
@pytest.mark.parametrize("return_path", [False, True])
async def test_all_ram_arrives_between_two_qemus(return_path: bool) -> None:
    capabilities = {"return-path": return_path}
    with trio.fail_after(LIMIT):
        async with Qemu.start("none", "64M") as source, Qemu.start("none", "64M", incoming="defer") as destination:
            source.ram[:] = random_ram(parse_size("64M"), seed=2)
            await destination.set_capabilities(capabilities)
            uri = await destination.incoming("tcp:127.0.0.1:0")
            info = await source.migrate(uri, capabilities=capabilities, parameters={"max-bandwidth": 1 << 33})
            await destination.wait_migration_status("completed")
            assert info["ram"]["normal"] >= 64 << 8
            assert np.array_equal(source.ram, destination.ram)
            await source.wait_status("postmigrate")
            assert source.migration_statuses()[-1] == "completed"


@pytest.mark.qemu
@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_boot_sector_counts_on_after_a_migration(machine: Machine) -> None:
    boot = boot_sector()
    with trio.fail_after(LIMIT):
        async with (
            Qemu.start(machine, "16M", boot=boot) as source,
            Qemu.start(machine, "16M", boot=boot, incoming="tcp:127.0.0.1:0") as destination,
        ):
            await source.wait_serial(lambda text: text.count("\n") >= 5)
            await source.migrate(await destination.incoming_uri("unknown"))
            await destination.wait_status("running")
            await destination.wait_serial(lambda text: text.count("\n") >= 5)
            stopped_at = source.serial_text()
            assert_no_gap(parse_counts(stopped_at + destination.serial_text()))
            await destination.qmp.wait_event("RESUME")
            assert source.serial_text() == stopped_at


@pytest.mark.qemu
async def test_relay_between_qemus_decides_when_the_guest_runs_there() -> None:
    """Without a return path the source is done when the socket has its bytes; the last byte starts the guest."""
    boot = boot_sector()
    with trio.fail_after(LIMIT):
        async with (
            Qemu.start("pc", "16M", boot=boot) as source,
            Qemu.start("pc", "16M", boot=boot, incoming="tcp:127.0.0.1:0") as destination,
            Relay(await destination.incoming_uri("unknown")) as relay,
        ):
            relay.forward.hold_last = 1
            await source.wait_serial(lambda text: text.count("\n") >= 3)
            await source.migrate(relay.uri)
            await relay.forward.wait_until(lambda d: d.ended and d.held == 1)
            assert await destination.query_status() == "inmigrate"
            relay.forward.release()
            await destination.wait_status("running")
            await destination.wait_serial(lambda text: text.count("\n") >= 3)
            assert_no_gap(parse_counts(source.serial_text() + destination.serial_text()))


@pytest.mark.qemu
async def test_guest_notices_a_wrong_page() -> None:
    with trio.fail_after(LIMIT):
        async with Qemu.start("pc", "16M", boot=boot_sector()) as vm:
            await vm.wait_serial(lambda text: text.count("\n") >= 2)
            vm.ram[0x42000] ^= 0xFF
            text = await vm.wait_serial(lambda text: "!\n" in text)
            with pytest.raises(ValueError, match="a page that is not what it had written"):
                parse_counts(text)


def test_counts_with_gap_repeat_or_garbage_are_refused() -> None:
    assert parse_counts("00000001\n0000") == [1]
    assert_no_gap([1, 2, 3])
    for counts in ([], [2, 3], [1, 3], [1, 2, 2], [1, 2, 1]):
        with pytest.raises(AssertionError):
            assert_no_gap(counts)
    for text in ("0000000g\n", "000000001\n", "\n"):
        with pytest.raises(ValueError, match="not a count"):
            parse_counts(text)


@pytest.mark.qemu
async def test_captures_are_whole_streams_that_qemu_loads(captures: dict[str, Path]) -> None:
    assert sorted(captures) == ["microvm", "none", "pc", "q35"]
    for path in captures.values():
        data = path.read_bytes()
        assert data.startswith(b"QEVM\x00\x00\x00\x03")
        # The file ends with the description, or QEMU was not done when the file was renamed.
        starts = (at.end() for at in re.finditer(rb"\x06....(?=\{)", data, re.DOTALL))
        (start,) = (at for at in starts if int.from_bytes(data[at - 4 : at]) == len(data) - at)
        assert "devices" in json.loads(data[start:])
    with trio.fail_after(LIMIT):
        async with Qemu.start("pc", "16M", boot=boot_sector(), incoming=f"exec:cat '{captures['pc']}'") as vm:
            await vm.wait_status("running")
            text = await vm.wait_serial(lambda text: text.count("\n") >= 5)
            # The guest may have been saved inside a line; from the first whole line on it counts by one.
            counts = parse_counts(text.partition("\n")[2])
            assert counts == list(range(counts[0], counts[0] + len(counts)))
            assert counts[0] > 3


@pytest.mark.qemu
async def test_memory_file_has_what_the_guest_has(tmp_path: Path) -> None:
    async with Qemu.start("none", "16M", memory_file=tmp_path / "ram") as vm:
        vm.ram[4096:8192] = 7
        dump = tmp_path / "dump"
        await vm.qmp.execute("pmemsave", {"val": 0, "size": 1, "filename": str(dump)})
        assert (tmp_path / "ram").read_bytes()[4095:8193] == b"\0" + bytes([7]) * 4096 + b"\0"


@pytest.mark.qemu
async def test_refusals_and_failed_starts_say_why() -> None:
    async with Qemu.start("none", "16M") as vm:
        with pytest.raises(QmpError, match="migration protocol"):
            await vm.migrate("nonsense:1")
        # A port without a listener: refused after the command was accepted.
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        with pytest.raises(AssertionError, match=r"failed.*onnect"):
            await vm.migrate(f"tcp:127.0.0.1:{port}")
        assert await vm.quit() == 0
    with pytest.raises(QemuExited) as caught:
        async with Qemu.start("none", "16M", extra=["-no-such-option"]):
            pytest.fail("it started")
    assert "no-such-option" in "".join(caught.value.__notes__)


@pytest.mark.qemu
async def test_cancelled_start_and_block_leave_no_process() -> None:
    """The fixture no_leaks checks the children."""
    for deadline in (0.0, 0.02, 0.3):
        with trio.move_on_after(deadline) as scope:
            async with Qemu.start("none", "16M", paused=True):
                await trio.sleep_forever()
        assert scope.cancelled_caught


# The relay, between two ordinary streams


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Relay, trio.SocketStream, trio.SocketStream]]:
    """A relay with its client and its target connected."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        listener,
        Relay(f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}") as relay,
        await trio.open_tcp_stream("127.0.0.1", relay.port) as client,
        await listener.accept() as target,
    ):
        await relay.connected.wait()
        yield relay, client, target


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])


async def test_relay_passes_both_directions_and_half_closes() -> None:
    payload = bytes(random_ram(1 << 20, seed=3))
    async with relayed() as (relay, client, target), trio.open_nursery() as nursery:

        async def send() -> None:
            await client.send_all(payload)
            await client.send_eof()

        nursery.start_soon(send)
        assert await read_all(target) == payload
        await target.send_all(b"answer")
        await target.send_eof()
        assert await read_all(client) == b"answer"
        assert relay.forward.delivered == relay.forward.received == len(payload)
        assert (relay.back.delivered, relay.connections) == (6, 1)


@pytest.mark.parametrize("sent", [[b"0123456789"], [b"01234", b"56789"], [bytes([byte]) for byte in b"0123456789"]])
async def test_relay_cuts_at_the_exact_byte(sent: Sequence[bytes]) -> None:
    async with relayed() as (relay, client, target):
        relay.forward.cut_at = 7
        for chunk in sent:
            try:
                await client.send_all(chunk)
            except trio.BrokenResourceError:
                break  # the cut came before all was sent
        assert await read_all(target) == b"0123456"
        assert relay.forward.delivered == 7


async def test_relay_holds_the_last_bytes_back_until_released() -> None:
    async with relayed() as (relay, client, target):
        relay.forward.hold_last = 4
        await client.send_all(b"0123456789")
        await relay.forward.wait_until(lambda d: d.delivered == 6)
        await client.send_eof()
        await relay.forward.wait_until(lambda d: d.ended)
        assert (await target.receive_some(), relay.forward.held) == (b"012345", 4)
        relay.forward.release()
        assert await read_all(target) == b"6789"


async def test_relay_holds_everything_from_a_byte_on() -> None:
    async with relayed() as (relay, client, target):
        relay.forward.hold_from = 3
        await client.send_all(b"0123456789")
        await relay.forward.wait_until(lambda d: d.held == 7)
        assert await target.receive_some() == b"012"
        relay.forward.release()
        assert await target.receive_some() == b"3456789"


async def test_relay_drops_the_return_path_and_its_end() -> None:
    async with relayed() as (relay, client, target):
        relay.back.drop_from = 2
        await target.send_all(b"0123")
        await relay.back.wait_until(lambda d: d.received == 4 and d.held == 0)
        await target.send_eof()
        await relay.back.wait_until(lambda d: d.ended)
        assert await client.receive_some() == b"01"
        await client.send_all(b"still there")
        assert await target.receive_some() == b"still there"
        assert relay.back.delivered == 2


async def test_relay_cut_on_demand_is_seen_on_both_sides() -> None:
    async with relayed() as (relay, client, target):
        relay.cut()
        assert await client.receive_some() == b""
        assert await target.receive_some() == b""
    async with relayed() as (relay, client, target):
        relay.cut(reset=True)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await target.receive_some()


async def test_relay_hands_on_that_a_peer_is_gone() -> None:
    async with relayed() as (relay, client, target):
        relay.forward.delay = 0.01
        await target.aclose()
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - the first writes still fit the buffers
            while True:
                await client.send_all(bytes(1 << 16))


async def test_relay_does_not_wrap_the_failure_of_its_block() -> None:
    with pytest.raises(ZeroDivisionError):
        async with relayed():
            raise ZeroDivisionError
