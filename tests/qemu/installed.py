"""Which QEMUs there are: the installed one, and those of other versions, each in a root directory of its own.

``TRIMIG_QEMU_ROOTS`` (``/var/tmp/trimig-qemu`` unless set) is a directory of roots; ``tests/qemu/roots.sh`` makes two of them. A
root is any directory with a QEMU and the libraries that it needs below it. Each QEMU is asked for its version; the name of a
root's directory says nothing. A QEMU of a root is started by the dynamic loader of its root, with the libraries and the
firmware of its root. So it needs no privileges, and it sees the same files, sockets and descriptors as any other process.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: The versions that trimig is tested against. CI fails without one of them.
WANTED: Final = ("7.2", "10.0", "11.1")
#: The version that ``trimig run`` answers to ``query-version``: its monitor has the members and events of that one.
SPOKEN: Final = "7.2"
#: Where roots are looked for unless ``TRIMIG_QEMU_ROOTS`` names another directory.
ROOTS: Final = "/var/tmp/trimig-qemu"

_NAME: Final = "qemu-system-x86_64"
_BINARIES: Final = tuple(f"{directory}/{_NAME}" for directory in ("usr/bin", "usr/local/bin", "bin", "opt/qemu/bin"))
_FIRMWARE: Final = tuple(
    f"{p}/share/{name}" for p in ("usr", "usr/local") for name in ("qemu", "seabios", "qemu-firmware")
)
_LIBRARIES: Final = ("lib", "lib64", "usr/lib", "usr/lib64", "usr/local/lib", "usr/local/lib64")
_PT_INTERP: Final = 3
_MOST_LINKS: Final = 40
#: Seconds that ``--version`` may take on a machine that is busy.
_ASK_LIMIT: Final = 60.0


@dataclasses.dataclass(frozen=True)
class Installed:
    """A QEMU that can be started.

    Attributes:
        version: ``"10.0"``: the first two numbers of what it says itself.
        full: ``"10.0.13"``.
        command: the beginning of its command line.
        environment: variables that it needs beside those of this process.
    """

    version: str
    full: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers, to compare: ``(10, 0)``."""
        return tuple(int(part) for part in self.version.split("."))


class BrokenRoot(Exception):
    """There is a QEMU in a root, and it does not start."""


def installed() -> dict[str, Installed]:
    """Every QEMU of this machine by version, oldest first. Of two with one version the installed one counts.

    Raises:
        BrokenRoot: a root has a QEMU that cannot be asked for its version; the message says why.
    """
    where = os.environ.get("TRIMIG_QEMU_ROOTS", ROOTS)
    return dict(_look(os.environ.get("TRIMIG_TEST_QEMU", ""), os.environ.get("PATH", ""), where))


def default() -> Installed | None:
    """The QEMU of a test that does not choose a version; None if there is none.

    It is the one that ``TRIMIG_TEST_QEMU`` names (a version, a name on the path, or a path), else the installed one, else
    the oldest of the roots.
    """
    found = installed()
    wanted = os.environ.get("TRIMIG_TEST_QEMU", "")
    if wanted in found:
        return found[wanted]
    if (binary := shutil.which(wanted or _NAME)) is not None:
        return found[_ask((binary,), {}).version]
    return None if wanted else next(iter(found.values()), None)


def choose(version: str | None) -> Installed:
    """The QEMU of that version, or the default one.

    Raises:
        FileNotFoundError: there is none.
    """
    if version is None:
        if (found := default()) is None:
            raise FileNotFoundError(f"no {_NAME} (mark the test with pytest.mark.qemu)")
        return found
    there = installed()
    if version not in there:
        raise FileNotFoundError(f"no QEMU {version} on this machine, only {', '.join(there) or 'none'}")
    return there[version]


def versions() -> list[str]:
    """Those that tests are written for, and whatever else there is; oldest first."""
    return sorted({*WANTED, *installed()}, key=lambda version: [int(part) for part in version.split(".")])


@functools.cache
def _look(wanted: str, path: str, where: str) -> tuple[tuple[str, Installed], ...]:
    found: dict[str, Installed] = {}
    for name in (wanted, _NAME):
        if name and (binary := shutil.which(name, path=path)) is not None:
            qemu = _ask((binary,), {})
            found.setdefault(qemu.version, qemu)
    for root in sorted(Path(where).iterdir()) if Path(where).is_dir() else ():
        if (in_root := _in_root(root)) is not None:
            found.setdefault(in_root.version, in_root)
    return tuple(sorted(found.items(), key=lambda item: item[1].numbers))


def _ask(command: tuple[str, ...], environment: Mapping[str, str]) -> Installed:
    """Start it with ``--version``."""
    try:
        ended = subprocess.run(
            [*command, "--version"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_LIMIT,
            check=False,
        )
    except OSError as error:
        raise BrokenRoot(f"{' '.join(command)} does not start: {error}") from error
    version = re.search(r"version (\d+\.\d+)((?:\.\d+)*)", ended.stdout)
    if version is None:
        said = (ended.stderr or ended.stdout).strip() or "nothing"
        raise BrokenRoot(f"{' '.join(command)} --version exits with {ended.returncode} and says: {said}")
    return Installed(version[1], version[1] + version[2], command, environment)


def _in_root(root: Path) -> Installed | None:
    """The QEMU of a root; None if it has none (a log file, a root that is just being made)."""
    binary = next((found for name in _BINARIES if (found := _inside(root, name)) is not None), None)
    if binary is None or root.name == "part":
        return None
    command = [str(binary)]
    if (name := _interpreter(binary)) is not None:
        if (loader := _inside(root, name)) is None:
            raise BrokenRoot(f"{binary} needs {name}, which {root} does not have")
        libraries = ":".join(str(path) for path in _libraries(root))
        command = [str(loader), "--library-path", libraries, str(binary)]
    modules = [str(library / "qemu") for library in _libraries(root) if any((library / "qemu").glob("*.so"))]
    firmware = [str(found) for name in _FIRMWARE if (found := _inside(root, name)) is not None]
    qemu = _ask(tuple(command), {"QEMU_MODULE_DIR": modules[0]} if modules else {})
    return dataclasses.replace(qemu, command=(*command, *(word for path in firmware for word in ("-L", path))))


def _libraries(root: Path) -> list[Path]:
    """The directories that the root's loader would search, and then those below them with libraries of one program.

    A library that names its own directory (``/usr/lib/x/pulseaudio``) means the one in the root.
    """
    names = list(_LIBRARIES)
    for path in sorted((root / "etc/ld.so.conf.d").glob("*.conf")):
        names += [line.strip() for line in path.read_text().splitlines() if line.startswith("/")]
    found = (_inside(root, name) for name in names)
    searched = dict.fromkeys(path for path in found if path is not None)
    below = {file.parent: None for path in searched for file in sorted(path.glob("*/lib*.so*"))}
    return list(dict.fromkeys((*searched, *below)))


def _inside(root: Path, name: str) -> Path | None:
    """What *name* is for a process whose root directory is *root*: links lead to places below it. None if absent."""
    waiting = [part for part in reversed(Path(name).parts) if part != "/"]
    here = root
    links = 0
    while waiting:
        part = waiting.pop()
        if part == "..":
            here = here.parent if here != root else root
            continue
        here /= part
        if here.is_symlink():
            links += 1
            if links > _MOST_LINKS:
                return None
            target = here.readlink()
            here = root if target.is_absolute() else here.parent
            waiting += [part for part in reversed(target.parts) if part != "/"]
    return here if here.exists() else None


def _interpreter(binary: Path) -> str | None:
    """The dynamic loader that an ELF file of 64 bits asks for; None if it needs none."""
    with binary.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\x02":
            return None
        (table,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        for number in range(count):
            file.seek(table + number * size)
            kind, _flags, offset, _virtual, _physical, length = struct.unpack("<IIQQQQ", file.read(40))
            if kind == _PT_INTERP:
                file.seek(offset)
                return file.read(length).rstrip(b"\0").decode()
    return None
