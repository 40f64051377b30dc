"""Time limits on the command line: only a finite number above 0 is accepted."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from trimig import cli

OPTIONS = [
    ("receive", "tcp:127.0.0.1:0", "--save", "out", "--recover-for"),
    ("send", "guest", "tcp:127.0.0.1:1", "--recover-for"),
    ("migrate", "tcp:127.0.0.1:1", "--qmp", "unix:none", "--wait", "--timeout"),
    ("migrate", "--qmp", "unix:none", "--dry-run", "--seconds"),
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "0", "-1", "1e10", "", "5s"])
@pytest.mark.parametrize("words", OPTIONS, ids=lambda words: f"{words[0]} {words[-1]}")
def test_what_is_no_time_limit_is_wrong_usage(words: tuple[str, ...], value: str) -> None:
    result = CliRunner().invoke(cli.main, [*words, value])
    assert (result.exit_code, f"Invalid value for '{words[-1]}'" in result.stderr) == (2, True), result.stderr
    assert "number of seconds" in result.stderr


def test_the_help_names_the_unit() -> None:
    for command in ("receive", "send", "migrate"):
        assert "SECONDS" in CliRunner().invoke(cli.main, [command, "--help"]).stdout
