"""The two halves of a guest that a lost postcopy has left: kept, exported with a map of what is missing, and made one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import trimig
import trimig.guests
from trimig import stream
from trimig.errors import ConfigError, RemoteProtocolError, StateError

SIZE = 64 << 10
PAGES = SIZE // 4096
#: Pages 2 to 4 and the last one of `ram`, and the first of `rom`.
MISSING = {"ram": [(2, 5), (PAGES - 1, PAGES)], "rom": [(0, 1)]}


def machine(*, seed: int, name: str = "none", rom: int = 4096 * 2) -> trimig.AppGuest:
    guest = trimig.AppGuest(name, running=True)
    random = np.random.default_rng(seed)
    for block, size in (("ram", SIZE), ("rom", rom)):
        guest.add_ram(block, size)
        guest.ram[-1].pages.reshape(-1)[:] = random.integers(0, 256, size, np.uint8)
    guest.ram[0].pages[7] = 0
    guest.add_device(trimig.guests.TimerState())
    return guest


async def source_half(path: Path, *, seed: int = 1, **options: object) -> dict[str, bytes]:
    """The stream of a whole guest in a file; returns its memory."""
    with machine(seed=seed, **options) as guest:  # type: ignore[arg-type]  # handed on as they are
        await trimig.migrate(guest, f"file:{path}", trimig.Config(parameters=trimig.Parameters(max_bandwidth=0)))
        return {block.name: block.pages.tobytes() for block in guest.ram}


async def destination_half(
    whole: Path, path: Path, missing: Mapping[str, Sequence[tuple[int, int]]] = MISSING, *, poke: int | None = None
) -> None:
    """What has come of it; the page *poke* has come otherwise."""
    with await trimig.ParkedGuest.load(whole) as guest:
        for block in guest.ram:
            for first, end in missing.get(block.name, ()):
                block.pages[first:end] = 0xEE  # whatever is there must not be written
        if poke is not None:
            guest.ram[0].pages[poke] = 3
        await guest.save_partial(path, missing)


async def memory(path: Path) -> dict[str, bytes]:
    with await trimig.ParkedGuest.load(path) as guest:
        return {block.name: block.pages.tobytes() for block in guest.ram}


async def test_two_halves_make_the_guest(tmp_path: Path) -> None:
    """Byte for byte, with the devices of the destination."""
    whole, half, out = tmp_path / "whole", tmp_path / "half", tmp_path / "out"
    content = await source_half(whole)
    await destination_half(whole, half)
    merged = await stream.merge(half, whole, out)
    assert merged == stream.Merged(machine="none", filled={"ram": 4, "rom": 1}, different={"ram": 0, "rom": 0})
    assert await memory(out) == content
    with await trimig.ParkedGuest.load(out) as made, await trimig.ParkedGuest.load(whole) as before:
        assert [s.payload for s in made.sections] == [s.payload for s in before.sections]
        assert [s.idstr for s in made.sections] == [s.idstr for s in before.sections]
        assert not made.warnings


async def test_a_half_is_not_taken_for_a_guest(tmp_path: Path) -> None:
    """It is not started by accident: it is refused unless a half is asked for, and then it says what it lacks."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    await source_half(whole)
    await destination_half(whole, half)
    with pytest.raises(RemoteProtocolError, match=r"4 pages of RAM block 'ram' are not in the stream .*trimig merge"):
        await trimig.ParkedGuest.load(half)
    with await trimig.ParkedGuest.load(half, partial=True) as guest:
        assert guest.holes == MISSING
        assert not guest.ram[0].pages[2:5].any()
        assert "trimig/partial" not in [s.idstr for s in guest.sections]


async def test_raw_blocks_of_the_source(tmp_path: Path) -> None:
    """As from a QEMU's memory backend: the other block from nowhere, since nothing of it is missing."""
    whole, half, out, raw = (tmp_path / name for name in ("whole", "half", "out", "raw"))
    content = await source_half(whole)
    await destination_half(whole, half, {"ram": MISSING["ram"]})
    raw.write_bytes(content["ram"])
    merged = await stream.merge(half, None, out, raw={"ram": raw})
    assert merged.filled == {"ram": 4}
    assert await memory(out) == await memory(whole)


async def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    """Each is one clear error, and there is no file."""
    whole, half, out = tmp_path / "whole", tmp_path / "half", tmp_path / "out"
    await source_half(whole)
    await destination_half(whole, half, poke=9)
    short, name, blocks = tmp_path / "short", tmp_path / "name", tmp_path / "blocks"
    short.write_bytes(bytes(4096))
    await source_half(name, name="pc")
    await source_half(blocks, rom=4096)
    for source, raw, error, words in (
        (whole, {}, StateError, "1 pages of RAM block 'ram' are in both halves with different content"),
        (None, {"ram": short}, ConfigError, "4096 bytes, and RAM block 'ram' has 65536"),
        (None, {"rum": short}, ConfigError, "no RAM block 'rum'"),
        (name, {}, ConfigError, "different machines: 'none' and 'pc'"),
        (blocks, {}, ConfigError, "different RAM blocks: rom"),
        (half, {}, StateError, "neither half has 4 pages of RAM block 'ram', 1 pages of RAM block 'rom'"),
    ):
        with pytest.raises(error, match=words):
            await stream.merge(half, source, out, raw=raw)
        assert not out.exists()
    merged = await stream.merge(half, whole, out, accept_differences=True)
    assert merged.different["ram"] == 1
    assert (await memory(out))["ram"][9 * 4096] == 3


async def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    await source_half(whole)
    with await trimig.ParkedGuest.load(whole) as guest:
        for missing in ({"ram": [(0, PAGES + 1)]}, {"rum": [(0, 1)]}, {"ram": [(3, 2)]}):
            with pytest.raises(ValueError, match="there are no pages"):
                await guest.save_partial(tmp_path / "half", missing)
    with trimig.ParkedGuest() as empty, pytest.raises(StateError, match="nothing is parked here"):
        await empty.save_partial(tmp_path / "half", {})
    assert sorted(os.listdir(tmp_path)) == ["whole"]


def trimig_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "trimig", *arguments], capture_output=True, text=True, check=False)


async def test_export_and_merge_on_the_command_line(tmp_path: Path) -> None:
    whole, half, out = tmp_path / "whole", tmp_path / "half", tmp_path / "out"
    await source_half(whole)
    await destination_half(whole, half)

    refused = trimig_command("export", str(half), "--format", "raw", "--block", "ram", "--out", str(tmp_path / "raw"))
    assert refused.returncode == 1
    assert "--partial" in refused.stderr
    holes = tmp_path / "holes.json"
    done = trimig_command(
        "export", str(half), "--format", "raw", "--block", "ram", "--out", str(tmp_path / "raw"), "--holes", str(holes)
    )
    assert done.returncode == 0, done.stderr
    assert "16 KiB of it are not in" in done.stderr
    found = json.loads(holes.read_text())
    assert found == {
        "block": "ram",
        "length": SIZE,
        "holes": [{"offset": 2 * 4096, "length": 3 * 4096}, {"offset": SIZE - 4096, "length": 4096}],
    }
    written, content = (tmp_path / "raw").read_bytes(), (await memory(whole))["ram"]
    assert written[: 2 * 4096] == content[: 2 * 4096]
    assert written[2 * 4096 : 5 * 4096] == bytes(3 * 4096)

    assert "give the source's half" in trimig_command("merge", str(half), "--out", str(out)).stderr
    assert "is not BLOCK=PATH" in trimig_command("merge", str(half), "--raw", "x", "--out", str(out)).stderr
    made = trimig_command("merge", str(half), str(whole), "--out", str(out), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {
        "file": str(out), "machine": "none", "filled_pages": {"ram": 4, "rom": 1}, "different_pages": {"ram": 0, "rom": 0}
    }  # fmt: skip
    assert "exists; --force" in trimig_command("merge", str(half), str(whole), "--out", str(out)).stderr
    assert await memory(out) == await memory(whole)
