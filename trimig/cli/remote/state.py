"""What a guest of another process says of its migration, and the settings in force there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import click

from trimig.config import uri_of

from ..exit_codes import FAILED, INCOMPLETE, UNCERTAIN

#: Seconds for a cancelled migration to be over: the peer's grace, and some.
CANCEL_LIMIT: Final = 20.0
#: Seconds between two looks at what cannot notify us.
POLL: Final = 0.05
#: Statuses of a migration that is over, or never was. All others go on, also those that a newer QEMU has invented.
ENDED: Final = frozenset({"none", "completed", "failed", "cancelled"})
#: From here on the guest can run at the destination only.
_GIVEN_AWAY: Final = frozenset(
    {"completed", "postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup"}
)
#: The decision has been sent, and is not answered.
_DECIDING: Final = frozenset({"device", "postcopy-device"})
#: The guest stays: nothing was sent that could give it away, or the migration is over, or a QEMU takes its guest back.
_KEPT: Final = frozenset(
    {"none", "setup", "wait-unplug", "cancelling", "cancelled", "failing", "failed", "pre-switchover"}
)


class Refused(click.ClickException):
    """The other side has said no, or cannot be asked; nothing is claimed about the guest."""

    exit_code = FAILED


class Gone(Refused):
    """The connection has ended, or nothing comes over it any more."""


class Busy(Refused):
    """Somebody else is being served there, or nobody is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A guest and its migration, as two queries show them."""

    run_state: str
    #: The answer to query-migrate.
    info: Mapping[str, Any]

    @property
    def migration(self) -> str:
        """Its status, ``none`` if there never was one."""
        return str(self.info.get("status", "none"))

    @property
    def ended(self) -> bool:
        """No migration is under way."""
        return self.migration in ENDED

    @property
    def owner(self) -> str:
        """``source``, ``destination`` or ``unknown``: as trimig says, or as far as it follows from what QEMU says.

        Without pause-before-switchover a QEMU stays ``active`` until the destination has answered, so once its guest
        is stopped for the switchover the decision may be on its way.
        """
        if "owner" in self.info:
            return str(self.info["owner"])
        if self.migration in _GIVEN_AWAY:
            return "destination"
        # An `active` migration, or one in a status of a newer QEMU, whose guest is stopped for the switchover.
        stopped = self.migration not in _KEPT and self.run_state == "finish-migrate"
        if self.migration in _DECIDING or stopped:
            return "unknown"
        return "source"

    @property
    def problem(self) -> str:
        """What went wrong; empty if nothing did, or nobody has said what."""
        return str(self.info.get("error-desc", ""))

    @property
    def sentence(self) -> str:
        """One line for people."""
        text = f"guest: {self.run_state}; migration: {self.migration}; owner: {self.owner}"
        if self.run_state == "inmigrate" and self.owner == "source":
            text += f", which is not this side: {self._awaited}"
        why = self.info.get("convergence")
        if isinstance(why, Mapping) and not why.get("converging", True):
            text += (
                f"; it does not converge: {why.get('reason')}; what would help: {' or '.join(why.get('advice', ()))}"
            )
        return f"{text}; {self.problem}" if self.problem else text

    @property
    def _awaited(self) -> str:
        """What a side whose guest has not come does about it."""
        if self.migration in ("failed", "cancelled"):
            return "the last attempt has failed, and nothing listens here until migrate-incoming gives an address"
        addresses = self.info.get("socket-address", ())
        return "a guest is waited for " + (f"at {uri_of(addresses[0])}" if addresses else "here")

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
        """The exit code of a command that has nothing to report but this."""
        if self.owner == "unknown":
            return UNCERTAIN
        return INCOMPLETE if (self.migration, self.owner) == ("failed", "destination") else 0  # a lost postcopy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Capabilities and parameters by their QMP names; some of them, or all."""

    capabilities: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.capabilities or self.parameters)

    def of(self, others: Settings) -> Settings:
        """Those of these whose names are among *others*: what has to be set to undo a change to *others*."""
        return Settings(
            capabilities={k: v for k, v in self.capabilities.items() if k in others.capabilities},
            parameters={k: v for k, v in self.parameters.items() if k in others.parameters},
        )

    def over(self, others: Settings) -> Settings:
        """*others*, changed by these."""
        return Settings(
            capabilities={**others.capabilities, **self.capabilities},
            parameters={**others.parameters, **self.parameters},
        )

    @property
    def words(self) -> str:
        """As options of the command line."""
        return " ".join(
            [f"-c {name}={'on' if state else 'off'}" for name, state in self.capabilities.items()]
            + [f"-p {name}={value if value != '' else repr('')}" for name, value in self.parameters.items()]
        )
