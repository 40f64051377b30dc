"""Each option of the stream changes the stream, in precopy and in postcopy, and changes nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running
from tests.engine.test_one_way import OnlySends
from tests.engine.test_switch import CLOCK, able, at, going
from tests.reading import Element, Memory, elements, words
from trimig.testing import FakeDevice, ScriptedGuest, VirtualLink

OPTIONS = ("send_configuration", "send_section_footer", "store_global_state")


def without(option: str | None, start: trimig.Config) -> trimig.Config:
    peer = trimig.PeerProfile(suppress_vmdesc=start.peer.suppress_vmdesc, **({option: False} if option else {}))  # type: ignore[arg-type]
    return dataclasses.replace(start, peer=peer)


async def stream(option: str | None, *, postcopy: bool) -> tuple[Pair, bytes]:
    """What is sent without *option*, and the pair that it went through."""
    if postcopy:
        pair = going(config=without(option, able()))
        at(pair.here, "setup", pair.here.start_postcopy)
    else:
        pair = Pair(running(content="mixed"), link=VirtualLink(record=True), config_here=without(option, config()))
    here, there = await pair.both()
    assert isinstance(here, trimig.Summary), here
    assert isinstance(there, trimig.Summary), there
    return pair, pair.link.recorded("a->b")


def flat(found: list[Element]) -> list[Element]:
    return [inner for element in found for inner in (element, *element.inner)]


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
@pytest.mark.parametrize("option", OPTIONS)
async def test_option_that_is_off(autojump_clock: trio.testing.MockClock, option: str, postcopy: bool) -> None:
    """A9: without the option exactly its bytes are missing, and the guest arrives as it would with it."""
    _, whole = await stream(None, postcopy=postcopy)
    pair, less = await stream(option, postcopy=postcopy)
    everything = elements(whole, CLOCK)
    found = elements(less, CLOCK, configuration=option != "send_configuration", footers=option != "send_section_footer")
    left_out = {"send_configuration": "configuration", "store_global_state": "full globalstate"}.get(option)
    assert words(flat(found)) == [word for word in words(flat(everything)) if word != left_out]
    match option:
        case "send_configuration":
            gone = 1 + 4 + len("scripted")
        case "send_section_footer":
            gone = 5 * sum(element.word.startswith(("start", "part", "end", "full")) for element in flat(everything))
        case _:
            gone = 1 + 4 + 1 + len("globalstate") + 8 + 104 + 5 + _described(whole) - _described(less)
    assert len(whole) - len(less) == gone
    assert np.array_equal(Memory().take(found).pages["ram"], pair.target.ram[0].pages)
    assert pair.target.run_state == "running"


def _described(data: bytes) -> int:
    """Bytes of the description."""
    return sum(len(e.payload) for e in elements(data, CLOCK) if e.word == "description")


@pytest.mark.parametrize("run_state", ["paused", "running"])
async def test_without_a_stored_run_state_a_guest_arrives_running(
    autojump_clock: trio.testing.MockClock, run_state: str
) -> None:
    """A9, P9: there is nothing to tell the destination otherwise, as between older QEMUs."""
    pair = Pair(running(run_state=run_state), config_here=without("store_global_state", config()))
    here, _ = await pair.both()
    assert isinstance(here, trimig.Summary), here
    assert pair.target.run_state == "running"


class Dreaming(ScriptedGuest):
    """A guest that comes into a run state which no stream can carry, while its memory is sent."""

    @property
    def run_state(self) -> str:
        """Known until the first page has been sent."""
        return "dreaming" if "sync" in self.events() and not self.running else super().run_state


async def test_run_state_that_cannot_be_stored_fails_the_migration(autojump_clock: trio.testing.MockClock) -> None:
    """M10: with its name in the error; the destination has not run, and the guest is here."""
    guest = Dreaming(blocks={"ram": 4}, run_state="paused", devices=[FakeDevice("clock", size=8)])
    pair = Pair(guest)
    here, there = await pair.both()
    assert isinstance(here, trimig.MigrationError), here
    assert "dreaming" in str(here)
    assert here.owner is trimig.Ownership.SOURCE
    assert isinstance(there, trimig.MigrationError), there
    assert not pair.target.executed


async def test_postcopy_without_a_way_back_fails_before_a_byte(autojump_clock: trio.testing.MockClock) -> None:
    """K2: what cannot be answered is not begun; the guest was never stopped."""
    link = VirtualLink(record=True)
    guest, monitor = running(), trimig.Monitor()
    with pytest.raises(trimig.ConfigError, match="postcopy needs a return path"):
        await trimig.migrate(guest, OnlySends(link.a), able(), monitor=monitor)
    assert link.recorded("a->b") == b""
    assert (guest.run_state, "pause" in guest.events()) == ("running", False)
