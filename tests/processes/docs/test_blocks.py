"""The programs and commands on the pages are run as they stand there.

* A ``python`` block is a whole program. It is run in a process of its own, with warnings as errors; a ``text`` block directly
  behind it is its output (``...`` as in :mod:`.sessions`).
* One that begins with a comment ``# name.py`` is a file of that name, for the ``console`` blocks of the page.
* ``console`` blocks are run in order in one directory for each page. ``sh`` blocks need another host, a QEMU or a person:
  of these the names of commands and options are checked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
import pytest

from tests.docs import pages
from trimig.cli import main

from . import sessions

#: Pages whose programs or commands a reader copies; each must have some of these.
PYTHON: Final = ("README.md", "guide.md", "testing.md")
CONSOLE: Final = ("README.md", "guide.md", "operating.md")

_FILE: Final = re.compile(r"# ([\w-]+\.py)\n")


def named(block: pages.Block) -> str | None:
    """The file that a block of Python is, or None."""
    found = _FILE.match(block.text)
    return found[1] if found else None


def of_language(page: Path, language: str) -> list[pages.Block]:
    """The blocks of one language on a page."""
    return [block for block in pages.blocks(page) if block.language == language]


def output_behind(page: Path, wanted: pages.Block) -> str | None:
    """The ``text`` block that follows *wanted* with nothing but a blank line between."""
    end = wanted.line + wanted.text.count("\n")
    found = (block for block in of_language(page, "text") if 0 < block.line - end <= 3)
    return next((block.text for block in found), None)


ALONE: Final = [
    pytest.param(page, block, id=f"{pages.short(page)}:{block.line}")
    for page in pages.PAGES
    for block in of_language(page, "python")
    if named(block) is None
]
#: Pages whose console blocks start a QEMU.
QEMU: Final = frozenset({"README.md"})
WITH_SESSION: Final = [
    pytest.param(page, id=pages.short(page), marks=[pytest.mark.qemu] if page.name in QEMU else [])
    for page in pages.PAGES
    if of_language(page, "console")
]
SHELL: Final = [
    pytest.param(line.strip(), id=f"{pages.short(page)}: {line.strip()[:60]}")
    for page in pages.PAGES
    for language in ("sh", "console")
    for block in of_language(page, language)
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines()
    if line.strip().removeprefix("$ ").startswith("trimig ")
]


def certificates(directory: Path) -> None:
    """The directories that a page calls ``pki``, as a reader's own authority would make them."""
    import trustme

    authority = trustme.CA()
    pki = directory / "pki"
    pki.mkdir()
    authority.cert_pem.write_to_path(str(pki / "ca-cert.pem"))
    for side, certificate in (
        ("server", authority.issue_cert("127.0.0.1", "localhost")),
        ("client", authority.issue_cert("client.example", common_name="client.example")),
    ):
        certificate.private_key_pem.write_to_path(str(pki / f"{side}-key.pem"))
        for part in certificate.cert_chain_pems:
            part.write_to_path(str(pki / f"{side}-cert.pem"), append=True)


#: What a page presumes and does not show.
SETUP: Final[dict[str, Callable[[Path], None]]] = {"operating.md": certificates}


@pytest.mark.parametrize("name", PYTHON)
def test_page_has_programs(name: str) -> None:
    assert of_language(pages.BY_NAME[name], "python")


@pytest.mark.parametrize("name", CONSOLE)
def test_page_has_commands(name: str) -> None:
    assert any(sessions.steps(block.text) for block in of_language(pages.BY_NAME[name], "console"))


@pytest.mark.parametrize(("page", "block"), ALONE)
def test_program_runs(page: Path, block: pages.Block, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        env=sessions.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=sessions.SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"Traceback|Warning", done.stderr), done.stderr
    shown = output_behind(page, block)
    if shown is not None:
        assert sessions.matches(shown, done.stdout), f"{done.stdout}\nthe page shows:\n{shown}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", WITH_SESSION)
def test_commands_do_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    if page.name in SETUP:
        SETUP[page.name](tmp_path)
    for block in of_language(page, "python"):
        if (name := named(block)) is not None:
            (tmp_path / name).write_text(block.text, encoding="utf-8")
    with sessions.Session(tmp_path) as session:
        for block in of_language(page, "console"):
            session.run(sessions.steps(block.text))


@pytest.mark.parametrize("line", SHELL)
def test_commands_and_options_exist(line: str) -> None:
    words = shlex.split(line.removeprefix("$ ").partition(" #")[0].partition(" | ")[0].rstrip("&"))
    group = click.Context(main)
    if words[1].startswith("-"):
        return
    command = main.get_command(group, words[1])
    assert command is not None, words[1]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
    assert {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-zA-Z]", word)} <= options


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("a\n...", "a\nb\nc\n", True),
        ("...\nc", "a\nb\nc\n", True),
        ("took ... ms", "took 12.5 ms\n", True),
        ("took ... ms", "took 12.5 s\n", False),
        ("a", "a\nb\n", False),
        ("...", "", True),
        ("a.c", "abc", False),
    ],
)
def test_wildcards(shown: str, printed: str, same: bool) -> None:
    assert sessions.matches(shown, printed) is same


def test_a_command_that_fails_or_prints_something_else_is_noticed(tmp_path: Path) -> None:
    with sessions.Session(tmp_path) as session:
        session.run(sessions.steps("$ false\n$ echo $?\n1\n$ echo b && echo c\nb\n...\n$ sleep 100 &\n"))
        for text in ("$ false\n", "$ true\n$ echo $?\n1\n", "$ echo a\nb\n", "$ false &\nready\n"):
            with pytest.raises(AssertionError):
                session.run(sessions.steps(text))
