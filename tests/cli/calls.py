"""Arguments with which each command can be called."""

from __future__ import annotations

from typing import Final

from tests.cli.scripted import ADDRESS

#: Arguments of each command with which it ends by itself; ``{…}`` is replaced by a file of the test.
CALLS: Final[dict[str, list[str]]] = {
    "demo": ["--size", "1M", "--hot", "2M"],
    "run": ["--guest", "nonsense", "--qmp", "unix:/nowhere"],
    "migrate": ["tcp:h:1", "--wait", "--qmp", ADDRESS],
    "status": ["--qmp", ADDRESS],
    "info": ["--qmp", ADDRESS],
    "cancel": ["--qmp", ADDRESS],
    "set": ["--qmp", ADDRESS],
    "continue": ["--qmp", ADDRESS],
    "postcopy": ["--qmp", ADDRESS],
    "pause": ["--qmp", ADDRESS],
    "recover": ["tcp:h:1", "--qmp", ADDRESS],
    "incoming": ["tcp:h:1", "--qmp", ADDRESS],
    "events": ["--until-end", "--qmp", ADDRESS],
    "receive": ["file:{stream}", "--save", "{target}"],
    "send": ["{stream}", "file:{out}", "-c", "return-path=off"],
    "settle": ["{stream}", "--owner", "source"],
    "inspect": ["{stream}", "--fields"],
    "export": ["{stream}", "--format", "raw", "--block", "ram", "--out", "{out}"],
    "merge": ["{stream}", "{stream}", "--out", "{out}"],
    "docs": ["glossary"],
}
