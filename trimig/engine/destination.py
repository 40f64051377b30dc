"""The destination: reads the stream, fills the guest, and takes it over when the source has decided.

The decision is the end-of-file byte. Up to it the source may take everything back; whatever goes wrong here is told to
the source with SHUT 1 and raised, and this process lives on. From it on the guest is this side's: it is brought to
life (or safely to disk) in a bounded shield, and only then the source is told so with SHUT 0.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import uuid

import trio

from .. import blockers
from ..config import Config
from ..errors import MigrationCancelled, RemoteProtocolError, StateError, TransportFailed
from ..guest import ConfigSubsection, DeviceSection, Guest, IdentifiedGuest, OpaqueGuest
from ..info import Downtime, Summary
from ..monitor import Monitor
from ..status import Role, Status
from ..wire import Command, Decoder, Section, globalstate
from ..wire import description as json_text
from ..wire import events as ev
from ..wire.devices import TailBuffer, Undelimited, find_description, split_tail
from ..wire.return_path import Pong, Shut, encode
from . import guest_calls, teardown
from .boundary import Outcome, domain_error
from .channel import Channel, OpenStream
from .placement import ENOUGH
from .ram_in import RamReceiver
from .stream_out import UUID_SUBSECTION

log = logging.getLogger("trimig.destination")

#: How long the description may follow the decision before it is given up: it is only text about what has come.
DESCRIPTION_SECONDS = 2.0

#: Events handled before other tasks get a turn; one takes up to some tens of microseconds.
_SLICE_EVENTS = 32


async def receive_stream(guest: Guest, open_stream: OpenStream, config: Config, monitor: Monitor) -> Summary:
    """Fill *guest* from the stream that *open_stream* makes, and take it over.

    :func:`trimig.receive` is the public form and has the contract.

    **Cancellation:** up to the decision the source keeps its guest; behind it the call ends within
    ``teardown_grace`` and the guest is this side's.
    """
    guest.claim("an incoming migration")
    try:
        if guest.run_state == "running" and not isinstance(guest, OpaqueGuest):
            raise StateError(f"guest {guest.name!r} runs here: it cannot be filled with another one")
        blockers.check_incoming(guest)
        monitor.begin(Role.DESTINATION, config, guest)
        return await _Arrival(guest, config, monitor).run(open_stream)
    finally:
        guest.release()


class _Arrival:
    """One incoming migration."""

    def __init__(self, guest: Guest, config: Config, monitor: Monitor) -> None:
        self.guest = guest
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.channel: Channel | None = None
        self.return_path = False  # it was opened, and there is a way back
        self.opened = False  # the source has asked for answers
        self.confirmed = False
        self.prepared = False  # the source has asked for the proof that everything is loaded, and got it
        self.ram = RamReceiver(self.counters)
        self.sections: list[DeviceSection] = []
        self.header: ev.SectionHeader | None = None
        self.loaded = False
        self.ram_ended = False
        self.between = False  # the last that came was the end of a section
        self.run_state = "running"
        self.resume_seconds = 0.0
        self.configuration: ev.Configuration | None = None
        self.adopted = False

    # -- the frame -------------------------------------------------------------------------------------------------

    async def run(self, open_stream: OpenStream) -> Summary:
        """The whole attempt, and the one place where its outcome is decided."""
        outcome = Outcome()
        with outcome.watch():
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                self.monitor.control(functools.partial(_cancel, nursery), None)
                await self._read(open_stream)
        self.monitor.control(None, None)
        await self._unwind(outcome.failure)
        self._conclude(outcome.failure)
        return self._summary()

    async def _unwind(self, failure: BaseException | None) -> None:
        monitor = self.monitor
        ended = monitor.status is not Status.COMPLETED
        if ended and monitor.status is not Status.CANCELLING:
            real = domain_error(failure, monitor.owner) if failure is not None else None
            cancelled = real is None and monitor.status is not Status.HANDOVER
            monitor.advance(Status.CANCELLING if cancelled else Status.FAILED)
        monitor.listening()
        channel = self.channel
        if channel is None:
            return
        self.counters.transferred = channel.received
        try:
            if self.return_path:
                await self._answer(channel, Shut(status=1 if ended else 0))
        finally:
            await teardown.close(channel.stream, 0.0 if ended else self.config.teardown_grace)

    async def _answer(self, channel: Channel, answer: Shut) -> None:
        said = await teardown.farewell(channel, encode(answer), self.config.teardown_grace)
        if answer.status == 0:
            self.confirmed = said
            if not said:
                self.monitor.warn("the source could not be told that the guest has arrived: it will report it unknown")

    def _conclude(self, failure: BaseException | None) -> None:
        monitor = self.monitor
        if monitor.status is Status.COMPLETED:
            return  # a cancellation that came after the guest had arrived is too late
        error = domain_error(failure, monitor.owner) if failure is not None else None
        if monitor.status is Status.CANCELLING:
            monitor.advance(Status.CANCELLED)
            if error is None and monitor.cancel_reason is not None:
                error = MigrationCancelled(monitor.cancel_reason)
        if error is not None:
            self.counters.error = str(error)
            raise error
        assert failure is not None
        raise failure

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _read(self, open_stream: OpenStream) -> None:
        config, guest = self.config, self.guest
        stream = await open_stream()
        self.monitor.listening()
        channel = self.channel = Channel(stream, stall_timeout=config.stall_timeout)
        decoder = Decoder(
            measure=None if isinstance(guest, OpaqueGuest) else self._measure,
            configuration=config.peer.send_configuration,
            footers=config.peer.send_section_footer,
            description=not config.peer.suppress_vmdesc,
            max_device_bytes=config.max_device_bytes,
            max_description_bytes=config.max_description_bytes,
            reorder=True,
        )
        self.counters.setup_done = trio.current_time()
        await trio.lowlevel.checkpoint_if_cancelled()  # a cancel may have come since the last checkpoint
        self.monitor.advance(Status.ACTIVE)
        tail: TailBuffer | None = None
        tail_at = 0
        while True:
            handled = 0
            while (event := decoder.next_event()) is not None:
                handled += 1
                if handled % _SLICE_EVENTS == 0:
                    await trio.lowlevel.checkpoint()
                if isinstance(event, ev.TailBytes):
                    if tail is None:
                        tail = TailBuffer(footers=config.peer.send_section_footer, max_bytes=config.max_device_bytes)
                        tail_at = event.at
                        await self._ram_received()
                    await self._tail_bytes(tail, event)
                    if tail.complete:
                        await self._take_tail(tail, tail_at, ended=False)
                        return
                elif await self._handle(event, decoder):
                    return
            if await self.ram.place_run(channel, decoder):
                self.counters.transferred = channel.received
                continue
            run = decoder.open_run
            count = await channel.receive_into(
                decoder.writable(), stall_timeout=self._patience(), bulk=run is not None and run[2] >= ENOUGH
            )
            self.counters.transferred = channel.received
            if count:
                decoder.received(count)
                continue
            decoder.receive_eof()
            if tail is not None:
                await self._take_tail(tail, tail_at, ended=True)
                return

    def _patience(self) -> float | None:
        """How long the source may be silent now; None for the usual time.

        One that is held before the switchover sends nothing for as long as somebody likes. That is behind a section of
        RAM, and nowhere else.
        """
        held = self.between and not self.ram_ended and self.monitor.config.capabilities.pause_before_switchover
        return math.inf if held else None

    def _measure(self, idstr: str, instance_id: int, version_id: int, data: memoryview) -> int | None:
        if idstr == globalstate.IDSTR:
            return globalstate.measure(data, version_id)
        devices = self.guest.devices or {}
        device = devices.get((idstr, instance_id))
        if device is None:
            known = ", ".join(f"{name!r}" for name, _ in devices) or "none"
            raise RemoteProtocolError(f"unknown device {idstr!r} (instance {instance_id}); this guest has {known}")
        if version_id > device.version_id:
            raise RemoteProtocolError(
                f"device {idstr!r} has version {version_id} at the source, {device.version_id} is the newest known here"
            )
        return device.measure(data, version_id)

    async def _handle(self, event: ev.Event, decoder: Decoder) -> bool:
        """Take one event; True if the guest has been taken over and nothing more is to be read."""
        self.between = isinstance(event, ev.SectionFooter | ev.RamEnd)
        match event:
            case ev.PageRun():
                await self.ram.pages(event)
            case ev.ZeroRun():
                await self.ram.zeros(event)
            case ev.Configuration():
                self._configured(event)
            case ev.RamList():
                self._announced(event)
            case ev.SectionHeader(kind=Section.FULL):
                self.header = event
            case ev.SectionHeader(kind=Section.END):
                self.ram_ended = True
            case ev.DevicePayload():
                self._device(event)
            case ev.CommandElement():
                await self._command(event)
            case ev.EndOfStream():
                await self._end(event, decoder)
                return True
        return False

    def _configured(self, event: ev.Configuration) -> None:
        self.configuration = event
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
            self.monitor.warn(f"the stream is of the machine with the UUID {theirs}, this one has none to compare")
        elif ours != theirs:
            raise RemoteProtocolError(
                f"the stream is of the machine with the UUID {theirs}, this one has {ours}",
                offset=at,
                section="configuration",
            )

    def _announced(self, event: ev.RamList) -> None:
        if isinstance(self.guest, OpaqueGuest) and not self.adopted:
            self.adopted = True  # a second START repeats the list
            name = self.configuration.machine if self.configuration is not None else ""
            subsections = self.configuration.subsections if self.configuration is not None else ()
            with guest_calls.guarded("making the RAM blocks"):
                self.guest.adopt(name, subsections, event.blocks)
        self.ram.open(event, self.guest.ram)

    def _device(self, event: ev.DevicePayload) -> None:
        assert self.header is not None
        header = self.header
        if header.idstr == globalstate.IDSTR:
            try:
                self.run_state = globalstate.decode(event.payload, header.version_id)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(error.reason, offset=event.at, section=header.idstr) from None
            return
        self.loaded = False
        self.sections.append(
            DeviceSection(
                idstr=header.idstr,
                instance_id=header.instance_id,
                version_id=header.version_id,
                payload=event.payload,
                section_id=header.section_id,
            )
        )

    async def _command(self, event: ev.CommandElement) -> None:
        match event.number:
            case Command.OPEN_RETURN_PATH:
                self._open_return_path()
            case Command.PING:
                if not self.opened:
                    raise RemoteProtocolError("PING without a return path to answer on", offset=event.at)
                await self._pong(int.from_bytes(event.payload))
            case number:
                raise RemoteProtocolError(
                    f"command {Command(number).name} is not supported yet: postcopy and COLO are not built",
                    offset=event.at,
                )

    def _open_return_path(self) -> None:
        assert self.channel is not None
        if not self.opened and not self.channel.sends:
            self.monitor.warn("the source asks for answers, but this transport has no way back: it gets none")
        self.opened = True
        self.return_path = self.channel.sends

    async def _pong(self, value: int) -> None:
        # A PING behind the devices asks whether all of it is loaded, so that is what must be done first.
        if self.ram_ended and not self.loaded:
            self._complete()
            await self._load()
        assert self.channel is not None
        if self.return_path:
            await self.channel.send(encode(Pong(value=value)))
            self.prepared = self.ram_ended

    async def _load(self) -> None:
        loading = functools.partial(self.guest.load_devices, self.sections)
        await guest_calls.call("loading the devices", loading, self.config.handover_timeout)
        self.loaded = True

    def _complete(self) -> None:
        """What QEMU does not look at: that every page and every device has come (states.md part 14, G18)."""
        missing = self.ram.missing()
        problems = [f"{count} pages of RAM block {name!r} were never received" for name, count in missing.items()]
        have = {(s.idstr, s.instance_id) for s in self.sections}
        problems += [
            f"device {n!r} (instance {i}) was never received" for n, i in self.guest.devices or {} if (n, i) not in have
        ]
        self._problems(problems)

    def _problems(self, problems: list[str]) -> None:
        for problem in problems:
            if self.config.completeness == "fail":
                raise RemoteProtocolError(f'{problem} (the option completeness = "warn" accepts that)')
            self.monitor.warn(problem)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _end(self, event: ev.EndOfStream, decoder: Decoder) -> None:
        """The decision has been read: the guest is ours once everything about it is known to be right."""
        if not self.loaded:
            self._complete()
            await self._load()
        await self._description(decoder)
        await self._activate()

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
        if isinstance(event, ev.Description):
            if event.complete:
                json_text.parse(event.text, json_text.Limits(max_bytes=self.config.max_description_bytes))
            else:
                self.monitor.warn("the connection ended inside the description; the guest was complete before it")

    async def _activate(self) -> None:
        """Bring the guest to life here. On return the owner is this side."""
        monitor, grace = self.monitor, self.config.handover_timeout
        await trio.lowlevel.checkpoint_if_cancelled()
        monitor.advance(Status.HANDOVER)
        state = self.run_state
        if state == "running" and not monitor.config.autostart:
            state = "paused"
        began = trio.current_time()
        failure = await teardown.guest_call("brought to life", functools.partial(self.guest.activate, state), grace)
        if failure is not None:
            if not (state == "running" == self.guest.run_state):
                raise failure
            # Whatever the call said: a guest that runs must not be given back, or it would run twice.
            monitor.warn(f"{failure}; but it runs")
        self.resume_seconds = trio.current_time() - began
        if state == "running" and not isinstance(self.guest, OpaqueGuest):
            monitor.emit("RESUME")  # an opaque guest is kept, it does not run here
        monitor.advance(Status.COMPLETED)

    async def _tail_bytes(self, tail: TailBuffer, event: ev.TailBytes) -> None:
        """Devices of an unknown machine: they can be told apart only by the description at the very end."""
        tail.feed(event.data)
        if self.return_path and (value := tail.prepare_ping()) is not None:
            assert self.channel is not None
            await self.channel.send(encode(Pong(value=value)))
            self.prepared = True

    async def _ram_received(self) -> None:
        """The first device section: RAM is complete, and a guest that lives on disk can be written out already."""
        assert isinstance(self.guest, OpaqueGuest)
        self._problems([f"{n} pages of RAM block {b!r} were never received" for b, n in self.ram.missing().items()])
        with guest_calls.guarded("keeping the RAM"):
            await self.guest.ram_received()

    async def _take_tail(self, tail: TailBuffer, at: int, *, ended: bool) -> None:
        assert isinstance(self.guest, OpaqueGuest)
        data = tail.finish()
        try:
            split = split_tail(data, footers=self.config.peer.send_section_footer, offset=at)
        except Undelimited as error:
            if ended and find_description(data) is None:
                raise TransportFailed(
                    f"the stream ends at byte {at + len(data)}, before the guest was complete ({error.reason})"
                ) from error
            raise RemoteProtocolError(
                f"the devices cannot be told apart: {error.reason}", offset=error.offset, section=error.section
            ) from error
        for number, _, where in split.commands:
            if number not in (Command.OPEN_RETURN_PATH, Command.PING):
                raise RemoteProtocolError(f"command {number} between the devices is not supported", offset=where)
        for problem in split.problems:
            self.monitor.warn(problem)
        for section in split.sections:
            if section.idstr == globalstate.IDSTR:
                self.run_state = globalstate.decode(section.payload, section.version_id)
        keeping = functools.partial(self.guest.load_opaque, split.sections, split.description_text)
        await guest_calls.call("keeping the devices", keeping, self.config.handover_timeout)
        await self._activate()

    def _summary(self) -> Summary:
        c = self.counters
        for text in c.warnings:
            log.warning("%s", text)
        assert c.finished is not None
        parts = dataclasses.replace(Downtime(), resume=self.resume_seconds)
        return Summary(
            role=Role.DESTINATION,
            confirmed=self.confirmed,
            prepared=self.prepared,
            total_time=c.finished - c.started,
            setup_time=(c.setup_done or c.started) - c.started,
            downtime=parts.total,
            downtime_parts=parts,
            iterations=0,
            bytes_transferred=c.transferred,
            normal_pages=c.normal,
            zero_pages=c.duplicate,
            ram_bytes=c.total,
            dirty_tracking="",
            warnings=tuple(c.warnings),
        )


def _cancel(nursery: trio.Nursery, reason: str) -> None:
    nursery.cancel_scope.cancel(reason)
