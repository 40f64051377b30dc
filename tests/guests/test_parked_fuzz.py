"""The tail of a guest that is parked: devices of a machine that is not known, damaged in any way.

The guest is kept with every byte that came, or refused with one error and its place; its memory is right either way.
"""

from __future__ import annotations

import collections
import contextlib
import random

import trio
import trio.testing

import trimig
from tests import tiers
from tests.engine.postcopy_fuzz import flipped
from tests.fuzzed import Fuzzed
from tests.guests.saved import content, devices, stream
from trimig.status import Status
from trimig.testing import VirtualLink
from trimig.wire import encoder as wire

INPUTS = 400
MANY = 20_000
WHOLE = stream()
#: Where the devices begin, and where the end of file stands.
TAIL = WHOLE.index(b"\4" + (devices()[0].section_id or 0).to_bytes(4, "big") + bytes([len(devices()[0].idstr)]))


def damaged(chosen: random.Random) -> bytes:
    """The tail, changed, cut, or with a part of it twice."""
    tail = WHOLE[TAIL:]
    match chosen.randrange(4):
        case 0:
            return tail[: chosen.randrange(len(tail))]
        case 1:
            at = chosen.randrange(len(tail))
            return tail[:at] + tail[at - chosen.randrange(at + 1) :]
        case 2:
            at = chosen.randrange(len(tail))
            return tail[:at] + chosen.randbytes(chosen.randrange(60)) + tail[at:]
    return flipped(chosen, tail)


async def one(seed: int) -> str:
    """Park it; returns how that ended."""
    chosen = random.Random(seed)
    tail = damaged(chosen) if seed else WHOLE[TAIL:]
    link, monitor = VirtualLink(seed=seed, window=1 << 20), trimig.Monitor()
    end: trimig.Summary | trimig.TrimigError | None = None
    heard = bytearray()
    with trimig.ParkedGuest() as guest:

        async def receive() -> None:
            nonlocal end
            try:
                end = await trimig.receive(guest, link.b, trimig.Config(stall_timeout=5.0), monitor=monitor)
            except trimig.TrimigError as error:
                end = error

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                with contextlib.suppress(trio.BrokenResourceError):
                    await link.a.send_all(WHOLE[:TAIL])
                    for at in range(0, len(tail), step := chosen.choice((1 << 20, 97))):
                        await link.a.send_all(tail[at : at + step])
                    await link.a.send_eof()
                with contextlib.suppress(trio.BrokenResourceError):
                    while data := await link.a.receive_some(4096):
                        heard += data
                await link.a.aclose()
        if isinstance(end, trimig.Summary):
            assert monitor.status is Status.COMPLETED
            assert heard.endswith(b"\0\1\0\4\0\0\0\0")
            assert (guest.ram[0].pages == content()).all()
            kept = b"".join(wire.device_section(s, s.section_id or 0) for s in guest.sections)
            assert tail.startswith(kept), "other devices than those that came"
            return "kept"
        assert isinstance(end, trimig.MigrationError), f"{end!r}"
        assert not isinstance(end, trimig.InternalError), f"{end!r}"
        assert monitor.owner is trimig.Ownership.SOURCE
        assert not heard.endswith(b"\0\1\0\4\0\0\0\0")
        return "refused"


def test_tails_of_all_kinds(fuzzed: Fuzzed) -> None:
    """T4, P4: kept as they came or refused, and the source is told the same."""
    count = MANY if tiers.everything() else INPUTS
    ends: collections.Counter[str] = collections.Counter()
    for seed in range(count):
        try:
            ends[trio.run(one, seed, clock=trio.testing.MockClock(autojump_threshold=0))] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    fuzzed("tails of parked guests", count)
    assert ends["kept"] > 5
    assert ends["refused"] > count // 4
