"""Output that fails: every command ends with its usual exit code, and without a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cli.calls import CALLS
from tests.cli.scripted import ACTIVE, Scripted
from tests.cli.scripted import DONE as COMPLETED
from tests.guests.saved import stream
from trimig import cli, qmp

ROOT: Final = Path(__file__).resolve().parents[3]
LIMIT: Final = 60


class FullDisk(io.TextIOBase):
    """Fails at each write or flush, like a file on a full disk; or with another error."""

    def __init__(self, number: int = errno.ENOSPC) -> None:
        self._error = OSError(number, os.strerror(number))
        self._pending = False

    def write(self, text: str) -> int:
        self._pending = True
        raise self._error

    def flush(self) -> None:
        if self._pending:
            raise self._error


ENDED: Final = (
    {"event": "MIGRATION", "data": {"status": "completed"}, "timestamp": {"seconds": 1, "microseconds": 0}},
)


def scripted() -> Scripted:
    return Scripted(info=ACTIVE, script=[ACTIVE, COMPLETED], capabilities={"events": True}, feed=ENDED)


def test_table_has_every_command() -> None:
    assert set(CALLS) == set(cli.COMMANDS)


@pytest.fixture
def code_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``code_of(words, stdout)`` runs a command in this process with that stdout; the files are new for each call."""

    @contextlib.asynccontextmanager
    async def connect(address: str) -> AsyncIterator[Scripted]:
        yield scripted()

    monkeypatch.setattr(qmp, "connect", connect, raising=False)
    rounds: Iterator[int] = iter(range(100))

    def call(words: list[str], out: Any, err: Any) -> int:
        directory = tmp_path / str(next(rounds))
        directory.mkdir()
        (directory / "stream").write_bytes(stream())
        files = {name: str(directory / name) for name in ("stream", "target", "out")}
        given = [word.format(**files) for word in words]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                cli.main(given)
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return call


@pytest.mark.parametrize("command", sorted(CALLS))
@pytest.mark.parametrize("as_json", [False, True])
def test_code_does_not_depend_on_the_output(code_of: Callable[..., int], command: str, as_json: bool) -> None:
    words = [command, *CALLS[command], *(["--json"] if as_json else [])]
    printed, said = io.StringIO(), io.StringIO()
    code = code_of(words, printed, said)
    assert "Traceback" not in said.getvalue()
    for number in (errno.ENOSPC, errno.EPIPE):
        said = io.StringIO()
        assert code_of(words, FullDisk(number), said) == code, said.getvalue()
        assert "Traceback" not in said.getvalue()
        warnings = said.getvalue().count("standard output cannot be written to")
        assert warnings == (number == errno.ENOSPC and bool(printed.getvalue()))
    assert code_of(words, None, io.StringIO()) == code
    assert code_of(words, io.StringIO(), FullDisk()) == code
    assert code_of(words, None, None) == code
    closed = io.StringIO()
    closed.close()
    assert code_of(words, closed, closed) == code


# -- as processes, because the interpreter also flushes output at its end ----------------------------------------------


def shell(line: str, *words: object) -> subprocess.CompletedProcess[str]:
    """*line* of the shell, where ``trimig`` is this one and ``"$@"`` is *words*."""
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("trimig", f"{sys.executable} -m trimig"), "sh", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


REDIRECTIONS: Final = [">/dev/full", ">&-", "2>/dev/full", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"]


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_handed_over_is_0_whatever_the_output(tmp_path: Path, redirection: str) -> None:
    (tmp_path / "guest").write_bytes(stream())
    done = shell(f'trimig send "$1" "file:$2" -c return-path=off {redirection}', tmp_path / "guest", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "guest.owner").exists()
    done = shell(f'trimig receive "file:$1" --save "$2" {redirection}', tmp_path / "out", tmp_path / "back")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "back").exists()


@pytest.mark.parametrize("redirection", REDIRECTIONS)
@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("--version", 0), ("sned", 2), ("send --help", 0)])
def test_help_and_wrong_usage_too(redirection: str, words: str, code: int) -> None:
    done = shell(f"trimig {words} {redirection}")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_demo_with_a_reader_that_has_gone() -> None:
    done = shell("{ trimig demo --size 4M; echo code=$? >&2; } | true")
    assert "code=0" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_ends_in_order_without_output(tmp_path: Path) -> None:
    address = tmp_path / "qmp"
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'exec {sys.executable} -m trimig run --guest process:size=4M --qmp "unix:$1" >&- 2>&-', "sh", address],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        end = time.monotonic() + LIMIT
        while not address.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()


def test_data_on_stdout_that_fails_is_a_failure(tmp_path: Path) -> None:
    """The output of export on stdout is not a report but the result itself."""
    (tmp_path / "guest").write_bytes(stream())
    done = shell('trimig export "$1" --format raw --block ram --out - >/dev/full', tmp_path / "guest")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "No space left" in done.stderr


@pytest.mark.parametrize("limit", [9, 12, 15])
def test_demo_with_few_descriptors_ends_at_once(limit: int) -> None:
    """An error or the proof, within the time of a short run."""
    done = shell(f"ulimit -n {limit}; trimig demo --size 1M --json")
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == ('"verified": true' in done.stdout)
    if done.returncode:
        assert "Too many open files" in done.stderr


def test_a_warning_is_said_once(tmp_path: Path) -> None:
    """The text is logged as well, and a log without a handler of its own would go to stderr, too."""
    for name, more in (("guest", []), ("other", ["--json"])):
        (tmp_path / name).write_bytes(stream())
        words = ["send", str(tmp_path / name), f"file:{tmp_path / 'out'}", *more]
        done = subprocess.run([sys.executable, "-m", "trimig", *words], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        said = [json.loads(line).get("text", "") if more else line.removeprefix("trimig: ") for line in lines]
        if not more:
            assert all(line.startswith("trimig: ") for line in lines)
        assert sum("no return path (" in text for text in said) == 1
