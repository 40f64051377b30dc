"""Streams of machine types up to 2.3, which have no configuration section and no footers, are recognised as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio.testing

import trimig
from tests.engine import test_destination as known
from tests.stream.made import DEVICES, SWITCHOVER_START, content, elements, joined, read_everywhere, received
from trimig.stream import inspect_stream

FORMS: dict[str, dict[str, Any]] = {
    "an ordinary one": {},
    "no configuration section": {"configuration": b""},
    "no footers": {"footers": False},
    "neither": {"configuration": b"", "footers": False},
}


@pytest.mark.parametrize("form", list(FORMS))
async def test_what_a_stream_has_is_seen_from_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, form: str
) -> None:
    """Live, from a file, by inspect and export: the default profile reads them all."""
    data = joined(elements(**FORMS[form]))
    report = await read_everywhere(data, tmp_path)
    assert (report.configuration, report.footers) == ("configuration" not in FORMS[form], "footers" not in FORMS[form])
    assert report.problems == []
    assert [d.payload for d in report.devices] == [d.payload for d in DEVICES]


@pytest.mark.parametrize("piece", [1, 7])
@pytest.mark.parametrize("form", list(FORMS))
async def test_it_is_kept_as_it_came(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, form: str, piece: int
) -> None:
    """A QEMU of that machine type must be able to load the file: it has what the stream had, and nothing else."""
    data = joined(elements(**FORMS[form]))
    with trimig.ParkedGuest(tmp_path / "out") as guest:
        await received(data, guest, piece=piece)
        assert np.array_equal(guest.ram[0].pages, content())
    saved = (tmp_path / "out").read_bytes()
    report = await inspect_stream(tmp_path / "out")
    assert (report.configuration, report.footers) == ("configuration" not in FORMS[form], "footers" not in FORMS[form])
    tail = data[data.index(b"\4\0\0\0\0\5timer") :]
    assert saved.endswith(tail)
    with await trimig.ParkedGuest.load(tmp_path / "out") as again:
        assert np.array_equal(again.ram[0].pages, content())
        assert again.peer.send_configuration is report.configuration
        assert again.peer.send_section_footer is report.footers


async def test_a_profile_that_is_wrong_is_corrected_by_what_comes(autojump_clock: trio.testing.MockClock) -> None:
    legacy = trimig.Config(peer=trimig.PeerProfile.named("legacy-2.3"))
    with trimig.ParkedGuest() as guest:
        await received(joined(elements()), guest, legacy)
        assert (guest.peer.send_configuration, guest.peer.send_section_footer) == (True, True)
        assert guest.name == "toy-1.0"


async def test_a_command_behind_the_list_tells_too(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    parts = elements(footers=False)
    parts["start"] += SWITCHOVER_START
    report = await read_everywhere(joined(parts), tmp_path)
    assert (report.footers, len(report.commands)) == (False, 1)


async def test_a_machine_that_is_known_must_name_itself(autojump_clock: trio.testing.MockClock) -> None:
    """An application's guest is not filled by a source that does not say which machine it sends."""
    fed = await known.Fed().feed(known.stream(configuration=b""))
    assert isinstance(fed.result, trimig.RemoteProtocolError)
    assert "the configuration section is missing" in str(fed.result)
    assert "legacy-2.3" in str(fed.result)
