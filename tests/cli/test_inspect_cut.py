"""``trimig inspect`` of a cut stream: everything up to the cut, then the error; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.stream.made import device, elements, joined
from trimig.cli import main

#: With enough RAM sections that the list leaves some out.
LONG = dict(elements())
LONG["part"] *= 9
WHOLE = joined(LONG)
HEAD = len(LONG["header"] + LONG["configuration"] + LONG["start"]) + 40
EOF_AT = len(WHOLE) - len(LONG["text"]) - 1
CUTS = [*range(1, HEAD), *range(HEAD, EOF_AT - 250, 4999), *range(EOF_AT - 250, len(WHOLE), 11)]


@pytest.mark.parametrize("json_too", [False, True])
def test_cut_anywhere(tmp_path: Path, json_too: bool) -> None:
    """With one RAM section, with two, with too many to list, inside devices, inside the description."""
    path = tmp_path / "cut"
    sections = 0
    for cut in CUTS:
        path.write_bytes(WHOLE[:cut])
        result = CliRunner().invoke(main, ["inspect", str(path), *(["--json"] if json_too else [])])
        assert isinstance(result.exception, SystemExit | None), (cut, result.exception)
        whole = cut == EOF_AT + 1
        assert result.exit_code == (0 if whole else 1), cut
        if json_too:
            report = json.loads(result.stdout)
            assert report["sound"] is whole
            assert len(report["sections"]) >= sections
            sections = len(report["sections"])
            continue
        assert ("DAMAGED: the stream ends" in result.stdout) is not whole, (cut, result.stdout)
        for words, place in (
            ("machine 'toy-1.0'", len(LONG["header"] + LONG["configuration"]) + 1),
            ("RAM blocks", HEAD),
        ):
            if cut >= place:
                assert words in result.stdout, (cut, words)


def test_sections_of_ram_that_are_left_out_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(WHOLE)
    shown = CliRunner().invoke(main, ["inspect", str(path)]).stdout
    assert "… 5 more" in shown
    assert shown.count(" ram (id 2") == 6
    many = elements(devices=[device(f"d{k}", b"", k + 10) for k in range(20)])
    path.write_bytes(joined(many))
    shown = CliRunner().invoke(main, ["inspect", str(path)]).stdout
    assert " more\n" not in shown


def test_cut_file_that_is_sent_is_named_and_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "half.mig"
    for cut in (EOF_AT - 100, EOF_AT - 3):
        path.write_bytes(WHOLE[:cut])
        result = CliRunner().invoke(main, ["send", str(path), "tcp:127.0.0.1:1"])
        assert result.exit_code == 1
        assert "half.mig: the stream ends " in result.stderr, result.stderr
        assert f"at byte {cut} (" in result.stderr
