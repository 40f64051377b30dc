"""The first programs of the guide, as they stand there: moved without an exception, and safe where nothing listens."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import trimig

from . import pages

FILES = [block.text for block in pages.blocks(pages.BY_NAME["guide.md"]) if re.match(r"# \w+\.py\n", block.text)]
#: Both files without the line that runs them.
PROGRAM = re.sub(r"^trio\.run\(.*\)$", "", "\n".join(FILES), flags=re.MULTILINE)
ADDRESS = "unix:handover.sock"


def program(address: str) -> tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]], list[trimig.AppGuest]]:
    """hand_over, take_over, and the guests that they make, with *address* for the page's."""
    assert PROGRAM.count(ADDRESS) == 2
    names: dict[str, Any] = {}
    exec(PROGRAM.replace(ADDRESS, address), names)  # noqa: S102 - what a reader would run
    made: list[trimig.AppGuest] = []

    class Noted(trimig.AppGuest):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    names["trimig"] = type("Names", (), {**vars(trimig), "AppGuest": Noted})
    return names["hand_over"], names["take_over"], made


async def test_the_two_programs_move_the_guest_and_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand_over, take_over, made = program(f"unix:{tmp_path}/socket")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_over)
            while not (tmp_path / "socket").exists():  # noqa: ASYNC110 - the program has no monitor
                await trio.sleep(0.01)
            await hand_over()
    out = capsys.readouterr().out
    assert "moved; it stood still for" in out
    assert "it runs here; it begins with" in out
    there, here = made
    assert (there.owner, there.run_state) == (trimig.Owner.HERE, "running")
    assert (here.owner, here.run_state) == (trimig.Owner.ELSEWHERE, "paused")
    with pytest.raises(trimig.NotOwner):
        await here.resume()
    for guest in made:
        guest.close()


async def test_without_a_listener_the_guest_is_served_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand_over, _, made = program(f"unix:{tmp_path}/nothing")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand_over)
            said = ""
            while "not moved; it is served on here" not in said:
                await trio.sleep(0.01)
                said += capsys.readouterr().out
            (here,) = made
            here.ram[0].pages[0, :8] = 0
            while bytes(here.ram[0].pages[0, :8]) != b"a write.":  # noqa: ASYNC110 - nor does it tell of writes
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert here.owner is trimig.Owner.HERE
    here.close()
