"""What the phases of an incoming migration share."""

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
    from ..ram.preempt_receiver import PreemptReceiver
    from ..ram.receiver import RamReceiver
    from ..sections import SectionLoader


class Following(Protocol):
    """The memory that follows a guest."""

    @property
    def whole(self) -> bool:
        """Every page has come, although the migration has not come to its end."""

    async def end(self) -> Mapping[str, Runs]:
        """Nothing more will follow: the guest is stopped. Returns the pages that it lacks, by block."""


class NothingFollows:
    """All memory comes before the guest is started."""

    @property
    def whole(self) -> bool:
        """False: the migration itself says whether the guest is whole."""
        return False

    async def end(self) -> Mapping[str, Runs]:
        """Nothing is to be done.

        **Cancellation:** no effect.
        """
        return {}


class Incoming:
    """One incoming migration. The attributes below the first group are facts, which phases set as they learn them."""

    def __init__(
        self,
        guest: Guest,
        config: Config,
        monitor: MonitorCore,
        channels: Channels,
        reception: Reception,
        preempt: PreemptReceiver,
        ram: RamReceiver,
        loaders: Mapping[str, SectionLoader],
    ) -> None:
        self.guest = guest
        #: As the configuration section has refined it.
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.channels = channels
        self.reception = reception
        self.preempt = preempt
        self.ram = ram
        #: The iterative sections that are taken, by their names.
        self.loaders = loaders
        self.following: Following = NothingFollows()
        #: The source has asked for answers.
        self.opened = False
        #: The source has asked for answers, and there is a way back.
        self.return_path = False
        #: The source is a trimig, and knows that this side is one.
        self.marked = False
        #: The source has sent a PING that only a trimig sends.
        self.of_trimig = False
        #: The id that the source has given this attempt.
        self.attempt: bytes | None = None
        #: The source has asked for the proof that everything is loaded, and got it.
        self.prepared = False
        #: The source was told that the guest has arrived.
        self.confirmed = False
        #: The guest ran here, and was stopped because perhaps its source runs it.
        self.stopped = False
        #: Seconds that the guest needed to go on.
        self.resume_seconds = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the migration, see :func:`trimig.engine.phase.phase`."""
        with phase(self.monitor, name):
            yield

    def refine(self, peer: PeerProfile) -> None:
        """The stream has shown what its source is like."""
        self.config = dataclasses.replace(self.config, peer=peer)

    def tell(self, problems: list[str]) -> None:
        """Something is missing. RemoteProtocolError, unless ``completeness`` says that it may."""
        for problem in problems:
            if self.config.completeness == "fail":
                raise RemoteProtocolError(f'{problem} (the option completeness = "warn" accepts that)')
            self.monitor.warn(problem)
