"""Commands of newer QEMUs in a stream: SWITCHOVER_START is read wherever it stands, what is newer still is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio.testing
from click.testing import CliRunner

import trimig
from tests.engine import test_destination as known
from tests.engine import test_postcopy_bad_input as pc_input
from tests.engine.pair import ACCEPTED
from tests.stream.made import (
    DEVICES,
    SWITCHOVER_START,
    elements,
    read_everywhere,
    received,
    with_before,
)
from trimig.cli import main
from trimig.stream import export_raw, inspect_stream
from trimig.wire import encoder as wire
from trimig.wire import postcopy as pc
from trimig.wire.refusals import Unsupported

PLACES = ["start", "part", "end", "device 0", "device 1", "eof"]
NEWER = bytes.fromhex("08 000c 0002 0000")


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("place", PLACES)
async def test_switchover_start_is_harmless_wherever_it_stands(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, place: str, times: int
) -> None:
    """newer.md part 2: early and repeated copies mean nothing; the devices are the same as without it."""
    report = await read_everywhere(with_before(elements(), place, times * SWITCHOVER_START), tmp_path)
    assert [(c.name, c.payload) for c in report.commands] == times * [("SWITCHOVER_START", b"")]
    assert [d.payload for d in report.devices] == [d.payload for d in DEVICES]
    assert report.problems == []


@pytest.mark.parametrize("place", list(known.parts())[2:-1])
async def test_switchover_start_to_a_guest_with_devices_of_its_own(
    autojump_clock: trio.testing.MockClock, place: str
) -> None:
    data = with_before(known.parts(), place, SWITCHOVER_START)
    fed = await known.Fed().feed(data)
    assert isinstance(fed.result, trimig.Summary), fed.result
    assert fed.guest.running
    assert fed.answers.endswith(ACCEPTED)


@pytest.mark.parametrize("place", ["before the discards", "in the package", "behind the switch"])
async def test_switchover_start_of_postcopy(autojump_clock: trio.testing.MockClock, place: str) -> None:
    sent = dict.fromkeys(("before the discards", "in the package", "behind the switch"), b"")
    sent[place] = SWITCHOVER_START
    package = pc.packaged(pc_input.LISTEN + pc_input.devices() + sent["in the package"] + wire.ping(3) + pc_input.RUN)
    stream = pc_input.OPENING + sent["before the discards"] + pc_input.discard(*pc_input.ALL) + package
    stream += sent["behind the switch"] + pc_input.part(*pc_input.ALL) + pc_input.END
    target = pc_input.guest()
    summary = await received(stream, target, pc_input.able())
    assert summary.warnings == ()
    assert target.running
    assert (target.ram[0].pages == 5).all()


async def test_a_parked_guest_takes_it_inside_a_package(autojump_clock: trio.testing.MockClock) -> None:
    package = pc.packaged(pc_input.LISTEN + SWITCHOVER_START + pc_input.devices() + wire.ping(3) + pc_input.RUN)
    with trimig.ParkedGuest() as guest:
        await received(pc_input.OPENING + package + pc_input.part(*pc_input.ALL) + pc_input.END, guest, pc_input.able())
        assert [s.idstr for s in guest.sections] == ["clock", "globalstate"]


@pytest.mark.parametrize("place", PLACES)
async def test_a_newer_command_is_named_and_is_no_damage(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, place: str
) -> None:
    parts = elements()
    data = with_before(parts, place, NEWER)
    at = data.index(NEWER)
    (tmp_path / "in").write_bytes(data)
    words = "command 0x000c with 2 bytes of payload is newer than the commands known here"
    with pytest.raises(Unsupported, match=words) as refused:
        await trimig.ParkedGuest.load(tmp_path / "in")
    assert refused.value.offset == at
    with trimig.ParkedGuest() as guest, pytest.raises(Unsupported, match=words) as refused:
        await received(data, guest)
    assert refused.value.offset == at
    if not place.startswith("device") and place != "eof":
        with pytest.raises(Unsupported, match=words):
            await export_raw(tmp_path / "in", "ram", tmp_path / "out")
        report = await inspect_stream(tmp_path / "in")
        assert (report.sound, report.damaged) == (False, False)


def test_inspect_does_not_call_a_newer_command_damage(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(with_before(elements(), "part", NEWER))
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "in")])
    assert shown.exit_code == 1
    assert "CANNOT BE READ ANY FURTHER: command 0x000c" in shown.stdout
    assert "damaged" not in (shown.stdout + shown.stderr).lower()


async def test_switchover_start_with_a_payload_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    data = with_before(elements(), "end", bytes.fromhex("08 000b 0001 00"))
    with (
        trimig.ParkedGuest() as guest,
        pytest.raises(trimig.RemoteProtocolError, match="SWITCHOVER_START with 1 bytes"),
    ):
        await received(data, guest)
