"""Handles the commands of the main stream before the guest arrives: the return path, PING, marks, and ADVISE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ...errors import RemoteProtocolError
from ...guest import PAGE_SIZE, LazyGuest, OpaqueGuest
from ...status import Stream
from ...wire import postcopy as wire_postcopy
from ...wire.constants import Command
from ...wire.marks import PING_MARK, PONG_MARK, Mark, is_mark, shown_reason
from ...wire.refusals import bitmaps_only, wrong_page_size
from ...wire.return_path import Attempt, Clock, Pong, SwitchoverAck, encode
from .. import guest_calls
from ..order import TRIMIG_PINGS
from ..outcome import source_ended
from .lazy import check_guest, open_memory

if TYPE_CHECKING:
    from ...wire import events as ev
    from .devices import IncomingDevices
    from .incoming import Incoming
    from .stream import IncomingStream


async def take_command(
    into: Incoming, stream: IncomingStream, devices: IncomingDevices, event: ev.CommandElement
) -> None:
    """Carry out a command. :class:`.stream.IncomingStream` has checked that it is legal at its place.

    Raises:
        RemoteProtocolError: its payload is not legal, or this destination cannot carry it out.
        GuestFailed: as :meth:`.devices.IncomingDevices.load`.
        PeerFailed: the source has ended the migration and sent the reason.

    **Cancellation:** the stream must be given up.
    """
    if is_mark(event.number):
        await _take_mark(into, stream, Mark(event.number), event.payload)
        return
    match event.number:
        case Command.OPEN_RETURN_PATH:
            await _open_return_path(into, stream)
        case Command.PING:
            await _answer_ping(into, stream, devices, event)
        case Command.POSTCOPY_ADVISE:
            await _take_advice(into, event)
        case Command.POSTCOPY_RAM_DISCARD:
            lengths = {block.name: block.length for block in into.guest.ram}
            into.ram.forget(wire_postcopy.decode_discard(event.payload, lengths, offset=event.at))
        case Command.SWITCHOVER_START | Command.PACKAGED:
            pass  # both only announce: SWITCHOVER_START the last pages, PACKAGED the package, which is the next element


async def _take_mark(into: Incoming, stream: IncomingStream, mark: Mark, payload: bytes) -> None:
    match mark:
        case Mark.REASON:
            raise source_ended(shown_reason(payload))
        case Mark.CLOCK:
            await stream.channel.send(encode(Clock(microseconds=round(trio.current_time() * 1e6))))
        case Mark.ATTEMPT:
            into.attempt = payload
            await stream.channel.send(encode(Attempt(id=payload)))


async def _open_return_path(into: Incoming, stream: IncomingStream) -> None:
    channel = stream.channel
    if into.opened:
        return
    into.opened, into.return_path = True, channel.sends
    if not channel.sends:
        into.monitor.warn("the source asks for answers, but this transport has no way back: it gets none")
    elif into.config.capabilities.switchover_ack:
        # No device here needs time before the switchover. So all acknowledgements that the source's machine type waits for
        # are sent at once. A source with the capability off fails on them; the stream does not show its capabilities.
        await channel.send(encode(SwitchoverAck()) * into.config.peer.switchover_acks)


async def _answer_ping(
    into: Incoming, stream: IncomingStream, devices: IncomingDevices, event: ev.CommandElement
) -> None:
    if not into.opened:
        raise RemoteProtocolError("PING without a return path to answer on", offset=event.at)
    value = int.from_bytes(event.payload)
    into.of_trimig = into.of_trimig or value >> 16 == TRIMIG_PINGS
    # A PING after the devices asks whether everything is loaded, so the devices are loaded before the answer. A PING in
    # front of the first device asks about the memory only.
    proof = stream.state is Stream.DEVICES and devices.begun
    if proof:
        await devices.load_all(stream)
    if not into.return_path:
        return
    await stream.channel.send(encode(Pong(value=value)))
    into.prepared = proof
    if value == PING_MARK and not into.marked:
        # The source is a trimig, and learns here that this side is one too. Without a return path neither side uses marks.
        await stream.channel.send(encode(Pong(value=PONG_MARK)))
        into.marked = True
        stream.accept_marks()


async def _take_advice(into: Incoming, event: ev.CommandElement) -> None:
    """The source announces a possible switch to postcopy: check now whether postcopy is possible here."""
    advice = wire_postcopy.decode_advise(event.payload, offset=event.at)
    if advice is None:
        raise bitmaps_only(event.at)
    if not into.monitor.config.capabilities.postcopy_ram:
        raise RemoteProtocolError(
            "the source announces postcopy, and the capability postcopy-ram is off at the destination: turn it on on both sides",
            offset=event.at,
        )
    if advice.target_page != PAGE_SIZE:
        raise wrong_page_size(advice.target_page, offset=event.at)
    # A parked guest accepts other host pages, because its memory is not used before all of it has come.
    if advice.page_sizes != PAGE_SIZE and not isinstance(into.guest, OpaqueGuest):
        raise RemoteProtocolError(
            f"the source has host pages of {advice.page_sizes:#x} bytes, at the destination they have {PAGE_SIZE:#x}",
            offset=event.at,
        )
    check_guest(into.guest)
    if isinstance(into.guest, LazyGuest):
        seconds = into.config.handover_timeout
        (await open_memory(into.guest, seconds)).close()
        await guest_calls.call("ending the watch", into.guest.memory_is_whole, seconds)
    if into.config.peer.preempt_pre_7_2:
        await into.preempt.wait()
