"""The destination: reads the stream, fills the guest, and takes it over when the source has decided.

The decision is the end-of-file byte. Up to it the source may take everything back; whatever goes wrong here is told to
the source with SHUT 1 and raised, and this process lives on. From it on the guest is this side's: it is brought to
life (or safely to disk) in a bounded shield, and only then the source is told so with SHUT 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import uuid
from typing import TYPE_CHECKING

import trio

from ...channel.channels import ChannelKind
from ...channel.first_bytes import judge_beside, judge_first, judge_surplus
from ...channel.reception import Reception
from ...errors import Owner, RemoteProtocolError, StateError, TransportFailed
from ...guest import (
    PAGE_SIZE,
    ConfigSubsection,
    DeviceSection,
    FramedGuest,
    Guest,
    IdentifiedGuest,
    LazyGuest,
    OpaqueGuest,
    StoringGuest,
)
from ...monitor import blockers
from ...owner import refusal
from ...status import Role, Status
from ...wire import events as ev
from ...wire import postcopy as wire_postcopy
from ...wire.constants import Command, Section
from ...wire.decoder import Decoder
from ...wire.devices import globalstate
from ...wire.marks import PING_MARK, PONG_MARK, Mark, is_mark, shown_reason
from ...wire.pages.size import wrong_page_size
from ...wire.refusals import bitmaps_only, command_name
from ...wire.return_path import Attempt, Clock, Pong, SwitchoverAck, encode
from .. import device_tail, guest_calls
from ..device_writer import UUID_SUBSECTION
from ..order import TRIMIG_PINGS, Place, check_place
from ..phase import phase
from ..ram.placement import ENOUGH
from ..ram.preempt_receiver import PreemptReceiver
from .arriving import Storing
from .incoming import Incoming
from .lazy import check_guest, open_memory
from .measure import measure_device
from .package import take_apart
from .postcopy import PostcopyDestination
from .tail import DESCRIPTION_SECONDS, IncomingTail, source_ended

if TYPE_CHECKING:
    from ...channel.connections import Connections
    from ...config.config import Config
    from ...monitor.core import MonitorCore
    from ...monitor.statistics import Summary
    from ...wire.postcopy import Runs

#: What may stand between the list of RAM blocks and the first pages.
_BEFORE_PAGES = (ev.RamEnd, ev.SectionFooter, ev.DevicePayload)

#: Events handled before other tasks get a turn; one takes up to some tens of microseconds.
_SLICE_EVENTS = 32


def _is_full(event: ev.Element) -> bool:
    return isinstance(event, ev.SectionHeader) and event.kind is Section.FULL


async def receive_stream(guest: Guest, connections: Connections, config: Config, monitor: MonitorCore) -> Summary:
    """Fill *guest* from the first of *connections*, and take it over.

    :func:`trimig.receive` is the public form and has the contract.

    **Cancellation:** up to the decision the source keeps its guest; behind it the call ends within
    ``teardown_grace`` and the guest is this side's.
    """
    guest.claim("an incoming migration")
    try:
        if guest.owner is Owner.UNKNOWN:
            raise refusal("be filled with another one", guest.owner)
        if guest.run_state == "running" and not isinstance(guest, OpaqueGuest):
            raise StateError(f"guest {guest.name!r} runs here: it cannot be filled with another one")
        blockers.check_incoming(guest)
        if config.capabilities.postcopy_ram:
            check_guest(guest)
        if isinstance(guest, StoringGuest):
            guest.check_store()
        monitor.begin(Role.DESTINATION, config, guest)
        blockers.lacks(guest, 0)
        return await _Arrival(guest, connections, config, monitor).run()
    finally:
        guest.release()


class _Arrival(Incoming):
    """One incoming migration: what is read, and in which order."""

    def __init__(self, guest: Guest, connections: Connections, config: Config, monitor: MonitorCore) -> None:
        super().__init__(guest, connections, config, monitor)
        self.header: ev.SectionHeader | None = None
        self.loaded = False
        self.between = False  # the last that came was the end of a section
        self.configuration: ev.Configuration | None = None
        self.announced: ev.RamList | None = None  # until what follows has told how the stream is written
        self.early: list[DeviceSection] = []  # of an unknown machine, in front of its memory
        self.tail: IncomingTail | None = None  # of an unknown machine
        self.adopted = False
        self.advised = False  # postcopy may follow
        self._ahead: PostcopyDestination | None = None
        self._decoder: Decoder | None = None

    async def _phases(self, nursery: trio.Nursery) -> None:
        config = self.config
        self._nursery = nursery
        reception = self.reception = Reception(self.connections, config, self.monitor, nursery)
        self.urgent = PreemptReceiver(reception, config, self.channels)
        with phase(self.monitor, "connect"):
            channel = self.channel = await reception.first(
                judge_first(config, self._acceptable), judge_beside if reception.wants_second else judge_surplus
            )
        self.channels.add(ChannelKind.MAIN, channel)
        self.monitor.listening()
        self.urgent.expect()
        decoder = self._decoder = self._make_decoder()
        self.counters.setup_done = trio.current_time()
        await trio.lowlevel.checkpoint_if_cancelled()  # of a cancel since the last checkpoint
        self.monitor.advance(Status.ACTIVE)
        while True:
            handled = 0
            while (event := decoder.next_event()) is not None:
                handled += 1
                if handled % _SLICE_EVENTS == 0:
                    await trio.lowlevel.checkpoint()
                if await self._handle(event, decoder):
                    return
            if self.storing is not None:
                await self.storing.wait_room()
            if await self.ram.place_run(channel, decoder):
                continue
            run = decoder.open_run
            count = None
            with trio.move_on_after(math.inf if self.tail is None else self.tail.last_wait):
                count = await channel.receive_into(
                    decoder.writable(), stall_timeout=self._patience(), bulk=run is not None and run[2] >= ENOUGH
                )
            if count is None:
                assert self.tail is not None
                await self.tail.take_undescribed()
                return
            if count:
                decoder.received(count)
                continue
            decoder.receive_eof()
            if self.tail is not None:
                await self.tail.take(ended=True)
                return

    def _make_decoder(self) -> Decoder:
        config, opaque = self.config, isinstance(self.guest, OpaqueGuest)
        return Decoder(
            measure=None if opaque else functools.partial(measure_device, self.guest),
            # What an unknown machine sends is seen from the stream; one that is known is asked for all that it must have.
            configuration=None if opaque or not config.peer.send_configuration else True,
            footers=None if opaque or not config.peer.send_section_footer else True,
            description=not config.peer.suppress_vmdesc,
            max_device_bytes=config.max_device_bytes,
            max_description_bytes=config.max_description_bytes,
            reorder=True,
        )

    def _patience(self) -> float | None:
        """How long the source may be silent now; None for the usual time.

        A source that is held before the switchover (pause-before-switchover) sends nothing for as long as its user likes,
        and only the source needs that capability, so nothing here tells whether it is held. It is behind a section of
        RAM, or a command behind one, and nowhere else. A host that is gone is noticed by the transport (keepalive).
        """
        return math.inf if self.between and not self.ram_ended else None

    async def _handle(self, event: ev.Element, decoder: Decoder) -> bool:
        """Take one event; True if the guest has been taken over and nothing more is to be read."""
        if self.announced is not None and not isinstance(event, _BEFORE_PAGES) and not _is_full(event):
            self._framed(decoder)
        if isinstance(event, ev.TailBytes):
            return await self._take_tail(event)
        # A command changes nothing: a source that is going to switch to postcopy sends a PING before it is held.
        if not isinstance(event, ev.CommandElement):
            self.between = isinstance(event, ev.SectionFooter | ev.RamEnd)
        match event:
            case ev.PageRun():
                assert self.reception is not None
                self.reception.settle()
                await self.ram.pages(event)
            case ev.ZeroRun():
                await self.ram.zeros(event)
            case ev.Configuration():
                self._configured(event)
            case ev.RamList():
                self.announced = event
            case ev.SectionHeader(kind=Section.FULL):
                self.header = event
            case ev.SectionHeader(kind=Section.END):
                self.ram_ended = True
            case ev.DevicePayload():
                self._device(event)
            case ev.CommandElement():
                await self._command(event)
            case ev.PackageElement():
                await self._follow(event, decoder)
                return True
            case ev.EndOfStream():
                await self._end(event, decoder)
                return True
        return False

    def _acceptable(self, event: ev.Configuration) -> None:
        """Look at the configuration of a connection that is not chosen yet. RemoteProtocolError if it does not fit."""
        before = self.config, self.configuration
        try:
            self._configured(event)
        finally:
            self.config, self.configuration = before

    def _configured(self, event: ev.Configuration) -> None:
        self.configuration = event
        opaque = isinstance(self.guest, OpaqueGuest)
        peer = self.config.peer.for_machine(event.machine if opaque else None, arriving=True)
        self.config = dataclasses.replace(self.config, peer=peer)
        if not isinstance(self.guest, OpaqueGuest) and event.machine != self.guest.name:
            raise RemoteProtocolError(
                f"the stream is of a machine {event.machine!r}, this one is {self.guest.name!r}",
                offset=event.at,
                section="configuration",
            )
        for subsection in event.subsections:
            if subsection.name == UUID_SUBSECTION:
                self._identified(subsection, event.at)

    def _identified(self, subsection: ConfigSubsection, at: int) -> None:
        """The source has named its machine's UUID: it must be ours, if we have one."""
        if isinstance(self.guest, OpaqueGuest):
            return  # it becomes whatever comes
        theirs = str(uuid.UUID(bytes=subsection.payload))
        ours = self.guest.uuid if isinstance(self.guest, IdentifiedGuest) else None
        if ours is None:
            warning = f"the stream is of the machine with the UUID {theirs}, this one has none to compare"
            if warning not in self.counters.warnings:  # the lobby has looked at the same section
                self.monitor.warn(warning)
        elif ours != theirs:
            raise RemoteProtocolError(
                f"the stream is of the machine with the UUID {theirs}, this one has {ours}",
                offset=at,
                section="configuration",
            )

    def _framed(self, decoder: Decoder) -> None:
        """What follows the first section has told how the stream is written; now the blocks can be made."""
        configuration, footers = decoder.configuration is not False, decoder.footers is not False
        peer = self.config.peer
        if (configuration, footers) != (peer.send_configuration, peer.send_section_footer):
            peer = dataclasses.replace(peer, send_configuration=configuration, send_section_footer=footers)
            self.config = dataclasses.replace(self.config, peer=peer)
        if isinstance(self.guest, FramedGuest):
            self.guest.framed(configuration=configuration, footers=footers, early=self.early)
        event, self.announced = self.announced, None
        if event is not None:
            self._announced(event)

    def _announced(self, event: ev.RamList) -> None:
        if isinstance(self.guest, OpaqueGuest) and not self.adopted:
            self.adopted = True  # a second START repeats the list
            name = self.configuration.machine if self.configuration is not None else ""
            subsections = self.configuration.subsections if self.configuration is not None else ()
            try:
                with guest_calls.guarded("making the RAM blocks"):
                    self.guest.adopt(name, subsections, event.blocks)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(error.reason, offset=event.at, section="ram") from None
        self.ram.open(event, self.guest.ram)
        if isinstance(self.guest, StoringGuest) and self.storing is None:
            self.storing = Storing(self.guest, self.ram.watch(), self.monitor)
            self._nursery.start_soon(self.storing.run, name="trimig.storing")

    def _device(self, event: ev.DevicePayload) -> None:
        assert self.header is not None
        header = self.header
        section = DeviceSection(
            idstr=header.idstr,
            instance_id=header.instance_id,
            version_id=header.version_id,
            payload=event.payload,
            section_id=header.section_id,
        )
        if isinstance(self.guest, OpaqueGuest):
            listed = self.announced is not None or self.ram.opened
            self.early.append(dataclasses.replace(section, before="pages" if listed else "list"))
            return
        if header.idstr != globalstate.IDSTR:
            self.loaded = False
        self.take(section, event.at)

    async def _command(self, event: ev.CommandElement) -> None:
        check_place(event.number, self._place, event.at)
        if is_mark(event.number):
            await self._mark(Mark(event.number), event.payload)
            return
        match event.number:
            case Command.OPEN_RETURN_PATH:
                await self._open_return_path()
            case Command.PING:
                if not self.opened:
                    raise RemoteProtocolError("PING without a return path to answer on", offset=event.at)
                value = int.from_bytes(event.payload)
                self.of_trimig = self.of_trimig or value >> 16 == TRIMIG_PINGS
                await self._pong(value)
                if value == PING_MARK:
                    await self._answer_mark()
            case Command.SWITCHOVER_START:
                pass  # the last pages are next; early or repeated, it means nothing (newer.md part 2)
            case Command.POSTCOPY_ADVISE:
                await self._advise(event)
            case Command.POSTCOPY_RAM_DISCARD | Command.PACKAGED if not self.advised:
                raise RemoteProtocolError(
                    f"command {command_name(event.number)}, and the source has not announced postcopy", offset=event.at
                )
            case Command.POSTCOPY_RAM_DISCARD:
                lengths = {block.name: block.length for block in self.guest.ram}
                self.ram.forget(wire_postcopy.decode_discard(event.payload, lengths, offset=event.at))

    async def _answer_mark(self) -> None:
        """The source is a trimig: so is this side. Without a way back it is not told, and says nothing of it either."""
        if self.return_path and not self.marked:
            assert self.channel is not None
            assert self._decoder is not None
            await self.channel.send(encode(Pong(value=PONG_MARK)))
            self.marked = self._decoder.marks = True

    async def _mark(self, mark: Mark, payload: bytes) -> None:
        assert self.channel is not None
        match mark:
            case Mark.REASON:
                raise source_ended(shown_reason(payload))
            case Mark.CLOCK:
                await self.channel.send(encode(Clock(microseconds=round(trio.current_time() * 1e6))))
            case Mark.ATTEMPT:
                self.attempt = payload
                await self.channel.send(encode(Attempt(id=payload)))

    @property
    def _place(self) -> Place:
        if not self.ram.opened:
            return Place.HEAD
        return Place.DEVICES if self.ram_ended else Place.RAM

    async def _advise(self, event: ev.CommandElement) -> None:
        """The source may switch to postcopy: better to find out now whether that is possible here."""
        advice = wire_postcopy.decode_advise(event.payload, offset=event.at)
        if self.advised:
            raise RemoteProtocolError("POSTCOPY_ADVISE a second time", offset=event.at)
        if advice is None:
            raise bitmaps_only(event.at)
        if not self.monitor.config.capabilities.postcopy_ram:
            raise RemoteProtocolError(
                "the source announces postcopy, and the capability postcopy-ram is off here: turn it on on both sides",
                offset=event.at,
            )
        # A guest that is only kept takes the pages as they come: no host page is looked at before it is whole.
        fits = advice.page_sizes == PAGE_SIZE or isinstance(self.guest, OpaqueGuest)
        if advice.target_page != PAGE_SIZE:
            raise wrong_page_size(advice.target_page, offset=event.at)
        if not fits:
            raise RemoteProtocolError(
                f"the source has host pages of {advice.page_sizes:#x} bytes, here they have {PAGE_SIZE:#x}",
                offset=event.at,
            )
        check_guest(self.guest)
        if isinstance(self.guest, LazyGuest):
            seconds = self.config.handover_timeout
            (await open_memory(self.guest, seconds)).close()
            await guest_calls.call("ending the watch", self.guest.memory_is_whole, seconds)
        if self.config.peer.preempt_pre_7_2:
            assert self.urgent is not None
            await self.urgent.wait()
        self.advised = True

    async def _follow(self, event: ev.PackageElement, decoder: Decoder) -> None:
        """The guest comes before its memory."""
        assert self.channel is not None
        footers = self.config.peer.send_section_footer
        measure = None if isinstance(self.guest, OpaqueGuest) else functools.partial(measure_device, self.guest)
        package = await take_apart(event, decoder, measure, footers=footers)
        assert self.urgent is not None
        await self.urgent.wait()
        self._ahead = PostcopyDestination(self, self._nursery, self.channel, decoder, self.urgent)
        with phase(self.monitor, "follow"):
            await self._ahead.run(package)

    def whole(self) -> bool:
        return self._ahead is not None and self._ahead.whole

    async def _stand_still(self) -> dict[str, Runs]:
        if self._ahead is None:
            return {}
        missing = self._ahead.missing()
        await self._ahead.end()
        return missing

    async def _open_return_path(self) -> None:
        assert self.channel is not None
        if not self.opened and not self.channel.sends:
            self.monitor.warn("the source asks for answers, but this transport has no way back: it gets none")
        first, self.opened = not self.opened, True
        self.return_path = self.channel.sends
        if first and self.return_path and self.config.capabilities.switchover_ack:
            # No device here asks for more time, so all that the source's machine type waits for is said at once. A source
            # that has the capability off refuses it, and nothing in the stream shows that.
            await self.channel.send(encode(SwitchoverAck()) * self.config.peer.switchover_acks)

    async def _pong(self, value: int) -> None:
        # A PING behind the devices asks whether all of it is loaded, so that is what must be done first.
        # Before the first device it asks about the memory only.
        begun = self.ram_ended and (self.header is not None or not self.guest.devices)
        if begun and not self.loaded:
            self.check_complete()
            await self.load()
            self.loaded = True
        assert self.channel is not None
        if self.return_path:
            await self.channel.send(encode(Pong(value=value)))
            self.prepared = begun

    async def _end(self, event: ev.EndOfStream, decoder: Decoder) -> None:
        """The decision has been read: the guest is ours once everything about it is known to be right."""
        self.check_ended(event.at)
        if not self.loaded:
            self.check_complete()
            await self.load()
            self.loaded = True
        await self._description(decoder)
        await self.activate()

    async def _description(self, decoder: Decoder) -> None:
        """Read the text behind the end of file. A bad one is an error; one that stops coming is not: the decision came."""
        assert self.channel is not None
        if self.config.peer.suppress_vmdesc:
            return
        with trio.move_on_after(DESCRIPTION_SECONDS) as limit:
            while (event := decoder.next_event()) is None:
                try:
                    count = await self.channel.receive_into(decoder.writable())
                except TransportFailed:
                    count = 0
                decoder.received(count)
                if not count:
                    decoder.receive_eof()
        if limit.cancelled_caught:
            self.monitor.warn("the description behind the end of the stream did not come")
            return
        if isinstance(event, ev.DescriptionElement):
            if event.complete:
                await device_tail.check_description(event.text, self.config)
            else:
                self.monitor.warn("the connection ended inside the description; the guest was complete before it")

    async def _take_tail(self, event: ev.TailBytes) -> bool:
        """Take devices of an unknown machine; True if these were the last."""
        if self.tail is None:
            self.tail = IncomingTail(self, event.at, self.early)
            await self._ram_received(event.at)
        await self.tail.feed(event)
        if self.tail.complete:
            await self.tail.take(ended=False)
        return self.tail.complete

    async def _ram_received(self, at: int) -> None:
        """The first device section: RAM is complete, and a guest that lives on disk can be written out already."""
        assert isinstance(self.guest, OpaqueGuest)
        self.check_ended(at)
        self._check_page_size()
        await self.ram_received()

    def _check_page_size(self) -> None:
        """Pages of another size are not taken for memory with holes. Unsupported."""
        if self._decoder is not None and (size := self._decoder.page_size) is not None:
            raise wrong_page_size(size, section="ram")

    def check_complete(self, *, ram: bool = True) -> None:
        """As in the frame; pages of another size are told first."""
        if ram:
            self._check_page_size()
        super().check_complete(ram=ram)
