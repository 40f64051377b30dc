"""What the page `operating` says of the code is what the code says."""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from trimig import status, transport
from trimig.cli import COMMANDS
from trimig.config import BUILT, Config
from trimig.errors import Ownership
from trimig.status import CANCELLABLE, IDLE, RECOVERABLE, TRANSITIONS, Role, Status

from . import pages

PAGE: Final = pages.read(pages.BY_NAME["operating.md"])

#: What each status is, in words; everything else in the table comes from the code.
MEANING: Final = {
    Status.NONE: "there was no migration yet",
    Status.SETUP: "connecting, or waiting for a connection",
    Status.ACTIVE: "memory is on its way; the guest runs",
    Status.PRE_SWITCHOVER: "the guest is stopped, and waits for `continue`",
    Status.DEVICE: "the guest is stopped; the rest of it is on its way",
    Status.HANDOVER: "the decision has been sent (QMP shows `device`)",
    Status.UNCERTAIN: "the answer to it is missing (QMP shows `failed`)",
    Status.COMPLETED: "the guest has changed hands",
    Status.FAILED: "it has not, by a fault",
    Status.CANCELLING: "it is being undone",
    Status.CANCELLED: "it has not, by a wish",
    Status.POSTCOPY_ACTIVE: "the guest has gone ahead, and its memory follows",
    Status.POSTCOPY_PAUSED: "the connection was lost meanwhile; the guest runs as far as its memory reaches",
    Status.POSTCOPY_RECOVER: "there is another connection; the sides find out what is missing",
    Status.POSTCOPY_UNCERTAIN: "it was lost before the destination had said that it has the guest (QMP: `postcopy-paused`)",
    Status.POSTCOPY_LOST: "the rest of the memory will not come (QMP shows `failed`)",
}


def owner_in(role: Role, value: Status) -> str:
    """The owner as *role* sees it, or a dash where it never is in that status."""
    if value not in TRANSITIONS[role]:
        return "-"
    found = status.owner(role, value)
    return "unknown" if found is Ownership.UNKNOWN else found.value


def allowed(value: Status) -> str:
    """What may be done, of the things that not every status allows."""
    found = []
    if value in CANCELLABLE:
        found.append("cancel")
    if value is Status.PRE_SWITCHOVER:
        found.append("continue")
    if value in IDLE:
        gone = value in (Status.COMPLETED, Status.POSTCOPY_LOST)
        found.append("-" if gone else "migrate, change capabilities")
    if value in (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER):
        found.append("pause")
    if value in RECOVERABLE:
        found.append("recover, abandon")
    if value is Status.UNCERTAIN:
        found.append("settle")
    return ", ".join(found) or "wait"


def table() -> str:
    """The table of statuses."""
    lines = [
        "| status | what it is | owner, by the source | by the destination | what may be done |",
        "|---|---|---|---|---|",
    ]
    for value in Status:
        owners = f"{owner_in(Role.SOURCE, value)} | {owner_in(Role.DESTINATION, value)}"
        lines.append(f"| `{value.value}` | {MEANING[value]} | {owners} | {allowed(value)} |")
    return "\n".join(lines)


def test_table_of_statuses_is_that_of_the_code() -> None:
    found = PAGE.partition("<!-- statuses -->\n")[2].partition("\n<!-- /statuses -->")[0]
    assert found == table()


def test_every_transport_command_and_capability_is_named() -> None:
    for scheme in transport.SCHEMES:
        assert f"`{scheme}:" in PAGE, scheme
    for command in COMMANDS:
        assert re.search(rf"`(?:trimig )?{command}`", PAGE), command
    for capability in BUILT - {"events"}:
        assert capability in PAGE, capability


def test_the_configuration_file_shows_the_defaults() -> None:
    """Whole, and with what is behind ``#``: those options exist, and have no value by default."""
    block = PAGE.partition("```toml\n")[2].partition("```")[0]
    assert Config.from_toml(block) == Config()
    changed = Config.from_toml(re.sub(r"(?m)^# (?=[a-z-]+ = )", "", block))
    differing = [
        field.name
        for field in dataclasses.fields(Config)
        if getattr(changed, field.name) != getattr(Config(), field.name)
    ]
    assert differing == ["max_iterations", "max_total_time"]
    assert all(getattr(Config(), name) is None for name in differing)
