"""What ``encoding = "auto"`` has chosen, for JSON and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimig import formats
from trimig.monitor import EncodingUse


def encoding_records(uses: Sequence[EncodingUse]) -> list[dict[str, Any]]:
    """The members for JSON, with units in their names."""
    return [
        {
            "encoding": use.name,
            "pages": use.pages,
            "saved_bytes": use.saved_bytes,
            "processor_ms": formats.ms(use.processor_time),
        }
        for use in uses
    ]


def encoding_records_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same from an answer to query-migrate; empty if the other side chooses no encoding, or is no trimig."""
    member = info.get("encoding")
    return [
        {
            "encoding": str(use["encoding"]),
            "pages": int(use["pages"]),
            "saved_bytes": int(use["saved-bytes"]),
            "processor_ms": use["processor-time"],
        }
        for use in (member.get("used", ()) if isinstance(member, Mapping) else ())
    ]


def added(records: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The sums of several migrations."""
    found: dict[str, dict[str, Any]] = {}
    for record in (record for each in records for record in each):
        sums = found.setdefault(record["encoding"], {"encoding": record["encoding"]})
        for key in ("pages", "saved_bytes", "processor_ms"):
            sums[key] = round(sums.get(key, 0) + record[key], 3)
    return list(found.values())


def encoding_words(records: Sequence[Mapping[str, Any]]) -> str:
    """One clause; empty if nothing was chosen."""
    used = [record for record in records if record["pages"]]
    if not used:
        return ""
    names = [
        f"{record['pages']} {'plain' if record['encoding'] == 'plain' else 'by ' + record['encoding']}"
        for record in used
    ]
    saved, spent = (sum(record[key] for record in used) for key in ("saved_bytes", "processor_ms"))
    what = f"{formats.size(saved)} saved" if saved >= 0 else f"{formats.size(-saved)} lost"
    return f"pages {', '.join(names)}; {what} for {formats.duration(spent / 1000)} of processor time"
