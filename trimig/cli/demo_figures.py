"""The figures of ``trimig demo``: one record for each hop, all of them together, and the table for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from .common import show_size, show_time

#: The parts of the downtime as the source saw them, in order, with their names for people.
PARTS = {"pause": "pause", "ram": "rest of RAM", "devices": "devices", "prepare": "prepare", "commit": "commit"}


@dataclasses.dataclass(frozen=True, slots=True)
class Hop:
    """One migration: what both hosts said about it, as one JSON object."""

    record: dict[str, Any]

    @classmethod
    def of(
        cls,
        number: int,
        hosts: tuple[int, int],
        source: dict[str, Any],
        destination: dict[str, Any],
        postcopy: dict[str, Any],
    ) -> Self:
        """From the two summaries (:func:`trimig.cli.common.summary_record`), and what the hosts say of *postcopy*.

        Only the destination knows how long it took to resume the guest; that time is inside what the source saw as
        ``commit``.
        """
        record = {"hop": number, "source": hosts[0], "destination": hosts[1], **source, **postcopy}
        del record["role"]
        record["downtime"] = {**source["downtime"], "resume": destination["downtime"]["resume"]}
        record["warnings"] = list(dict.fromkeys([*source["warnings"], *destination["warnings"]]))
        return cls(record)

    @property
    def sentence(self) -> str:
        """One line."""
        r = self.record
        passes = _counted(r["iterations"], "iteration")
        return (
            f"{show_time(r['total_ms'] / 1000)}, {passes}, {show_size(r['transferred_bytes'])} sent, "
            f"downtime {show_time(r['downtime_ms'] / 1000)}"
        )


def overall(hops: Sequence[Hop]) -> dict[str, Any]:
    """All hops together. Times, bytes and iterations are sums; ``downtime_ms`` is the longest of a single hop, whose
    parts are in ``downtime``, and ``downtime_sum_ms`` the sum."""
    records = [hop.record for hop in hops]
    worst = max(records, key=lambda r: float(r["downtime_ms"]))
    total_ms = sum(r["total_ms"] for r in records)
    normal, zero = (sum(r[key] for r in records) for key in ("normal_bytes", "zero_bytes"))
    methods = list(dict.fromkeys(r["dirty_tracking"] for r in records))
    return {
        "downtime_ms": worst["downtime_ms"],
        "downtime": worst["downtime"],
        "downtime_sum_ms": round(sum(r["downtime_ms"] for r in records), 3),
        "total_ms": round(total_ms, 3),
        "throughput_bytes_per_s": round((normal + zero) / (total_ms / 1000)) if total_ms else 0,
        "iterations": sum(r["iterations"] for r in records),
        "transferred_bytes": sum(r["transferred_bytes"] for r in records),
        "normal_bytes": normal,
        "zero_bytes": zero,
        "dirty_tracking": ", ".join(methods),
        **_postcopy(records),
    }


def _postcopy(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Faults and recoveries are sums, the median and the 99th percentile those of the worst hop; nothing in precopy."""
    if "page_faults" not in records[0]:
        return {}
    return {
        "page_faults": sum(r["page_faults"] for r in records),
        "fault_median_ms": max(r["fault_median_ms"] for r in records),
        "fault_p99_ms": max(r["fault_p99_ms"] for r in records),
        "recoveries": sum(r["recoveries"] for r in records),
    }


def text(result: dict[str, Any]) -> str:
    """The proof and the figures for people; *result* is what ``--json`` prints."""
    if result["verified"]:
        lines = [f"Verified: {result['proof']}.", "Not one write was lost or replayed.", ""]
    else:
        lines = [f"NOT VERIFIED: {result['proof']}.", ""]
    hops = result["hops"]
    if len(hops) > 1:
        lines += _table(hops)
    parts = {key: f"{name} {_ms(result['downtime'][key])}" for key, name in PARTS.items()}
    resume = _ms(result["downtime"]["resume"])
    downtime = show_time(result["downtime_ms"] / 1000)
    if len(hops) > 1:
        downtime = f"at most {downtime} (hop {_worst(hops)}), {show_time(result['downtime_sum_ms'] / 1000)} in all"
    rows = [
        ("total time", f"{show_time(result['total_ms'] / 1000)}, {_counted(result['iterations'], 'iteration')}"),
        ("downtime", downtime),
        ("  parts, in ms", f"{parts['pause']}, {parts['ram']}, {parts['devices']},"),
        ("", f"{parts['prepare']}, {parts['commit']} ({resume} of it to resume there)"),
        ("throughput", f"{show_size(result['throughput_bytes_per_s'])}/s of guest memory"),
        ("memory moved", f"{show_size(result['normal_bytes'])} in normal pages, {show_size(result['zero_bytes'])} in zero pages"),
        ("bytes sent", show_size(result["transferred_bytes"])),
        ("dirty tracking", result["dirty_tracking"]),
    ]  # fmt: skip
    if "page_faults" in result:
        cuts = result["recoveries"]
        lost = f"; the connection was lost {_counted(cuts, 'time')}, and taken up again" if cuts else ""
        faults = "none: what the guest touched had come"
        if count := result["page_faults"]:
            median, p99 = result["fault_median_ms"], result["fault_p99_ms"]
            faults = f"{count}, median {median:.2f} ms, 99 % within {p99:.2f} ms"
        rows.append(("page faults", faults + lost))
    lines += [f"  {name:<16}{value}" for name, value in rows]
    return "\n".join(lines)


def _table(hops: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "                                           downtime, ms, and its parts",
        " hop     time passes     sent        rate   total pause   RAM  dev. prep. commit",
    ]
    for r in hops:
        rate = f"{show_size(r['throughput_bytes_per_s'])}/s"
        parts = "".join(
            f"{_ms(r['downtime'][part]):>{width}}" for part, width in zip(PARTS, (6, 6, 6, 6, 7), strict=True)
        )
        lines.append(
            f"{r['hop']:>4}{show_time(r['total_ms'] / 1000):>9}{r['iterations']:>7}"
            f"{show_size(r['transferred_bytes']):>9}{rate:>12}{_ms(r['downtime_ms']):>8}{parts}"
        )
    return [*lines, ""]


def _worst(hops: Sequence[dict[str, Any]]) -> int:
    return int(max(hops, key=lambda r: float(r["downtime_ms"]))["hop"])


def _ms(value: float) -> str:
    return f"{value:.1f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
