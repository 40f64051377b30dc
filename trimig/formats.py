"""Writes numbers for people: sizes, rates, durations, shares. No other module of trimig formats numbers.

Units are binary (KiB, MiB, GiB) and always named; a rate is in MiB/s, so that two rates can be compared at a glance.
For machines (JSON) the unit is in the name of the member: ``_bytes``, ``_bytes_per_s``, ``_ms``, and the value is a
number.

This module imports nothing of trimig.
"""

from __future__ import annotations

import math
from typing import Final

_KIB: Final = 1024
_MIB: Final = 1024 * 1024
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(count: float) -> str:
    """Bytes: ``512 B``, ``1.5 KiB``, ``256 MiB``, ``1.2 GiB``."""
    if abs(count) < _KIB - 0.5:
        return f"{count:.0f} B"
    for unit in _UNITS:
        count /= _KIB
        if abs(count) < _KIB - 0.5 or unit == _UNITS[-1]:
            return f"{_short(count)} {unit}"
    raise AssertionError("the last unit takes everything")


def rate(bytes_per_second: float) -> str:
    """Bytes per second: ``0.016 MiB/s``, ``12.5 MiB/s``, ``1024 MiB/s``; ``unknown`` where it is infinite."""
    if not math.isfinite(bytes_per_second):
        return "unknown"
    return f"{_short(bytes_per_second / _MIB)} MiB/s"


def transfer(sent: float, guest_memory_per_second: float) -> str:
    """The result of a migration: bytes on the wire, and bytes of guest memory per second, zero pages included:
    ``20.1 MiB sent, 62.5 MiB/s of guest memory``.
    """
    return f"{size(sent)} sent, {memory_rate(guest_memory_per_second)}"


def memory_rate(bytes_per_second: float) -> str:
    """Bytes of guest memory per second: ``62.5 MiB/s of guest memory``."""
    return f"{rate(bytes_per_second)} of guest memory"


def bandwidth_limit(bytes_per_second: float) -> str:
    """``max-bandwidth`` and its like, where 0 is no limit: ``no limit``, ``limit 32 MiB/s``."""
    return f"limit {rate(bytes_per_second)}" if bytes_per_second else "no limit"


def duration(seconds: float) -> str:
    """Seconds: ``0.4 ms``, ``312 ms``, ``4.2 s``, ``3 min 5 s``, ``2 h 10 min``; ``no end`` where it is infinite."""
    if math.isinf(seconds):
        return "no end"
    if seconds < 0.00995:
        return f"{_short(seconds * 1000, digits=1)} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{_short(seconds, digits=1)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def whole_ms(seconds: float) -> str:
    """Seconds as milliseconds, where a limit in ms stands beside it: ``5500 ms``; ``no end`` where it is infinite."""
    return "no end" if math.isinf(seconds) else f"{seconds * 1000:.0f} ms"


def percent(share: float) -> str:
    """A share, 0 to 1: ``42 %``. ``100 %`` means exactly 1."""
    return f"{math.floor(share * 100 + 1e-9)} %"


def remaining_time(seconds: float | None, *, at_least: bool = False) -> str:
    """A remaining time: ``about 12 s``, ``at least 3 min 5 s``, ``no end in sight``; ``not known yet`` for None."""
    if seconds is None:
        return "not known yet"
    if math.isinf(seconds):
        return "no end in sight"
    # Below a second an estimate is of no use to a reader, and the display would change at each refresh.
    return f"{'at least' if at_least else 'about'} {duration(max(1.0, float(round(seconds))))}"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """``1 pass``, ``3 passes``; without *plural*, an s is added."""
    return f"{number} {singular if number == 1 else plural or f'{singular}s'}"


# -- columns: the unit is in the name of the column --------------------------------------------------------------------


def column_mib(count: float | None) -> str:
    """Bytes for a column in MiB; empty for None."""
    return "" if count is None else f"{count / _MIB:.1f}"


def column_ms(seconds: float | None) -> str:
    """Seconds for a column in ms; empty for None, a dash where it is infinite."""
    if seconds is None:
        return ""
    if math.isinf(seconds):
        return "-"
    return f"{seconds * 1000:.1f}" if seconds < 10 else f"{seconds * 1000:.0f}"


def column_s(seconds: float | None) -> str:
    """Seconds for a column in s; empty for None."""
    return "" if seconds is None else f"{seconds:.1f}"


def plain(value: float) -> str:
    """A number without a unit: with one digit after the point, whole numbers without."""
    return _short(value, digits=1)


def ms(seconds: float) -> float:
    """Seconds as milliseconds for machines, with three digits behind the point."""
    return round(seconds * 1000, 3)


def _short(value: float, *, digits: int | None = None) -> str:
    """About three significant digits, or *digits* after the point; without zeros at the end."""
    if digits is None:
        size = abs(value)
        digits = 0 if size >= 99.95 else 1 if size >= 0.995 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
