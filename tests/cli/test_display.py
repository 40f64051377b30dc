"""The displays: their texts, their place on a terminal, and no repeated line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.scripted import PAGE, TOTAL, ram, step
from trimig.cli import display
from trimig.cli.display import LiveView, open_view
from trimig.cli.output import out, say
from trimig.cli.picture import Picture
from trimig.cli.remote.state import State
from trimig.cli.remote.tracker import Tracker
from trimig.cli.screen import Screen

MiB = 1 << 20

CHASE = Picture(
    role="source",
    status="active",
    iteration=4,
    passed=False,
    total=256 * MiB,
    copied=256 * MiB,
    sent=400 * MiB,
    remaining=45 * MiB,
    bandwidth=40.0 * MiB,
    dirty_rate=55.0 * MiB,
    max_bandwidth=40 * MiB,
    expected_downtime=1.125,
    downtime_limit=0.3,
    elapsed=12.0,
    eta=math.inf,
    converging=False,
    reason="55 MiB/s are dirtied and 40 MiB/s can be sent",
    advice=("raise max-bandwidth (40 MiB/s)", "throttle the guest by 30 %"),
)
FIRST = dataclasses.replace(
    CHASE,
    iteration=1,
    copied=64 * MiB,
    sent=64 * MiB,
    eta=5.0,
    eta_at_least=True,
    converging=None,
    reason="",
    advice=(),
)
FOLLOWING = dataclasses.replace(CHASE, status="postcopy-active", dirty_rate=None, requests=12, eta=1.0, converging=None)


class Terminal(io.TextIOBase):
    """The used part of a terminal: text, new lines, carriage return, up, and erasing to the end."""

    def __init__(self, columns: int, lines: int = 24) -> None:
        self.size = os.terminal_size((columns, lines))
        self.rows = [""]
        self._row = self._column = 0
        self.written = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written += text
        for part in re.findall(r"\x1b\[\d*[A-Z]|\n|\r|[^\x1b\n\r]+", text):
            if part == "\n":
                self._row, self._column = self._row + 1, 0
            elif part == "\r":
                self._column = 0
            elif part.endswith("A") and part.startswith("\x1b"):
                self._row -= int(part[2:-1] or 1)
            elif part == "\x1b[J":
                self.rows[self._row :] = [self.rows[self._row][: self._column]]
            else:
                for character in part:
                    if self._column == self.size.columns:
                        self._row, self._column = self._row + 1, 0
                    self._extend()
                    row = self.rows[self._row].ljust(self._column)
                    self.rows[self._row] = row[: self._column] + character + row[self._column + 1 :]
                    self._column += 1
            self._extend()
        return len(text)

    def _extend(self) -> None:
        self.rows += [""] * (self._row + 1 - len(self.rows))


class SizedScreen(Screen):
    """Its terminal is a :class:`Terminal`."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)  # type: ignore[arg-type]  # as much of a text stream as is used
        self._terminal = terminal

    @property
    def size(self) -> os.terminal_size:
        return self._terminal.size


@pytest.mark.parametrize("columns", [40, 50, 60, 80, 200])
@pytest.mark.parametrize("now", [FIRST, CHASE, FOLLOWING], ids=["first copy", "chase", "postcopy"])
def test_picture_fits_and_has_its_figures(columns: int, now: Picture) -> None:
    view = LiveView(SizedScreen(Terminal(columns)))
    view.begin("migrating to tcp:host-b:4444")
    view.show(dataclasses.replace(FIRST, passed=True))
    lines = view.lines(now, columns)
    assert max(map(len, lines)) < columns
    text = " ".join(" ".join(lines).split())
    assert "limit 40 MiB/s" in text
    assert "time left" in text
    if now is CHASE:
        assert "It does not converge: 55 MiB/s are dirtied and 40 MiB/s can be sent" in text
        assert "would help: raise max-bandwidth (40 MiB/s)" in text
        assert "time left: no end in sight" in text
    names, units = next((a, b) for a, b in itertools.pairwise(lines) if a.split()[:1] == ["pass"])
    assert {"left", "downtime"} <= set(names.split())
    assert "MiB" in units
    assert ("sent" in names.split()) == (columns >= 60)


@pytest.mark.parametrize("columns", [50, 80])
def test_columns_stay_where_they_are(columns: int) -> None:
    """For all figures: the heads, and the last digit of each figure."""
    view = LiveView(SizedScreen(Terminal(columns)))
    seen = set()
    for scale in (1, 7, 1000, 123456):
        for number in range(1, 30):
            view.show(
                dataclasses.replace(
                    CHASE, iteration=number, remaining=scale * 1000, sent=scale * 5000, dirty_rate=scale * 77.0,
                    bandwidth=scale * 99.0, expected_downtime=scale / 1e5, passed=number % 2 == 0,
                )
            )  # fmt: skip
            lines = view.lines(CHASE, columns)
            head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["pass"])
            for line in (lines[head], *lines[head + 2 :]):
                if not line.strip():
                    break
                seen.add(tuple(match.end() for match in re.finditer(r"\S+", line)))
    assert len(seen) == 1


def test_postcopy_shows_requests_and_no_dirty_rate() -> None:
    """The dirty rate of a guest that runs elsewhere is unknown; the earlier passes keep theirs."""
    view = LiveView(SizedScreen(Terminal(80)))
    view.show(dataclasses.replace(CHASE, passed=True))
    before = [line for line in view.lines(CHASE, 80) if line.split()[:1] == ["4"]]
    view.show(dataclasses.replace(FOLLOWING, dirty_rate=1024.0 * MiB))
    lines = view.lines(FOLLOWING, 80)
    assert [line for line in lines if line.split()[:1] == ["4"]] == before
    assert "12 pages asked for" in " ".join(" ".join(lines).split())
    assert "dirtied" not in FOLLOWING.sentence
    assert FOLLOWING.record()["dirty_rate_bytes_per_s"] is None
    assert FOLLOWING.record()["page_requests"] == 12


def test_lines_of_others_stand_above_and_no_line_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(60)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(display, "Screen", lambda stream: SizedScreen(terminal))
    with open_view(as_json=False) as view:
        view.begin("migrating to tcp:h:1")
        for number in range(1, 12):
            view.show(dataclasses.replace(CHASE, iteration=number))
            if number == 5:
                say("SIGINT: cancelling; the guest is put back first")
            if number == 7:
                display.note_and_print(view, "listening on tcp:h:2", as_json=False)
            view.show(dataclasses.replace(CHASE, iteration=number, passed=True))
        view.end("sent the guest to tcp:h:1", on_stdout=True)
        out("sent the guest to tcp:h:1")
    left = [row for row in terminal.rows if row.strip()]
    assert left == [
        "trimig: SIGINT: cancelling; the guest is put back first",
        "listening on tcp:h:2",
        "sent the guest to tcp:h:1",
    ]
    assert len(terminal.written) > 1000


@pytest.mark.parametrize("same", [True, False])
def test_line_comes_once_where_both_outputs_are_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, same: bool
) -> None:
    results, progress = tmp_path / "results", tmp_path / ("results" if same else "progress")
    with results.open("a") as stdout, progress.open("a") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        with open_view(as_json=False) as view:
            display.note_and_print(view, "listening on tcp:h:2", as_json=False)
            view.end("sent the guest to tcp:h:1", on_stdout=True)
            out("sent the guest to tcp:h:1")
    assert results.read_text() == "listening on tcp:h:2\nsent the guest to tcp:h:1\n"
    if not same:
        assert progress.read_text() == "trimig: sent the guest to tcp:h:1\n"


def test_picture_is_cut_to_the_height_so_that_nothing_scrolls() -> None:
    terminal = Terminal(50, lines=6)
    screen = SizedScreen(terminal)
    for number in range(5):
        screen.draw([f"line {number} {row}" for row in range(40)])
    assert len(terminal.rows) == 5
    assert terminal.rows[0] == "line 4 0"


def test_terminal_that_becomes_narrower_is_cleaned_up_all_the_same() -> None:
    terminal = Terminal(100)
    screen = SizedScreen(terminal)
    screen.draw(["x" * 90, "y"])
    terminal.size = os.terminal_size((50, 24))
    terminal.rows, terminal._row = ["x" * 50, "x" * 40, "y"], 2  # the wrapped lines
    screen.draw(["z"])
    assert terminal.rows == ["z"]


def test_each_plain_line_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("trimig.cli.display.time.monotonic", lambda: now)
    with open_view(as_json=False) as view:
        view.begin("migrating to tcp:h:1")
        for picture in (FIRST, CHASE, CHASE, FOLLOWING):
            now += 2.0
            view.show(picture)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # nothing is repeated where nothing moves
    for line in lines[1:]:
        assert "(limit 40 MiB/s)" in line
        assert "time left: " in line
    assert "it does not converge, what would help: raise max-bandwidth (40 MiB/s) or throttle the guest" in lines[2]
    assert all(figure in lines[2] for figure in ("55 MiB/s dirtied", "40 MiB/s sent", "1.1 s", "limit 300 ms"))


def test_members_for_machines_name_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    with open_view(as_json=True) as view:
        view.show(CHASE)
    record = json.loads(capsys.readouterr().err)
    assert record["converging"] is False
    assert record["reason"] == CHASE.reason
    assert record["advice"] == list(CHASE.advice)
    assert record["max_bandwidth_bytes_per_s"] == 40 * MiB
    assert (record["eta_ms"], record["elapsed_ms"], record["expected_downtime_ms"]) == (None, 12_000, 1125)
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert re.search(r"_(bytes|bytes_per_s|ms)$|_percent$|^iteration$|^data_channels$", name), name


def test_throttle_is_shown_in_every_display(capsys: pytest.CaptureFixture[str]) -> None:
    """S3: in the sentence, in the table of passes, and under it; nowhere without a throttle."""
    throttled = dataclasses.replace(CHASE, throttle=30)
    assert "; the guest is throttled by 30 %; it does not converge" in throttled.sentence
    assert throttled.record()["throttle_percent"] == 30
    view = LiveView(Screen(sys.stderr))
    view.show(dataclasses.replace(CHASE, iteration=3, passed=True))
    assert "throttle" not in "".join(view.lines(CHASE, 100)).replace(CHASE.advice[1], "")
    view.show(throttled)
    lines = view.lines(throttled, 100)
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["pass"])
    assert lines[head].split()[-1] == "throttle"
    assert [line.split()[-1] for line in lines[head + 1 : head + 4]] == ["%", "0", "30"]
    assert any("(limit 40 MiB/s); the guest is throttled by 30 %; time left: " in line for line in lines)
    for columns in (30, 40, 60):
        assert max(map(len, view.lines(throttled, columns))) <= columns


def test_memory_in_another_encoding_is_shown_in_every_pass() -> None:
    for picture in (FIRST, CHASE):
        encoded = dataclasses.replace(picture, encoded=64 * MiB, encoded_sent=MiB)
        words = "64 MiB of memory sent as 1 MiB (encoded)"
        assert words in encoded.sentence
        assert words not in picture.sentence
        lines = LiveView(Screen(sys.stderr)).lines(encoded, 200)
        assert any(f"; {words}; time left: " in line for line in lines)


def test_receiver_waits_for_a_source_until_one_has_come() -> None:
    waiting = dataclasses.replace(FIRST, role="destination", status="setup", sent=0)
    assert waiting.sentence == "waiting for a source"
    assert dataclasses.replace(waiting, sent=MiB).sentence == "connecting: 1 MiB received"


def test_picture_goes_through_json() -> None:
    for picture in (FIRST, CHASE, FOLLOWING):
        assert Picture.of(json.loads(json.dumps(dataclasses.asdict(picture)))) == picture


# -- of another process ------------------------------------------------------------------------------------------------


def told_of(infos: list[dict[str, Any]], **settings: Any) -> tuple[list[Picture], list[str]]:
    tracker = Tracker({"downtime-limit": 300, "max-bandwidth": 100_000_000, **settings})
    shown = [p for info in infos for p in tracker.pictures(State(run_state="running", info=info))]
    return shown, tracker.warnings


def chase_of_a_qemu(rests: list[int], **more: Any) -> list[dict[str, Any]]:
    """One picture for each pass; the guest sends 100 MB/s and reports no convergence."""
    first = step("active", ram=ram(sync=1, pages=1000, remaining=TOTAL - 1000 * PAGE), **more)
    return [first] + [
        step(
            "active", ram=ram(sync=2 + n, pages=30000 + n, remaining=rest, **{"dirty-pages-rate": 50_000}),
            **{**more, "total-time": 1000 * (n + 2)},
        )
        for n, rest in enumerate(rests)
    ]  # fmt: skip


def test_qemu_that_does_not_converge_is_explained_from_its_figures_and_warned_of_once() -> None:
    shown, warnings = told_of(chase_of_a_qemu([80 << 20] * 12))
    last = shown[-1]
    assert last.converging is False
    assert "195 MiB/s are dirtied" in last.reason
    assert last.advice[0].startswith("raise max-bandwidth (95.4 MiB/s)")
    assert (last.eta, last.max_bandwidth) == (math.inf, 100_000_000)
    (warning,) = warnings
    assert "does not converge: 3 passes in a row" in warning
    assert last.reason in warning
    assert last.advice[0] in warning
    _, warnings = told_of(chase_of_a_qemu([80 << 20] * 3))
    assert warnings == []


def test_qemu_that_converges_has_an_end() -> None:
    infos = chase_of_a_qemu([64 << 20, 32 << 20])
    for info in infos[1:]:
        info["ram"]["dirty-pages-rate"] = 12_000
    shown, warnings = told_of(infos)
    last = shown[-1]
    assert (last.converging, warnings) == (True, [])
    assert last.eta is not None
    assert 0 < last.eta < 2


def test_what_a_trimig_says_is_taken_and_it_warns_by_itself() -> None:
    says = {"converging": False, "reason": "because", "advice": ["do this"]}
    shown, warnings = told_of(chase_of_a_qemu([80 << 20] * 12, owner="source", convergence=says))
    assert (shown[-1].reason, shown[-1].advice, warnings) == ("because", ("do this",), [])


def test_postcopy_of_another_process_is_told_by_what_is_left() -> None:
    infos = [
        step("postcopy-active", ram=ram(sync=3, pages=1, remaining=left, **{"dirty-pages-rate": 262144, "postcopy-requests": 9}), **{"total-time": at})
        for at, left in ((1000, 100 << 20), (2000, 80 << 20), (3000, 60 << 20))
    ]  # fmt: skip
    last = told_of(infos)[0][-1]
    assert (last.dirty_rate, last.requests) == (None, 9)
    assert last.eta == pytest.approx(3.0)
    assert last.max_bandwidth == 0


def test_context_of_views_gives_the_streams_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.suppress(KeyError), open_view(as_json=False):
        raise KeyError
    assert sys.stderr is terminal


def test_data_channels_are_shown_beside_the_rate() -> None:
    """S13: how many there are, for people and for machines."""
    now = dataclasses.replace(FIRST, data_channels=2, multifd=63 * MiB)
    assert "40 MiB/s sent over 2 data channels (limit 40 MiB/s)" in now.sentence
    assert "over" not in FIRST.sentence
    record = now.record()
    assert (record["data_channels"], record["multifd_bytes"]) == (2, 63 * MiB)


def test_log_has_a_line_for_each_change_and_the_advice_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = itertools.count(0, 2)
    monkeypatch.setattr("trimig.cli.display.time.monotonic", lambda: float(next(ticks)))
    view = display.LineView()
    for sent in (64, 65, 66, 128):
        view.show(dataclasses.replace(FIRST, copied=sent * MiB, sent=sent * MiB))
    for number, left in ((4, 45), (4, 44), (5, 44), (5, 44)):
        view.show(dataclasses.replace(CHASE, iteration=number, remaining=left * MiB))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split(",")[0].strip() for line in lines] == [
        "first copy", "first copy", "later passes (pass 4)", "later passes (pass 5)"
    ]  # fmt: skip
    assert ["what would help" in line for line in lines] == [False, False, True, False]
    assert all("it does not converge" in line for line in lines[2:])
