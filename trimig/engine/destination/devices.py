"""The devices of an incoming guest: their sections are collected, checked together, and loaded into the guest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import trio

from ...errors import RemoteProtocolError, TransportFailed
from ...guest import DeviceSection, OpaqueGuest
from ...wire import events as ev
from ...wire.constants import Section
from ...wire.devices import globalstate
from .. import device_tail, guest_calls
from ..ram.receiver import never_received
from .arriving import keep_ram
from .commands import take_command
from .section import section_of
from .tail import DESCRIPTION_SECONDS, IncomingTail

if TYPE_CHECKING:
    from .incoming import Incoming
    from .memory import Taken
    from .stream import IncomingStream


class IncomingDevices:
    """The received device sections. The run state is one of them.

    Attributes:
        run_state: the run state that the guest gets here.
    """

    def __init__(self, into: Incoming) -> None:
        self._into = into
        self._sections: list[DeviceSection] = []
        self._loaded = False
        self._seen = False
        self.run_state = "running"

    @property
    def begun(self) -> bool:
        """True if the first section has come, or if the guest has no devices."""
        return self._seen or not self._into.guest.devices

    async def take_section(
        self, stream: IncomingStream, header: ev.SectionHeader, *, before: Literal["list", "pages"] | None = None
    ) -> Sequence[DeviceSection]:
        """Read the section that *header* begins.

        Args:
            before: as in :attr:`trimig.guest.DeviceSection.before`.

        Returns:
            The section, if the guest is parked. Otherwise the section is kept for :meth:`load_all`.

        Raises:
            RemoteProtocolError: the guest has no such device.

        **Cancellation:** the stream must be given up.
        """
        event = await stream.next()
        assert isinstance(event, ev.DevicePayload)  # the decoder returns no other element after a header
        section = section_of(header, event)
        self._seen = True
        if isinstance(self._into.guest, OpaqueGuest):
            return (dataclasses.replace(section, before=before),)
        if header.idstr != globalstate.IDSTR:
            self._loaded = False
        self.take(section, event.at)
        return ()

    def take(self, section: DeviceSection, at: int = -1) -> None:
        """Keep *section*, which stands at byte *at*, for :meth:`load_all`. RemoteProtocolError."""
        if section.idstr != globalstate.IDSTR:
            self._sections.append(section)
        else:
            self._take_run_state(section, None if at < 0 else at)

    def _take_run_state(self, section: DeviceSection, at: int | None) -> None:
        try:
            self.run_state = globalstate.decode(section.payload, section.version_id)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, offset=at, section=section.idstr) from None

    async def load_all(self, stream: IncomingStream | None) -> None:
        """Check that memory and devices are complete, and load the devices into the guest, unless they are loaded.

        Args:
            stream: the stream that has brought all memory; None in postcopy, where memory follows.

        Raises:
            RemoteProtocolError: a page or a device is missing, and ``completeness`` demands all.
            GuestFailed: a device cannot be loaded.

        **Cancellation:** the devices are undefined.
        """
        if self._loaded:
            return
        self._check_complete(stream)
        loading = functools.partial(self._into.guest.load_devices, self._sections)
        await guest_calls.call("loading the devices", loading, self._into.config.handover_timeout)
        self._loaded = True

    def _check_complete(self, stream: IncomingStream | None) -> None:
        """Check that every page and every device has come. QEMU does not check that (states.md part 14, G18)."""
        problems: list[str] = []
        if stream is not None:
            stream.check_page_size()
            received = self._into.ram.received()
            problems += [never_received(name, here) for name, here in received.items() if not here.all()]
        have = {(s.idstr, s.instance_id) for s in self._sections}
        problems += [
            f"device {name!r} (instance {number}) was never received"
            for name, number in self._into.guest.devices or {}
            if (name, number) not in have
        ]
        self._into.tell(problems)

    def check_kept(self, sections: Sequence[DeviceSection]) -> None:
        """Check the run state among the devices of a parked guest, the only section that is decoded. RemoteProtocolError."""
        for section in sections:
            if section.idstr == globalstate.IDSTR:
                self._take_run_state(section, None)

    async def keep(self, sections: Sequence[DeviceSection], description: bytes | None = None) -> None:
        """Give a parked guest its device sections. GuestFailed, RemoteProtocolError.

        **Cancellation:** the devices are undefined.
        """
        assert isinstance(self._into.guest, OpaqueGuest)
        self.check_kept(sections)
        keeping = functools.partial(self._into.guest.load_opaque, sections, description)
        await guest_calls.call("keeping the devices", keeping, self._into.config.handover_timeout)


async def take_devices(into: Incoming, stream: IncomingStream, devices: IncomingDevices, taken: Taken) -> None:
    """Read up to the end of the stream, and load the devices. After this function this side owns the guest.

    Raises:
        RemoteProtocolError: a page or a device is missing, or an element is not legal.
        TransportFailed: the connection is lost.
        GuestFailed: the devices cannot be loaded.

    **Cancellation:** the devices are undefined.
    """
    event = taken.last
    while not isinstance(event, ev.EndOfStream | ev.TailBytes):
        match event:
            case ev.SectionHeader(kind=Section.FULL):
                await devices.take_section(stream, event)
            case ev.CommandElement():
                await take_command(into, stream, devices, event)
        event = await stream.next()
    if isinstance(event, ev.TailBytes):
        await _keep_tail(into, stream, devices, taken, event)
        return
    check_ended(into, taken, event.at)
    await devices.load_all(stream)
    await _read_description(into, stream)


def check_ended(into: Incoming, taken: Taken, at: int) -> None:
    """Check at the end of the stream, offset *at*, that the RAM has come to its end.

    Raises:
        RemoteProtocolError: the section END of the RAM is missing. No option accepts that, because the stream may have no
            memory at all. A parked guest is not checked: a background snapshot has no section END.
    """
    if not taken.ended and not isinstance(into.guest, OpaqueGuest):
        raise RemoteProtocolError("the guest has no end of its RAM: the section END did not come", offset=at)


async def _keep_tail(
    into: Incoming, stream: IncomingStream, devices: IncomingDevices, taken: Taken, event: ev.TailBytes
) -> None:
    """Read the devices of an unknown machine, and give them to the parked guest."""
    stream.check_page_size()
    await keep_ram(into, taken.storing)
    tail = IncomingTail(into, stream.channel, devices, event.at, taken.early)
    await tail.feed(event)
    while not tail.complete:
        match await stream.next(tail.last_wait):
            case ev.TailBytes() as more:
                await tail.feed(more)
            case None if stream.ended:
                await tail.take(ended=True)
                return
            case None:
                await tail.take_undescribed()
                return
    await tail.take(ended=False)


async def _read_description(into: Incoming, stream: IncomingStream) -> None:
    """Read the description after the end of file. A wrong text is an error.

    A missing or incomplete text is only a warning, because the decision has come before it.
    """
    if into.config.peer.suppress_vmdesc:
        return
    event: ev.Element | None = None
    with trio.move_on_after(DESCRIPTION_SECONDS) as limit:
        try:
            event = await stream.next()
        except TransportFailed:
            stream.decoder.receive_eof()
            event = stream.decoder.next_event()
    if limit.cancelled_caught:
        into.monitor.warn("the description behind the end of the stream did not come")
    elif isinstance(event, ev.DescriptionElement):
        if event.complete:
            await device_tail.check_description(event.text, event.at, into.config)
        else:
            into.monitor.warn("the connection ended inside the description; the guest was complete before it")
