"""Signals before, while and after a command watches for them: 130 if the signal ended it, else its own exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import trio

import trimig
from tests.guests.saved import stream
from trimig.cli.stop import words_for
from trimig.monitor.monitor import core_of

ROOT: Final = Path(__file__).resolve().parents[3]

#: Put before a program, because the tests themselves may run under nohup.
NO_NOHUP: Final = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
#: Runs a command with the remaining arguments, and raises a signal at the point of the first argument.
PROGRAM: Final = """
import atexit, importlib, signal, sys
import trimig.__main__
where, number, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def hit():
    signal.raise_signal(number)

import trimig.cli.runner as runner
run, real = runner.trio.run, importlib.import_module
if where == "import":
    def import_module(name, *rest):
        if name.startswith("trimig.cli."):
            hit()
        return real(name, *rest)
    importlib.import_module = import_module
elif where in ("before", "after"):
    def wrapped(*args, **kwargs):
        if where == "before":
            hit()
        code = run(*args, **kwargs)
        if where == "after":
            hit()
        return code
    runner.trio.run = wrapped
elif where == "exit":
    atexit.register(hit)
sys.argv = ["trimig", *words]
trimig.__main__.main()
"""


def ended(where: str, number: int, *words: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{NO_NOHUP}{PROGRAM}", where, str(number), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [2, 15, 1], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_at_the_beginning_is_130(tmp_path: Path, number: int) -> None:
    target = tmp_path / "target"
    for where in ("import", "before"):
        code, _ = ended(where, number, "receive", "tcp:127.0.0.1:0", "--save", target)
        assert code == 130, where
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [2, 15, 1], ids=["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("where", ["after", "exit"])
def test_signal_that_comes_too_late_changes_nothing(tmp_path: Path, number: int, where: str) -> None:
    (tmp_path / "guest").write_bytes(stream())
    words = ["send", tmp_path / "guest", f"file:{tmp_path / 'out'}", "-c", "return-path=off"]
    assert ended(where, number, *words)[0] == 0
    assert ended(where, number, "receive", f"file:{tmp_path / 'out'}", "--save", tmp_path / "back")[0] == 0
    assert ended(where, number, "send", tmp_path / "guest", "tcp:127.0.0.1:1", "--force")[0] == 1
    assert (tmp_path / "back").exists()


def test_a_hangup_stays_ignored_where_it_is(tmp_path: Path) -> None:
    """As nohup starts a command."""
    (tmp_path / "guest").write_bytes(stream())
    words = ["send", str(tmp_path / "guest"), f"file:{tmp_path / 'out'}"]
    code = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", code, "before", "1", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "SIGHUP" in done.stderr) == (0, False), done.stderr


# -- the text for the consequences of a signal -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "role", "words"),
    [
        ([], "source", "no memory has been sent yet"),
        (["setup"], "destination", "no memory has been sent yet"),
        (["setup", "active"], "source", "the guest stays in FILE"),
        (["setup", "active"], "destination", "the source keeps its guest"),
        (["setup", "active", "device", "handover"], "source", "too late to cancel: the decision has been sent"),
        (["setup", "active", "handover"], "destination", "too late to cancel: the guest is being taken over"),
        (["setup", "active", "device", "handover", "completed"], "source", "it is over already"),
        (["setup", "failed"], "destination", "it is over already"),
    ],
)
async def test_words_for_a_signal_are_true(statuses: list[str], role: str, words: str) -> None:
    monitor = trimig.Monitor()
    core = core_of(monitor)
    for status in statuses:
        if status == "setup":
            core.begin(trimig.Role(role), trimig.Config())
        else:
            core.advance(trimig.Status(status))
    await trio.lowlevel.checkpoint()
    assert words in words_for(monitor, "FILE")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run", "--guest", "process:size=1M", "--qmp", "unix:{dir}/qmp"], 0),
        (["receive", "tcp:127.0.0.1:0", "--save", "{dir}/g"], 130),
    ],
)
def test_signal_where_nothing_is_under_way_promises_nothing(words: list[str], code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trimig", *(word.format(dir=tmp_path) for word in words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process, process.stdout:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "QMP at" in line or "listening on" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
    (said,) = [line for line in lines if "SIGTERM" in line]
    assert "ending" in said
    assert "guest" not in said
    assert "put back" not in said
