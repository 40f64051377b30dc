"""A transport is one new file: the one on the page `contributing`, in a copy of the package, and files that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import trimig
from tests.docs import pages
from tests.processes.docs import sessions
from trimig.transport._interface import Tls, Transport

#: Runs in a process of its own; the arguments are a scheme, and whether it is a transport.
PROGRAM: Final = """
import numpy
import trio

import trimig
from trimig import transport


def guest(*, running):
    made = trimig.AppGuest("added", running=running)
    made.add_ram("ram", trimig.MiB)
    return made


async def main():
    assert "memory" in transport.SCHEMES
    assert transport.check("memory:x") == ("memory", "x")
    assert transport.multiple_channels("memory:x")
    for uri, error in (("memory:", trimig.ConfigError), ("memory:y", trimig.TransportFailed)):
        try:
            await transport.connect(uri)
        except error as caught:
            print(caught)
    monitor = trimig.Monitor()
    with guest(running=True) as source, guest(running=False) as target:
        source.ram[0].pages[:] = 7
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: trimig.receive(target, "memory:x", monitor=monitor))
            while not monitor.addresses:
                await monitor.wait_changed()
            summary = await trimig.migrate(source, monitor.addresses[0])
        assert numpy.array_equal(source.ram[0].pages, target.ram[0].pages)
        print(summary.confirmed, target.run_state)


trio.run(main)
"""


def package(directory: Path, **transports: str) -> Path:
    """A directory whose package ``trimig`` is that of the tests, with more files in ``transport``."""
    original = Path(trimig.__file__).parent
    copy = directory / "trimig"
    (copy / "transport").mkdir(parents=True)
    for path in (*original.iterdir(), *(original / "transport").iterdir()):
        if path.name not in ("transport", "__pycache__"):
            (copy / path.relative_to(original)).symlink_to(path)
    for name, text in transports.items():
        (copy / "transport" / f"{name}.py").write_text(text, encoding="utf-8")
    return directory


def run(directory: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=directory,
        env=sessions.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=sessions.SECONDS,
        check=False,
    )


def test_the_file_on_the_page_is_a_transport(tmp_path: Path) -> None:
    """B7: found by its name, checked, refused, connected, and a migration arrives."""
    (block,) = (block for block in pages.blocks(pages.BY_NAME["contributing.md"]) if "# memory.py" in block.text)
    done = run(package(tmp_path, memory=block.text), PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["memory: needs a name", "no listener has the name 'y'", "True running"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "TypeError: the module trimig.transport.added has no TRANSPORT of the type Transport"),
        ("TRANSPORT = 5", "TypeError: the module trimig.transport.added has no TRANSPORT of the type Transport"),
        (
            "from ._interface import Transport\nTRANSPORT = Transport(connect=5, listen=5, several=True)",
            "TypeError: Transport.__init__() got an unexpected keyword argument 'several'",
        ),
    ],
)
def test_file_that_is_no_transport_is_one_error(tmp_path: Path, text: str, error: str) -> None:
    done = run(package(tmp_path, added=text), "from trimig import transport; transport.check('added:x')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == error


async def test_what_a_transport_need_not_say() -> None:
    async def never(rest: str, config: trimig.Config) -> None:
        raise AssertionError

    found = Transport(connect=never, listen=never)  # type: ignore[arg-type]  # is not called
    assert found.parse("anything") == "anything"
    assert found.server_name("anything") is None
    assert (found.tls, found.multiple_channels) == (Tls.LAYERED, False)
