"""The data that the phases of an incoming migration share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from ...errors import RemoteProtocolError
from ..phase import phase

if TYPE_CHECKING:
    from ...channel.channels import Channels
    from ...channel.reception import Reception
    from ...config.config import Config
    from ...config.peer import PeerProfile
    from ...guest import Guest
    from ...monitor.core import MonitorCore
    from ...wire.postcopy import Runs
    from ..ram.multifd_receiver import MultifdReceiver
    from ..ram.preempt_receiver import PreemptReceiver
    from ..ram.receiver import RamReceiver
    from ..sections import SectionLoader


class Following(Protocol):
    """The memory that follows the guest in postcopy."""

    @property
    def whole(self) -> bool:
        """True if every page has come, even if the migration has not ended."""

    async def end(self) -> Mapping[str, Runs]:
        """End the postcopy, and stop the guest if pages are missing. Returns the missing pages, by block."""


class NothingFollows:
    """Precopy: all memory comes before the guest is started."""

    @property
    def whole(self) -> bool:
        """False, because in precopy the status shows whether all memory has come."""
        return False

    async def end(self) -> Mapping[str, Runs]:
        """Do nothing, and return no missing page.

        **Cancellation:** no effect.
        """
        return {}


class Incoming:
    """One incoming migration: a record. The phases write the attributes from :attr:`opened` on, which are facts."""

    def __init__(
        self,
        guest: Guest,
        config: Config,
        monitor: MonitorCore,
        channels: Channels,
        reception: Reception,
        preempt: PreemptReceiver,
        data: MultifdReceiver,
        ram: RamReceiver,
        loaders: Mapping[str, SectionLoader],
    ) -> None:
        self.guest = guest
        #: The configuration, with the profile that the stream has shown.
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.channels = channels
        self.reception = reception
        self.preempt = preempt
        self.data = data
        self.ram = ram
        #: The loaders of the iterative sections, by idstr.
        self.loaders = loaders
        self.following: Following = NothingFollows()
        #: True once the source has sent OPEN_RETURN_PATH.
        self.opened = False
        #: True if the source has sent OPEN_RETURN_PATH, and the connection can send.
        self.return_path = False
        #: True if the source is a trimig, and knows that this side is one.
        self.marked = False
        #: True once the source has sent a PING that only a trimig sends.
        self.of_trimig = False
        #: The id of this attempt that the source has sent; None before.
        self.attempt: bytes | None = None
        #: True once the source was answered the PING of `prepare`: everything is loaded.
        self.prepared = False
        #: True once SHUT 0, which confirms the arrival of the guest, was sent.
        self.confirmed = False
        #: True if the guest ran here and was stopped, because its source may run it too.
        self.stopped = False
        #: Seconds that the activation of the guest took.
        self.resume_seconds = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the block as a phase, see :func:`trimig.engine.phase.phase`."""
        with phase(self.monitor, name):
            yield

    def refine(self, peer: PeerProfile) -> None:
        """Set the profile of the source, after the stream has shown more of it."""
        self.config = dataclasses.replace(self.config, peer=peer)

    def tell(self, problems: list[str]) -> None:
        """Report missing pages or devices: RemoteProtocolError, or warnings with ``completeness = "warn"``."""
        for problem in problems:
            if self.config.completeness == "fail":
                raise RemoteProtocolError(f'{problem} (the option completeness = "warn" accepts that)')
            self.monitor.warn(problem)
