"""A pause that nothing could end, in commands that start processes or wait."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.guests.saved import stream
from trimig import cli


@pytest.mark.parametrize("command", [["send", "{file}", "tcp:127.0.0.1:1"], ["demo", "--size", "1M"]])
def test_pause_that_nothing_could_end_is_refused(command: list[str], tmp_path: Path) -> None:
    """Also from a file; off counts as absent."""
    (tmp_path / "guest").write_bytes(stream())
    (tmp_path / "c.toml").write_text("[capabilities]\npause-before-switchover = true\n")
    words = [word.format(file=tmp_path / "guest") for word in command]
    for options in (["-c", "pause-before-switchover"], ["--config", str(tmp_path / "c.toml")]):
        result = CliRunner().invoke(cli.main, [*words, *options])
        assert (result.exit_code, "trimig continue" in result.stderr) == (2, True), result.stderr
    result = CliRunner().invoke(cli.main, [*words, "-c", "pause-before-switchover=off"])
    assert "trimig continue" not in result.stderr
