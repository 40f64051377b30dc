"""A finished migration as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from trimig import formats
from trimig.monitor import Downtime, Summary

from .encodings import encoding_records

_PARTS: Final = dataclasses.fields(Downtime)


def summary_record(summary: Summary) -> dict[str, Any]:
    """A summary as JSON: times in ms, sizes in bytes, the downtime in its parts."""
    return {
        "role": summary.role.value,
        "confirmed": summary.confirmed,
        "prepared": summary.prepared,
        "total_ms": formats.ms(summary.total_time),
        "setup_ms": formats.ms(summary.setup_time),
        "waiting_ms": formats.ms(summary.waiting_time),
        "downtime_ms": formats.ms(summary.downtime),
        "downtime": {part.name: formats.ms(getattr(summary.downtime_parts, part.name)) for part in _PARTS},
        "throughput_bytes_per_s": round(summary.throughput),
        "iterations": summary.iterations,
        "dirty_tracking": summary.dirty_tracking,
        "ram_bytes": summary.ram_bytes,
        "transferred_bytes": summary.bytes_transferred,
        "normal_bytes": summary.normal_pages * 4096,
        "zero_bytes": summary.zero_pages * 4096,
        "encoded_bytes": summary.encoded_pages * 4096,
        "encoded_sent_bytes": summary.encoded_bytes,
        "encodings": encoding_records(summary.encodings),
        "data_channels": summary.data_channels,
        "multifd_bytes": summary.multifd_bytes,
        "warnings": list(summary.warnings),
    }
