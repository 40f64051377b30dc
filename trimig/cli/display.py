"""Progress on stderr: a live table on a terminal, plain lines elsewhere, JSON lines for machines.

The shown figures come from :meth:`trimig.Monitor.watch` and :meth:`trimig.Monitor.events`, or from query-migrate of
another process (:class:`trimig.cli.remote.tracker.Tracker`), and from no other place. No figure runs backwards: the
first copy of all memory has a percentage; the following passes over newly written memory have none, and are shown
apart. All three displays say whether the passes converge, why, what would help, what limits the bandwidth, and how
long the migration still takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from trimig import formats

from .output import out, same_output, say, write_json
from .screen import Screen, wrapped

if TYPE_CHECKING:
    from .picture import Picture

#: Seconds between two plain lines.
LINE_EVERY: Final = 1.0
#: The number of passes that stay on the screen.
_ROWS: Final = 8


class View(Protocol):
    """The interface of a display. No method fails or waits."""

    def note(self, text: str, **data: Any) -> None:
        """Show one line that stays; *data* is for JSON."""

    def begin(self, title: str, **data: Any) -> None:
        """A migration begins."""

    def show(self, now: Picture) -> None:
        """Show the present picture of the migration."""

    def end(self, text: str, *, on_stdout: bool = False, **data: Any) -> None:
        """Show the end; *text* is the outcome. With *on_stdout* stdout gets it too; one reader of both gets it once."""


def note_and_print(view: View, text: str, *, as_json: bool, **data: Any) -> None:
    """Show *text* once: on stdout, and if only stderr is a terminal there too; with *as_json* as a note."""
    if as_json or (sys.stderr.isatty() and not sys.stdout.isatty()):
        view.note(text, **data)
    if not as_json:
        out(text)


@contextlib.contextmanager
def open_view(*, as_json: bool) -> Iterator[View]:
    """The fitting view: JSON lines if asked for, a live table on a terminal, plain lines elsewhere."""
    if as_json:
        yield JsonView()
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        view = LiveView(Screen(sys.stderr))
        with contextlib.ExitStack() as stack:
            # Other output to the terminal stands above the table, and not in the middle of it.
            stack.enter_context(contextlib.redirect_stderr(view.screen.above(sys.stderr)))
            if sys.stdout.isatty():
                stack.enter_context(contextlib.redirect_stdout(view.screen.above(sys.stdout)))
            stack.callback(view.screen.erase)
            yield view
    else:
        yield LineView()


class JsonView:
    """One JSON object on each line of stderr; ``event`` is ``note``, ``begin``, ``progress`` or ``end``."""

    def note(self, text: str, **data: Any) -> None:
        write_json({"event": "note", "text": text, **data}, err=True)

    def begin(self, title: str, **data: Any) -> None:
        write_json({"event": "begin", "text": title, **data}, err=True)

    def show(self, now: Picture) -> None:
        write_json({"event": "progress", **now.record()}, err=True)

    def end(self, text: str, *, on_stdout: bool = False, **data: Any) -> None:
        write_json({"event": "end", "text": text, **data}, err=True)


class LineView:
    """Lines on stderr, for logs: one for each phase, each pass, and each tenth of the memory in it. Advice stands there once."""

    def __init__(self) -> None:
        self._next = 0.0
        self._last: tuple[object, ...] = ()
        self._advice: tuple[str, ...] = ()

    def note(self, text: str, **data: Any) -> None:
        say(text)

    def begin(self, title: str, **data: Any) -> None:
        say(title)
        self._next = time.monotonic() + LINE_EVERY

    def show(self, now: Picture) -> None:
        if time.monotonic() >= self._next and not now.passed:
            self._next = time.monotonic() + LINE_EVERY
            if (state := now.state) != self._last:
                self._last = state
                told, self._advice = now.advice == self._advice, now.advice or self._advice
                say(dataclasses.replace(now, advice=()).sentence if told else now.sentence)

    def end(self, text: str, *, on_stdout: bool = False, **data: Any) -> None:
        if not (on_stdout and same_output()):
            say(text)


#: A column of the table of passes: name, unit, width, and the value.
_Column = tuple[str, str, int, Callable[["Picture"], str]]
_COLUMNS: Final[Sequence[_Column]] = (
    ("pass", "", 4, lambda p: str(p.iteration)),
    ("sent", "MiB", 10, lambda p: formats.column_mib(p.sent)),
    ("left", "MiB", 10, lambda p: formats.column_mib(p.remaining)),
    ("dirtied", "MiB/s", 9, lambda p: formats.column_mib(p.dirty_rate if p.dirty_rate or p.passed else None)),
    ("rate", "MiB/s", 9, lambda p: formats.column_mib(p.bandwidth or None)),
    ("downtime", "ms", 11, lambda p: formats.column_ms(p.expected_downtime)),
)
#: The column of a guest that auto-converge has throttled.
_THROTTLE: Final[_Column] = ("throttle", "%", 10, lambda p: str(p.throttle))
#: Columns in the order in which they are left out on a narrow terminal.
_LEFT_OUT: Final = ("sent", "rate", "throttle", "dirtied", "downtime")


class LiveView:
    """A table of passes that is redrawn at each picture; a finished pass scrolls up as one line."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._rows: dict[int, Picture] = {}
        self._title = ""

    def begin(self, title: str, **data: Any) -> None:
        self._rows.clear()
        self._title = title
        self.screen.draw(wrapped(title, self.screen.size.columns))

    def show(self, now: Picture) -> None:
        known = self._rows.get(now.iteration)
        if (
            now.phase in ("first copy", "later passes")
            and now.iteration
            and (known is None or now.passed or not known.passed)
        ):
            self._rows[now.iteration] = now
        self.screen.draw(self.lines(now, self.screen.size.columns))

    def note(self, text: str, **data: Any) -> None:
        say(text)

    def end(self, text: str, *, on_stdout: bool = False, **data: Any) -> None:
        self.screen.erase()
        if not (on_stdout and same_output()):
            say(text)

    def lines(self, now: Picture, columns: int) -> list[str]:
        """The lines of the table for a terminal of that width."""
        found = [*wrapped(self._title, columns)] if self._title else []
        if now.phase == "first copy":
            share = now.copied / now.total if now.total else 0.0
            width = max(8, min(24, columns - 22))
            bar = "#" * int(share * width)
            found.append(f"first copy  [{bar:.<{width}}] {formats.percent(share):>5}")
        elif now.phase == "later passes":
            found += wrapped(
                f"later passes: {formats.size(now.remaining)} left after {formats.duration(now.elapsed)}", columns
            )
        else:
            found += wrapped(now.sentence, columns)
        if self._rows and now.role == "source":
            found += ["", *self._table(columns), ""]
        if now.phase in ("first copy", "later passes"):
            found += wrapped(
                "; ".join(filter(None, (now.limit, now.throttled, now.encoding, f"time left: {now.time_left}"))),
                columns,
            )
        if now.phase == "later passes" and now.converging is False:
            found += wrapped(f"It does not converge: {now.reason}", columns)
            for clause in now.advice:
                found += wrapped(f"would help: {clause}", columns)
        return found

    def _table(self, columns: int) -> list[str]:
        shown = list(_COLUMNS)
        if any(row.throttle for row in self._rows.values()):
            shown.append(_THROTTLE)
        for name in _LEFT_OUT:
            if sum(column[2] for column in shown) >= columns:
                shown = [column for column in shown if column[0] != name]
        head = ["".join(f"{column[row]:>{column[2]}}" for column in shown) for row in (0, 1)]
        rows = [self._rows[number] for number in sorted(self._rows)[-_ROWS:]]
        return [*head, *("".join(f"{value(row):>{width}}" for _, _, width, value in shown) for row in rows)]
