"""Receives the devices of an unknown machine. Only the description at the end of the stream shows where each one ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import RemoteProtocolError, TransportFailed
from ...guest import DeviceSection
from ...wire.devices.sections import Undelimited
from ...wire.devices.virtio_mem import absent_by_rule
from ...wire.marks import REASON_ELEMENT, trailing_reason
from ...wire.refusals import check_kept_command
from ...wire.return_path import Pong, encode
from .. import device_tail
from ..outcome import add_to_message, source_ended
from ..ram.receiver import never_received

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...wire import events as ev
    from .devices import IncomingDevices
    from .incoming import Incoming

#: Seconds to wait for the description after the decision. The wait is short, because the guest is complete without it.
DESCRIPTION_SECONDS = 2.0

#: The same for a profile without a description. A byte that still comes in this time shows that the end was not the end.
KNOWN_END_SECONDS = 0.05


class IncomingTail:
    """The tail of the stream of a parked guest: everything that follows the RAM.

    Args:
        at: offset of the tail's first byte.
        early: device sections that stood in front of the memory.
    """

    def __init__(
        self, into: Incoming, channel: Channel, devices: IncomingDevices, at: int, early: Sequence[DeviceSection]
    ) -> None:
        self._into = into
        self._channel = channel
        self._devices = devices
        self._at = at
        self._early = early
        self._buffer = device_tail.buffer(into.config, footers=into.config.peer.send_section_footer)

    @property
    def complete(self) -> bool:
        """True if the whole tail has come."""
        return self._buffer.complete

    @property
    def last_wait(self) -> float:
        """Seconds to wait for the next byte; if none comes, the stream has ended. Infinite if it cannot end here."""
        if not self._buffer.perhaps_ended:
            return math.inf
        if not self._into.config.peer.send_section_footer:
            return self._into.config.handover_timeout  # any byte of a device may look like the end
        return KNOWN_END_SECONDS if self._into.config.peer.suppress_vmdesc else DESCRIPTION_SECONDS

    async def feed(self, event: ev.TailBytes) -> None:
        """Take more bytes of the tail, and answer the PING of `prepare` at its end, which a trimig sends.

        Raises:
            RemoteProtocolError: the tail is too long, or pages are missing.

        **Cancellation:** a part of *event* was taken.
        """
        await device_tail.feed(self._buffer, event.data)
        if self._into.return_path and (value := self._buffer.prepare_ping()) is not None:
            if not self._buffer.mentions(b"/virtio-mem"):
                self._check_missing(self._early)
            await self._channel.send(encode(Pong(value=value)))
            self._into.prepared = True

    async def take_undescribed(self) -> None:
        """As :meth:`take`, for a stream without a description whose source waits for the answer (suppress-vmdesc).

        **Cancellation:** as for :meth:`take`.
        """
        try:
            await self.take(ended=False)
        except RemoteProtocolError as error:
            if isinstance(error.__cause__, Undelimited):
                add_to_message(
                    error,
                    "nothing follows the end of the stream; start the source with a description of its devices "
                    "(-M ...,suppress-vmdesc=off, a machine type from 2.3 on) and try again",
                )
            raise

    async def take(self, *, ended: bool) -> None:
        """Split the tail into devices, and give them to the guest. RemoteProtocolError, TransportFailed, GuestFailed.

        Args:
            ended: True if the connection has ended.

        **Cancellation:** as for :meth:`.devices.IncomingDevices.keep`.
        """
        try:
            split = await device_tail.split(self._buffer, self._at, early=self._early)
        except Undelimited as error:
            if (
                ended
                and self._into.marked
                and (reason := trailing_reason(self._buffer.last(REASON_ELEMENT))) is not None
            ):
                raise source_ended(reason) from error
            if ended and self._buffer.location is None:
                raise TransportFailed(
                    f"the stream ends at byte {self._at + len(self._buffer)}, before the guest was complete ({error.reason})"
                ) from error
            raise RemoteProtocolError(
                f"the devices cannot be told apart: {error.reason}", offset=error.offset, section=error.section
            ) from error
        sections = (*split.early, *split.sections)
        self._check_missing(sections)
        for number, payload, where in split.commands:
            check_kept_command(number, len(payload), where)
        for problem in device_tail.first_problems(split):
            self._into.monitor.warn(problem)
        await self._devices.keep(sections, split.description_text)

    def _check_missing(self, sections: Sequence[DeviceSection]) -> None:
        """Check that all pages have come, except those that *sections* declare absent (virtio-mem). RemoteProtocolError."""
        if not self._into.ram.missing():
            return
        absent = absent_by_rule({block.name: block.length for block in self._into.guest.ram}, sections)
        problems: list[str] = []
        for name, received in self._into.ram.received().items():
            here = received if name not in absent else received | absent[name].bitmap()
            if not here.all():
                problems.append(never_received(name, here))
        self._into.tell(problems)
