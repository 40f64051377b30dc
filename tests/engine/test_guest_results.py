"""What a guest's own code returns is checked where it comes in: one error that names the block or the device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair
from trimig.engine.guest_results import absent_pages, saved_devices
from trimig.guest import DeviceSection, DirtyTracker
from trimig.testing import FakeDevice, ScriptedGuest
from trimig.testing.parts import FakeBlock

SOUND = DeviceSection(idstr="clock", version_id=1, payload=bytes(8))


class Tracker:
    """Returns something else than what it has found."""

    method = "wrong"

    def __init__(self, inner: DirtyTracker, result: object) -> None:
        self._inner = inner
        self._result = result
        self.start, self.stop = inner.start, inner.stop

    async def sync(self) -> Any:
        await self._inner.sync()
        return self._result


class Mistaken(ScriptedGuest):
    """A guest with a tracker or devices that are wrong."""

    def __init__(self, *, written: object = None, saved: object = None) -> None:
        super().__init__(blocks={"ram": 4, "rom": 1}, devices=[FakeDevice("clock", size=8, seed=1)])
        self._written = written
        self._saved = saved

    def dirty_tracker(self) -> Any:
        tracker = super().dirty_tracker()
        return tracker if self._written is None else Tracker(tracker, self._written)

    async def save_devices(self) -> Any:
        saved = await super().save_devices()
        return saved if self._saved is None else self._saved


async def refused(guest: Mistaken) -> str:
    """The text of the error at the source, which keeps its guest."""
    target = ScriptedGuest(blocks={"ram": 4, "rom": 1}, devices=[FakeDevice("clock", size=8)], run_state="inmigrate")
    here, there = await Pair(guest, target).both()
    assert isinstance(here, trimig.GuestFailed), repr(here)
    assert isinstance(there, trimig.MigrationError), repr(there)
    assert here.owner is trimig.Ownership.SOURCE
    assert (guest.run_state, target.run_state) == ("running", "inmigrate")
    assert not guest.misuse
    return str(here)


def of(**bitmaps: object) -> dict[str, object]:
    return {"ram": np.zeros(4, np.bool_), "rom": np.zeros(1, np.bool_), **bitmaps}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ([np.zeros(4, np.bool_)], "returned [array"),
        ({"ram": np.zeros(4, np.bool_)}, "returned nothing for RAM block 'rom'"),
        (of(rom=None), "returned None (NoneType) for RAM block 'rom': it must be a NumPy array of dtype bool and shape (1,)"),
        (of(ram=[True, False, True, False]), "(list) for RAM block 'ram'"),
        (of(ram=np.zeros(3, np.bool_)), "an array of dtype bool and shape (3,) for RAM block 'ram'"),
        (of(ram=np.zeros((4, 1), np.bool_)), "shape (4, 1) for RAM block 'ram'"),
        (of(ram=np.zeros(4, np.uint8)), "an array of dtype uint8 and shape (4,) for RAM block 'ram'"),
        (of(ram=np.array([0, 3])), "an array of dtype int64 and shape (2,) for RAM block 'ram'"),
    ],
)  # fmt: skip
async def test_pages_of_a_tracker(autojump_clock: trio.testing.MockClock, written: object, words: str) -> None:
    text = await refused(Mistaken(written=written))
    assert words in text
    assert "sync() of the dirty tracker returned" in text


def changed(**fields: object) -> list[DeviceSection]:
    return [SOUND, dataclasses.replace(SOUND, **fields)]  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (7, "save_devices() returned 7 (int): it must return a list of DeviceSection"),
        (b"state", "it must return a list of DeviceSection"),
        ([SOUND, b"state"], "as number 1: each must be a DeviceSection"),
        (changed(payload="state"), "device 'clock' (number 1) with 'state' (str) as payload: it must be bytes"),
        (changed(payload=None), "None (NoneType) as payload"),
        (changed(idstr=""), "a name that is no str of 1 to 255 bytes"),
        (changed(idstr=256 * "x"), "a name that is no str of 1 to 255 bytes"),
        (changed(idstr=b"clock"), "a name that is no str of 1 to 255 bytes"),
        (changed(version_id=-1), "version_id -1: it must be an integer from 0 to 2^32-1"),
        (changed(version_id="1"), "version_id '1': it must be"),
        (changed(instance_id=2**32), "instance_id 4294967296: it must be"),
        (changed(section_id=2.5), "section_id 2.5: it must be"),
        (changed(description="{}"), "as description: it must be a dict, or None"),
    ],
)
async def test_devices_of_a_guest(autojump_clock: trio.testing.MockClock, saved: object, words: str) -> None:
    assert words in await refused(Mistaken(saved=saved))


@pytest.mark.parametrize("form", [list, tuple])
def test_sound_devices_are_what_was_given(form: Callable[[Sequence[DeviceSection]], Sequence[DeviceSection]]) -> None:
    given = form([SOUND, dataclasses.replace(SOUND, idstr=255 * "x", instance_id=2**32 - 1, payload=bytes(3))])
    assert saved_devices(given) is given


@pytest.mark.parametrize("result", [[True] * 4, np.zeros(4, np.uint8), np.zeros(3, np.bool_), 0], ids=repr)
def test_absent_pages_that_are_none(result: Any) -> None:
    (block,) = ScriptedGuest(blocks={"ram": 4}).ram
    with pytest.raises(trimig.GuestFailed, match=r"absent\(\) of RAM block 'ram' returned .*shape \(4,\)"):
        absent_pages(result, block)
    assert absent_pages(None, block) is None


class Sliced(FakeBlock):
    """A block that says of each slice the same."""

    result: Any = None

    def absent_slice(self, first_page: int, count: int) -> Any:
        return self.result


@pytest.mark.parametrize("result", [True, np.bool_(True), np.zeros(4, np.uint8), np.ones(1, np.bool_)], ids=repr)
async def test_absent_pages_of_a_slice_that_are_none(autojump_clock: trio.testing.MockClock, result: Any) -> None:
    """What is taken for absent is not sent: a value for all pages at once would lose them."""
    guest = Mistaken()
    block = Sliced("ram", guest.ram[0].pages, guest.update)
    block.result = result
    guest._ram = (block, guest.ram[1])
    said = await refused(guest)
    assert re.search(r"looking at the guest's memory failed|absent\(\) of RAM block 'ram' returned", said)
