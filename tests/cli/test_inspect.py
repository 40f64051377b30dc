"""``trimig inspect`` and ``export``: their output, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.guests.saved import PAGES, content, stream
from trimig.cli import main


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(stream())
    return path


def test_report_for_people(saved: Path) -> None:
    result = invoke("inspect", saved)
    assert result.exit_code == 0
    for words in ("machine 'toy-1.0'", "run state paused", "5 pages, 1 zero pages", "i8259/1 (id 7", "PING 00000001"):
        assert words in result.stdout
    assert "runstate" not in result.stdout
    assert "size = 7  (uint32)" in invoke("inspect", saved, "--fields").stdout


def test_report_for_machines(saved: Path) -> None:
    result = invoke("inspect", saved, "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["sound"], report["size"]) == (0, True, len(stream()))
    assert [device["idstr"] for device in report["devices"]] == ["timer", "i8259", "globalstate"]


def test_one_device(saved: Path) -> None:
    result = invoke("inspect", saved, "--device", "i8259")
    assert result.exit_code == 0
    assert "data = 41414141414141" in result.stdout
    assert "timer" not in result.stdout
    result = invoke("inspect", saved, "--device", "nvme")
    assert result.exit_code == 2
    assert "there are timer, i8259/1, globalstate" in result.stderr


def test_a_damaged_stream_is_printed_as_far_as_it_goes(saved: Path) -> None:
    saved.write_bytes(stream()[:9000])
    result = invoke("inspect", saved)
    assert result.exit_code == 1
    assert "machine 'toy-1.0'" in result.stdout
    assert "DAMAGED: the stream ends in section 'ram' at byte 9000" in result.stdout
    assert "before the guest was complete" in result.stderr
    result = invoke("inspect", saved, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "TransportFailed"
    assert invoke("inspect", saved.with_name("none")).exit_code == 1


def test_export(saved: Path) -> None:
    out = saved.with_name("out")
    arguments = ("export", saved, "--format", "raw", "--out", out)
    assert invoke(*arguments, "--block", "ram").exit_code == 0
    assert out.read_bytes() == content().tobytes()
    assert invoke(*arguments, "--block", "ram").exit_code == 2
    result = invoke(*arguments, "--block", "rom", "--force", "--json")
    assert json.loads(result.stdout)["bytes"] == 4096
    assert out.stat().st_size == 4096 < PAGES * 4096
    result = invoke("export", saved, "--format", "raw", "--block", "disk", "--out", saved.with_name("two"))
    assert result.exit_code == 2
    assert "it has 'ram', 'rom'" in result.stderr
    result = invoke("export", saved, "--format", "elf", "--block", "ram", "--out", saved.with_name("two"))
    assert result.exit_code == 2
    assert "'elf' is not built yet; there is raw" in result.stderr
    assert sorted(path.name for path in saved.parent.iterdir()) == ["guest", "out"]
