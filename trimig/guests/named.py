"""Errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import RemoteProtocolError, TransportFailed


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add *path* to an OSError without a file name, as raised by reads and writes, and to the error of a stream in it."""
    try:
        yield
    except RemoteProtocolError as error:
        raise RemoteProtocolError(
            f"{os.fspath(path)}: {error.reason}", offset=error.offset, section=error.section
        ) from error
    except TransportFailed as error:
        raise TransportFailed(f"{os.fspath(path)}: {error}") from error
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
