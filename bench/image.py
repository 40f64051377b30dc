"""A real memory image: binaries and text files of this system, laid out as pages.

Most of the memory of a running machine is the text of programs, their data and cached files. Each file begins at a page
border and ends with zeros, as in the page cache. Half of the bytes are binaries, half are text. The image is made once
for a run of a benchmark, in a file that all processes of the run map, so that all pairs move the same bytes. On the same
system it is the same in every run: the files are taken in the order of their names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError

_PAGE: Final = 4096
#: The environment variable with the name of the file, for the processes of the sides.
VARIABLE: Final = "TRIMIG_BENCH_IMAGE"
#: The longest image, bytes; larger memory repeats it. No encoder looks back that far.
MOST: Final = 256 << 20
#: Bytes that are taken of one file.
_MOST_OF_FILE: Final = 4 << 20
#: A file with a zero byte in its first bytes is a binary.
_LOOK: Final = 4096
ROOTS: Final[tuple[Path, ...]] = (Path("/usr/bin"), Path("/usr/lib"), Path("/usr/share"), Path(sys.base_prefix, "lib"))


def make(file: Path, size: int, roots: Sequence[Path] = ROOTS) -> None:
    """Write an image of *size* bytes, or of all files if they have less, into *file*.

    Raises:
        BenchError: the system has no files below *roots* that can be read.
    """
    left = {True: size // 2 // _PAGE * _PAGE, False: (size - size // 2) // _PAGE * _PAGE}
    with file.open("wb") as out:
        for path in _files(roots):
            if not any(left.values()):
                break
            try:
                with path.open("rb") as stream:
                    data = stream.read(_MOST_OF_FILE)
            except OSError:
                continue
            binary = b"\0" in data[:_LOOK]
            data = data[: left[binary]]
            padded = data.ljust(-(-len(data) // _PAGE) * _PAGE, b"\0")
            left[binary] -= len(padded)
            out.write(padded)
        if not out.tell():
            raise BenchError(f"no file can be read below {', '.join(map(str, roots))}: there is no memory image")


def _files(roots: Sequence[Path]) -> Iterator[Path]:
    """The regular files below *roots*, no links, in the order of their names within a directory."""
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    yield path


@contextlib.contextmanager
def prepared(size: int) -> Iterator[str]:
    """Within the block, this process and its children find an image for a memory of *size* bytes; yields its digest.

    Raises:
        BenchError: there are no files for it, or no room.
    """
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="trimig-bench-image-") as folder:
        file = Path(folder, "image")
        try:
            make(file, min(size, MOST))
        except OSError as exc:
            raise BenchError(f"the memory image cannot be written to {folder}: {exc.strerror}") from exc
        os.environ[VARIABLE] = str(file)
        try:
            with file.open("rb") as stream:
                yield hashlib.file_digest(stream, "sha256").hexdigest()
        finally:
            forget()
            os.environ.pop(VARIABLE, None)
            if before is not None:
                os.environ[VARIABLE] = before


def pages() -> NDArray[np.uint8]:
    """The image, shape ``(n, 4096)``, read-only.

    Raises:
        BenchError: there is none; a run makes it with :func:`prepared`.
    """
    if not (name := os.environ.get(VARIABLE)):
        raise BenchError("there is no memory image: the benchmark has not made one")
    return _mapped(name)


def forget() -> None:
    """Close the file of the image, in this process."""
    _mapped.cache_clear()


@functools.lru_cache(maxsize=1)
def _mapped(name: str) -> NDArray[np.uint8]:
    return np.memmap(name, np.uint8, "r").reshape(-1, _PAGE)
