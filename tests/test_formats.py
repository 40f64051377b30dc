"""Numbers for people: one module writes them, and every unit is binary and named."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest

from trimig import formats

ROOT = Path(__file__).resolve().parents[1] / "trimig"
MiB = 1 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1023.7, "1 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (256 * MiB, "256 MiB"),
        (1023.9 * MiB, "1 GiB"),
        (1.25 * 1024 * MiB, "1.2 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 60, "1 EiB"),
        ((1 << 64) - 1, "16 EiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert formats.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 MiB/s"),
        (64 << 10, "0.062 MiB/s"),
        (12.5 * MiB, "12.5 MiB/s"),
        (128 * MiB, "128 MiB/s"),
        (2048 * MiB, "2048 MiB/s"),
        (math.inf, "unknown"),
    ],
)
def test_rate(value: float, text: str) -> None:
    assert formats.rate(value) == text


def test_transfer() -> None:
    assert formats.transfer(20.1 * MiB, 62.5 * MiB) == "20.1 MiB sent, 62.5 MiB/s of guest memory"


def test_limit_of_nothing_is_no_limit() -> None:
    assert [formats.bandwidth_limit(n) for n in (0, 32 * MiB)] == ["no limit", "limit 32 MiB/s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.0099, "9.9 ms"),
        (0.00999, "10 ms"),
        (0.3, "300 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (4.25, "4.2 s"),
        (60, "60 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (119.7, "2 min 0 s"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (math.inf, "no end"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


def test_share_is_whole_only_when_it_is() -> None:
    assert [formats.percent(share) for share in (0, 0.29, 0.999999, 1)] == ["0 %", "29 %", "99 %", "100 %"]


@pytest.mark.parametrize(
    ("seconds", "at_least", "text"),
    [
        (None, False, "not known yet"),
        (math.inf, False, "no end in sight"),
        (0.01, False, "about 1 s"),
        (12.4, False, "about 12 s"),
        (12.4, True, "at least 12 s"),
        (185.2, False, "about 3 min 5 s"),
    ],
)
def test_remaining_time(seconds: float | None, at_least: bool, text: str) -> None:
    assert formats.remaining_time(seconds, at_least=at_least) == text


def test_columns_carry_no_unit() -> None:
    assert [formats.column_mib(n) for n in (None, 0, 1.25 * MiB)] == ["", "0.0", "1.2"]
    assert [formats.column_ms(n) for n in (None, 0.0005, 12.3456, math.inf)] == ["", "0.5", "12346", "-"]
    assert [formats.column_s(n) for n in (None, 1.25)] == ["", "1.2"]


def test_one_and_many() -> None:
    assert formats.counted(1, "pass", "passes") == "1 pass"
    assert formats.counted(3, "pass", "passes") == "3 passes"
    assert formats.counted(0, "device") == "0 devices"


# -- and no other module -----------------------------------------------------------------------------------------------

#: Everything but the module itself, and the texts of QEMU's own monitor, which are written as QEMU writes them.
PEOPLE = sorted({*ROOT.rglob("*.py")} - {ROOT / "formats.py", ROOT / "qmp" / "commands" / "human.py"})
#: A unit that stands behind a value: ``{…} ms``, ``{…}/s``, ``{…} %``.
_UNIT = re.compile(r"^ ?(?:B|[KMGT]i?B|[kMG]bit|ms|s|min|h|%)(?:/s)?(?![\w-])|^/s(?!\w)")
_PERCENT = re.compile(r"%[-+0-9]*(?:\.\d+)?[feEgG](?!\w)")
#: A format that rounds or makes a percentage.
_NUMBER = re.compile(r"[,_]?(?:\.\d+)?[feEgG%]$|\.\d+$")


def formatted(source: str) -> list[str]:
    """The places where *source* writes a number by itself: a format for one, or a unit behind a value."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for part, behind in zip(node.values, [*node.values[1:], None], strict=True):
            if not isinstance(part, ast.FormattedValue) or part.conversion == ord("r"):
                continue  # a text that the caller gave, cut to a length
            spec = ast.unparse(part.format_spec).strip("f'\"") if part.format_spec is not None else ""
            text = behind.value if isinstance(behind, ast.Constant) and isinstance(behind.value, str) else ""
            if _NUMBER.search(spec) or _UNIT.search(text):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def logged(source: str) -> list[str]:
    """The places where a number is formatted by ``%``, as the arguments of a log are."""
    strings = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [
        f"{node.lineno}: {node.value!r}"
        for node in strings
        if isinstance(node.value, str) and _PERCENT.search(node.value)
    ]


@pytest.mark.parametrize("path", PEOPLE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_else_formats_a_number(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert formatted(source) == []
    assert logged(source) == []


@pytest.mark.parametrize(
    "source",
    ["f'{x:.1f}'", "f'{x:g} s'", "f'{x} ms left'", "f'{x}/s'", "f'{x:.0%}'", "f'{x} %'", "f'{x:8.2f}|'", "f'{x} MiB'"],
)
def test_guard_finds_a_number_that_is_formatted(source: str) -> None:
    assert len(formatted(source)) == 1


def test_guard_finds_a_number_in_a_log() -> None:
    assert len(logged("log.warning('not within %g s', x)\nlog.info('%.1f', x)")) == 2
    assert logged("log.warning('%s, 40 % for %d', x)") == []


@pytest.mark.parametrize(
    "source",
    ["f'{x!r:.80} is no name'", "f'{x:>8}'", "f'{x} bytes'", "f'{x:08x}'", "f'{name}-s'", "f'{a}/{b}'", "f'{x:{w}}'"],
)
def test_guard_lets_words_pass(source: str) -> None:
    assert formatted(source) == []
