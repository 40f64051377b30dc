"""The state of a guest and its migration in another process, and the settings in force there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import click

from trimig.config import uri_of
from trimig.errors import Ownership
from trimig.status import QMP_COMMITTING, QMP_HANDED_OVER, QMP_IDLE, QMP_KEPT, QMP_UNSUCCESSFUL, Status

from ..exit_codes import FAILED, INCOMPLETE, UNCERTAIN

#: Seconds for the end of a cancelled migration: the peer's grace time, and some more.
CANCEL_LIMIT: Final = 20.0
#: Seconds between two polls of a state without notifications.
POLL: Final = 0.05


class Refused(click.ClickException):
    """The other side refused, or cannot be asked; the error says nothing about the guest."""

    exit_code = FAILED


class Gone(Refused):
    """The connection has ended, or no more data comes over it."""


class Busy(Refused):
    """The other side serves another client, or does not answer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A guest and its migration, from the answers to two queries."""

    run_state: str
    #: The answer to query-migrate.
    info: Mapping[str, Any]

    @property
    def migration(self) -> str:
        """The migration's status, ``none`` if there never was a migration."""
        return str(self.info.get("status", Status.NONE.qmp))

    @property
    def ended(self) -> bool:
        """No migration is under way."""
        return self.migration in QMP_IDLE

    @property
    def owner(self) -> str:
        """``source``, ``destination`` or ``unknown``: reported by a trimig, or derived from QEMU's answers.

        Without pause-before-switchover a QEMU stays ``active`` until the destination has answered. So once its guest
        is stopped for the switchover, the commit may be on its way.
        """
        if "owner" in self.info:
            return str(self.info["owner"])
        if self.migration in QMP_HANDED_OVER:
            return "destination"
        # An `active` migration, or one in a status of a newer QEMU, whose guest is stopped for the switchover.
        stopped = self.migration not in QMP_KEPT and self.run_state == "finish-migrate"
        if self.migration in QMP_COMMITTING or stopped:
            return "unknown"
        return "source"

    @property
    def lost(self) -> bool:
        """A postcopy migration has failed: the destination has the guest, and a part of its memory will not come."""
        return self.migration == Status.FAILED.qmp and self.owner == Ownership.DESTINATION.value

    @property
    def problem(self) -> str:
        """The error text; empty without an error, or if the other side gave no text."""
        return str(self.info.get("error-desc", ""))

    @property
    def sentence(self) -> str:
        """One line for users."""
        text = f"guest: {self.run_state}; migration: {self.migration}; owner: {self.owner}"
        if self.run_state == "inmigrate" and self.owner == "source":
            text += f", which is not this side: {self._awaited}"
        elif self.owner == Ownership.DESTINATION.value:
            text += self._where_it_is
        addresses = self.info.get("socket-address", ())
        if self.migration == Status.POSTCOPY_PAUSED.qmp and addresses:
            text += f"; this side waits for the source at {uri_of(addresses[0])}"
        if self.lost_guest:
            text += f"; {self.lost_guest}"
        why = self.info.get("convergence")
        if isinstance(why, Mapping) and not why.get("converging", True):
            text += (
                f"; it does not converge: {why.get('reason')}; what would help: {' or '.join(why.get('advice', ()))}"
            )
        return f"{text}; {self.problem}" if self.problem else text

    @property
    def lost_guest(self) -> str:
        """Why a guest with an internal error stands still, as far as the other side says it; empty for any other guest."""
        return "; ".join(self.info.get("blocked-reasons", ())) if self.run_state == "internal-error" else ""

    @property
    def _awaited(self) -> str:
        """The words for a side that waits for a guest."""
        if self.migration in QMP_UNSUCCESSFUL:
            return "the last attempt has failed, and nothing listens here until trimig incoming gives an address"
        addresses = self.info.get("socket-address", ())
        return "this side waits for a guest " + (f"at {uri_of(addresses[0])}" if addresses else "here")

    @property
    def is_here_from_elsewhere(self) -> bool:
        """This side is certainly the destination, and has the guest."""
        return self.owner == Ownership.DESTINATION.value and "this side" in self._where_it_is

    @property
    def _where_it_is(self) -> str:
        """Whether this side is the destination that has the guest; empty for a QEMU of which that is not certain."""
        if self.run_state in ("postmigrate", "finish-migrate"):
            return " (the other side)"
        # A QEMU has members about RAM at the source only; there `cont` changes the run state also after the handover.
        return " (this side)" if "owner" in self.info or "ram" not in self.info else ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run_state": self.run_state,
            "migration": self.migration,
            "owner": self.owner,
            **({"error": self.problem} if self.problem else {}),
        }

    @property
    def code(self) -> int:
        """The exit code of a command that only reports this state."""
        if self.owner == "unknown":
            return UNCERTAIN
        return INCOMPLETE if self.lost else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Capabilities and parameters by their QMP names; some of them, or all."""

    capabilities: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.capabilities or self.parameters)

    def of(self, others: Settings) -> Settings:
        """The settings here whose names are among *others*: setting them undoes a change to *others*."""
        return Settings(
            capabilities={k: v for k, v in self.capabilities.items() if k in others.capabilities},
            parameters={k: v for k, v in self.parameters.items() if k in others.parameters},
        )

    def over(self, others: Settings) -> Settings:
        """*others*, overridden by these settings."""
        return Settings(
            capabilities={**others.capabilities, **self.capabilities},
            parameters={**others.parameters, **self.parameters},
        )

    @property
    def words(self) -> str:
        """The settings as options of the command line."""
        return " ".join(
            [f"-c {name}={'on' if state else 'off'}" for name, state in self.capabilities.items()]
            + [f"-p {name}={value if value != '' else repr('')}" for name, value in self.parameters.items()]
        )
