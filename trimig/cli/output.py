"""Output of the commands: results to stdout, everything else to stderr. A failed write never makes a command fail.

The exit code says what became of the guest. A full disk behind ``>result.txt``, a closed stdout or a reader that has
gone does not change that. So :func:`forgiving` replaces ``sys.stdout`` and ``sys.stderr`` by streams that do not raise:
they write at most one warning, and later output goes to /dev/null.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final, TextIO, cast

#: The messages of the present command, so that a logged message is not printed twice.
_said: Final[set[str]] = set()


class ForgivingStream:
    """A text stream whose ``write`` and ``flush`` do not raise when the file behind it fails.

    All other attributes are those of the wrapped stream. So ``buffer``, which carries data (``export --out -``), raises
    its errors.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """*name* is for the warning; empty for no warning."""
        self._stream = stream
        self._name = name
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream; always all of *text*."""
        try:
            if not self._lost:
                self._stream.write(text)
        except (OSError, ValueError) as error:
            self._discard_rest(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As of the stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of the stream."""
        try:
            if not self._lost:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._discard_rest(error)

    def isatty(self) -> bool:
        """As of the stream; False for a closed stream."""
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def _discard_rest(self, error: Exception) -> None:
        """Write nothing more. Buffered output goes to /dev/null: the interpreter flushes it at its end."""
        self._lost = True
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self._stream.fileno())
            finally:
                os.close(null)
            self._stream.flush()
        # A reader that has closed the pipe wants no more output, so there is no warning. A full disk is reported.
        if self._name and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            say(f"warning: {self._name} cannot be written to ({error.strerror}); what was to be printed is lost")


def open_closed_files() -> None:
    """Put /dev/null where descriptors 0, 1 and 2 are closed, so that no later socket or file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Within the block, writes to ``sys.stdout`` and ``sys.stderr`` never raise."""
    with contextlib.ExitStack() as stack:
        # Python sets a stream to None if its file was closed at the start.
        out = sys.stdout if sys.stdout is not None else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        err = sys.stderr if sys.stderr is not None else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stderr(cast(TextIO, ForgivingStream(err, ""))))
        stack.enter_context(contextlib.redirect_stdout(cast(TextIO, ForgivingStream(out, "standard output"))))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def out(text: str) -> None:
    """Print one or more lines of a result, on stdout, flushed."""
    _write(sys.stdout, f"{text}\n")


def say(text: str) -> None:
    """Print one line for users, on stderr: ``trimig: ...``."""
    _said.add(text)
    _write(sys.stderr, f"trimig: {text.strip().rstrip('.')}\n")


class LogHandler(logging.Handler):
    """Prints log records on stderr, like :func:`say`, or with *as_json* as a note; skips repetitions."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(logging.WARNING)
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        text = f"warning: {record.getMessage()}"
        if text in _said:
            return
        if self._as_json:
            write_json({"event": "note", "text": text}, err=True)
        else:
            say(text)


@contextlib.contextmanager
def logging_to_stderr(*, as_json: bool) -> Iterator[None]:
    """Within the block, warnings of trimig's log are printed in the form of the command's own."""
    handler, logger = LogHandler(as_json=as_json), logging.getLogger("trimig")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        _said.clear()


def write_json(record: Mapping[str, Any], *, err: bool = False) -> None:
    """Print one object on one line, on stdout (or stderr), flushed."""
    _said.add(str(record.get("text") or record.get("note")))
    _write(sys.stderr if err else sys.stdout, json.dumps(record) + "\n")


def write_error(text: str) -> None:
    """Print *text* unchanged, on stderr, flushed."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def same_output() -> bool:
    """Whether stdout and stderr are both terminals, or the same file or pipe, so that a text on both is seen twice."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        return True
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno()))
    except (OSError, ValueError):  # a closed stream, or one that is no file
        return False
