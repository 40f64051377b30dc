"""The figures of ``trimig demo``: one record for each hop, the sum of all hops, and the table for users."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

from trimig import formats

from ..encodings import added, encoding_words

#: The parts of the downtime as measured by the source, in order, with their printed names.
PARTS = {"pause": "pause", "ram": "rest of RAM", "devices": "devices", "prepare": "prepare", "commit": "commit"}


@dataclasses.dataclass(frozen=True, slots=True)
class Hop:
    """The reports of both hosts about one migration, as one JSON object."""

    record: dict[str, Any]

    @classmethod
    def of(
        cls,
        number: int,
        hosts: tuple[int, int],
        source: dict[str, Any],
        destination: dict[str, Any],
        more: dict[str, Any],
    ) -> Self:
        """Combine the two summaries (:func:`trimig.cli.summary.summary_record`) and *more* of the hosts' reports.

        Only the destination knows the time for resuming the guest; that time is part of the source's ``commit``.
        """
        record = {"hop": number, "source": hosts[0], "destination": hosts[1], **source, **more}
        del record["role"]
        record["downtime"] = {**source["downtime"], "resume": destination["downtime"]["resume"]}
        record["warnings"] = list(dict.fromkeys([*source["warnings"], *destination["warnings"]]))
        return cls(record)

    @property
    def sentence(self) -> str:
        """One line."""
        r = self.record
        passes = formats.counted(r["iterations"], "pass", "passes")
        return (
            f"{formats.duration(r['total_ms'] / 1000)}, {passes}, {formats.size(r['transferred_bytes'])} sent, "
            f"downtime {formats.duration(r['downtime_ms'] / 1000)}"
        )


def overall(hops: Sequence[Hop]) -> dict[str, Any]:
    """All hops together. Times, bytes and iterations are sums; ``downtime_ms`` is the longest of a single hop, whose
    parts are in ``downtime``, and ``downtime_sum_ms`` the sum."""
    records = [hop.record for hop in hops]
    worst = max(records, key=lambda r: float(r["downtime_ms"]))
    total_ms = sum(r["total_ms"] for r in records)
    normal, zero, encoded = (sum(r[key] for r in records) for key in ("normal_bytes", "zero_bytes", "encoded_bytes"))
    methods = list(dict.fromkeys(r["dirty_tracking"] for r in records))
    return {
        "downtime_ms": worst["downtime_ms"],
        "downtime": worst["downtime"],
        "downtime_sum_ms": round(sum(r["downtime_ms"] for r in records), 3),
        "total_ms": round(total_ms, 3),
        "throughput_bytes_per_s": round((normal + zero + encoded) / (total_ms / 1000)) if total_ms else 0,
        "iterations": sum(r["iterations"] for r in records),
        "transferred_bytes": sum(r["transferred_bytes"] for r in records),
        "normal_bytes": normal,
        "zero_bytes": zero,
        "encoded_bytes": encoded,
        "encoded_sent_bytes": sum(r["encoded_sent_bytes"] for r in records),
        "encodings": added([r["encodings"] for r in records]),
        "dirty_tracking": ", ".join(methods),
        "data_channels": max(r["data_channels"] for r in records),
        "multifd_bytes": sum(r["multifd_bytes"] for r in records),
        **_postcopy(records),
        **_throttle(records),
    }


def _postcopy(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Faults and recoveries are sums; median and 99th percentile are those of the worst hop. Empty in precopy."""
    if "page_faults" not in records[0]:
        return {}
    return {
        "page_faults": sum(r["page_faults"] for r in records),
        "fault_median_ms": max(r["fault_median_ms"] for r in records),
        "fault_p99_ms": max(r["fault_p99_ms"] for r in records),
        "recoveries": sum(r["recoveries"] for r in records),
    }


def _throttle(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest throttle. Empty without auto-converge."""
    if "throttle_percent" not in records[0]:
        return {}
    return {"throttle_percent": max(r["throttle_percent"] for r in records)}


def text(result: dict[str, Any], width: int = 80) -> str:
    """The proof and the figures as text; *result* is the object of ``--json``, *width* the width of the screen."""
    if result["verified"]:
        lines = [f"Verified: {result['proof']}.", "Not one write was lost or replayed.", ""]
    else:
        lines = [f"NOT VERIFIED: {result['proof']}.", ""]
    hops = result["hops"]
    if len(hops) > 1:
        lines += _table(hops, width)
    parts = {key: f"{name} {formats.column_ms(result['downtime'][key] / 1000)}" for key, name in PARTS.items()}
    resume = formats.column_ms(result["downtime"]["resume"] / 1000)
    downtime = formats.duration(result["downtime_ms"] / 1000)
    if len(hops) > 1:
        downtime = (
            f"at most {downtime} (hop {_worst(hops)}), {formats.duration(result['downtime_sum_ms'] / 1000)} in all"
        )
    passes = formats.counted(result["iterations"], "pass", "passes")
    normal, zero = formats.size(result["normal_bytes"]), formats.size(result["zero_bytes"])
    rows = [
        ("total time", f"{formats.duration(result['total_ms'] / 1000)}, {passes}"),
        ("downtime", downtime),
        ("  parts, in ms", f"{parts['pause']}, {parts['ram']}, {parts['devices']},"),
        ("", f"{parts['prepare']}, {parts['commit']} ({resume} of it to resume there)"),
        ("throughput", formats.memory_rate(result["throughput_bytes_per_s"])),
        ("memory moved", f"{normal} in normal pages, {zero} in zero pages"),
        ("bytes sent", formats.size(result["transferred_bytes"])),
        ("dirty tracking", result["dirty_tracking"]),
    ]  # fmt: skip
    if channels := result["data_channels"]:
        over = formats.size(result["multifd_bytes"])
        rows.insert(-1, ("data channels", f"{channels} (multifd), with {over} of the bytes sent"))
    if result["encoded_bytes"]:
        sent = formats.size(result["encoded_sent_bytes"])
        rows.insert(6, ("", f"{formats.size(result['encoded_bytes'])} in another encoding, sent as {sent}"))
    if chosen := encoding_words(result["encodings"]):
        rows.append(("encodings", chosen))
    if "throttle_percent" in result:
        throttle = f"{formats.percent(result['throttle_percent'] / 100)} of the guest's running time at most"
        rows.append(("throttle", throttle if result["throttle_percent"] else "none: it was not needed"))
    if "page_faults" in result:
        cuts = result["recoveries"]
        lost = f"; the connection was lost {formats.counted(cuts, 'time')}, and taken up again" if cuts else ""
        faults = "none: what the guest touched had come"
        if count := result["page_faults"]:
            median, p99 = result["fault_median_ms"], result["fault_p99_ms"]
            faults = (
                f"{count}, median {formats.duration(median / 1000)}, 99 of 100 within {formats.duration(p99 / 1000)}"
            )
        rows.append(("page faults", faults + lost))
    lines += [f"  {name:<16}{value}" for name, value in rows]
    return "\n".join(lines)


#: The columns of the table of hops: name, unit, width, and the value of a hop's record.
_COLUMNS: Final[Sequence[tuple[str, str, int, Callable[[Mapping[str, Any]], str]]]] = (
    ("hop", "", 4, lambda r: str(r["hop"])),
    ("time", "s", 8, lambda r: formats.column_s(r["total_ms"] / 1000)),
    ("passes", "", 7, lambda r: str(r["iterations"])),
    ("sent", "MiB", 9, lambda r: formats.column_mib(r["transferred_bytes"])),
    ("rate", "MiB/s", 8, lambda r: formats.column_mib(r["throughput_bytes_per_s"])),
    ("downtime", "ms", 9, lambda r: formats.column_ms(r["downtime_ms"] / 1000)),
    *(
        (name, "ms", width, lambda r, part=part: formats.column_ms(r["downtime"][part] / 1000))
        for part, name, width in (
            ("pause", "pause", 6),
            ("ram", "RAM", 6),
            ("devices", "dev.", 6),
            ("prepare", "prep.", 6),
            ("commit", "commit", 7),
        )
    ),
)


def _table(hops: Sequence[dict[str, Any]], width: int) -> list[str]:
    """One line for each hop below names and units, with the columns that fit into *width*."""
    columns, taken = [], 0
    for column in _COLUMNS:
        taken += column[2]
        if taken <= width:
            columns.append(column)
    head = ["".join(f"{column[row]:>{column[2]}}" for column in columns) for row in (0, 1)]
    return [*head, *("".join(f"{value(hop):>{wide}}" for _, _, wide, value in columns) for hop in hops), ""]


def _worst(hops: Sequence[dict[str, Any]]) -> int:
    return int(max(hops, key=lambda r: float(r["downtime_ms"]))["hop"])
