"""fd: in other processes, which have one of the ends or start with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import trio
import trio.testing

from trimig.config import Config
from trimig.transport import fd

DATA = bytes(range(256)) * 1024

#: Runs in a process of its own: standard input and output are consumed there.
_SCRIPT = """
import os, sys, trio, trimig
from trimig import transport
async def main():
    async with transport.listening("fd:0", print_nothing) as listener:
        source = await listener.accept()
    sink = await transport.connect("fd:1")
    async with source, sink:
        while data := await source.receive_some(65536):
            await sink.send_all(data.upper())
    refused = ""
    try:
        await transport.connect("fd:2")
    except trimig.TransportFailed as error:
        refused = str(error)
    links = [os.readlink(f"/proc/self/fd/{n}") for n in (0, 1)]
    sys.stderr.write(f"{refused}|{links}")
def print_nothing(uri): pass
trio.run(main)
"""


async def test_standard_input_and_output_are_taken_and_something_stands_in_for_them(tmp_path: Path) -> None:
    """A file that is opened later must not become standard output; a refused descriptor (a file as stderr) stays
    open."""
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        done = await trio.run_process(
            [sys.executable, "-c", _SCRIPT], stdin=b"stream" * 9000, capture_stdout=True, stderr=stderr
        )
    assert done.stdout == b"STREAM" * 9000
    assert errors.read_text().startswith("descriptor 2 is a file (use file:PATH")
    assert errors.read_text().endswith("|['/dev/null', '/dev/null']")


async def test_child_that_was_given_the_other_end_finds_it_as_it_was(pipe: tuple[int, int]) -> None:
    """A shell with blocking reads has one end."""
    reading, writing = pipe
    child = await trio.lowlevel.open_process(["wc", "-c"], stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    async with await fd.connect(str(writing), Config()) as sender:
        await sender.send_all(DATA * 20)
    assert child.stdout is not None
    async with child.stdout:
        assert int(await child.stdout.receive_some()) == len(DATA) * 20
    assert await child.wait() == 0
