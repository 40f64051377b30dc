"""The data channels of multifd at the destination: how they are found, and how they keep step with the main connection.

A page may come again in a later pass, on another channel. So all channels stop at their packets with SYNC. The main
connection says where: at each end of a RAM section (as machine types up to 8.0 do), or at a mark (from 8.1 on). The first
section shows which of the two it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from ... import formats
from ...channel.channel import Channel
from ...channel.channels import MULTIFD
from ...channel.first_bytes import judge_data
from ...errors import RemoteProtocolError, TransportFailed
from ...wire.pages.multifd import PacketFlag, read_hello
from .multifd_channel import DataChannel

if TYPE_CHECKING:
    from ...channel.channels import Beside, Channels
    from ...channel.lobby import Chosen, Judge, Lobby
    from ...channel.reception import Reception
    from ...config.config import Config
    from ...config.peer import PeerProfile
    from ...monitor.statistics import Counters
    from ...wire.pages.multifd import Packet
    from .receiver import RamReceiver

#: Seconds without a further data channel after which those that lack do not come any more. A source opens all of them
#: with the main connection.
_LACKING_SECONDS: Final = 5.0
#: The same while a connection is in its handshake of TLS or of a websocket.
_HANDSHAKE_SECONDS: Final = 30.0
#: Seconds in which the main connection may say why a data channel has ended.
_REASON_SECONDS: Final = 1.0

_COMPRESSION: Final = {"none": 0, "zlib": int(PacketFlag.ZLIB), "zstd": int(PacketFlag.ZSTD)}
_NO_UUID: Final = bytes(16)


async def _always_room() -> None:
    await trio.lowlevel.checkpoint()


class MultifdReceiver:
    """The data channels of one attempt. Without the capability its methods do nothing.

    Args:
        ram: takes the pages.
        machine: the UUID of the guest's machine, 16 bytes; None if it has none or is not known.
    """

    def __init__(
        self,
        reception: Reception,
        config: Config,
        channels: Channels,
        ram: RamReceiver,
        counters: Counters,
        machine: bytes | None,
    ) -> None:
        self._reception = reception
        self._channels = channels
        self._ram = ram
        self._counters = counters
        self._stall_timeout = config.stall_timeout
        self._compression = config.parameters.multifd_compression
        self._beside: Beside | None = next((b for b in reception.beside if b.kind == MULTIFD), None)
        self._machine = machine
        #: The UUID in the hello of a channel that was taken; None before.
        self._said: bytes | None = None
        self._open: dict[int, DataChannel] = {}
        #: All channels are there.
        self._complete = trio.Event()
        self._blocks: Mapping[str, int] = {}
        self._profile: PeerProfile = config.peer
        #: The list of blocks has come: packets may be read.
        self._known = trio.Event()
        #: The blocks have memory: pages may be placed.
        self._placing = trio.Event()
        self._wait_room: Callable[[], Awaitable[None]] = _always_room
        #: Each end of a section synchronises; None before the first section has shown it.
        self._by_section: bool | None = None
        #: The first section has ended, or has its mark: the first packets with SYNC are passed.
        self._begun = trio.Event()
        #: Numbers of the channels that stand behind their packet with SYNC.
        self._arrived: set[int] = set()
        #: Numbers of the channels that have ended.
        self._ended: set[int] = set()
        self._news = trio.Event()
        self._release = trio.Event()
        self._finished = False
        self._nursery: trio.Nursery | None = None
        #: Why the attempt fails, within _REASON_SECONDS; None if it does not.
        self._broken: TransportFailed | None = None
        #: Around the tasks that place pages.
        self._scopes: list[trio.CancelScope] = []
        #: Number of the tasks that may place a page.
        self._running = 0

    @property
    def wanted(self) -> bool:
        """There are to be data channels."""
        return self._beside is not None

    @property
    def _count(self) -> int:
        return self._beside.count if self._beside is not None else 0

    @property
    def machine(self) -> str | None:
        """The UUID that the data channels have said, in its usual form; None if they have said none."""
        return None if self._said in (None, _NO_UUID) else str(uuid.UUID(bytes=self._said))

    # -- how they are found --------------------------------------------------------------------------------------------

    def expect(self, nursery: trio.Nursery) -> None:
        """The main connection is there: the data channels may come, and are read in *nursery*."""
        self._nursery = nursery
        if self.wanted:
            nursery.start_soon(self._gather, nursery, name="trimig.data_channels")

    async def _gather(self, nursery: trio.Nursery) -> None:
        lobby = self._reception.lobby
        assert lobby is not None, "Connections.check_beside has refused it"
        others = any(wanted.kind != MULTIFD for wanted in self._reception.beside)
        judge = self._reception.watching(judge_data(self._check_hello, others=others))
        while len(self._open) < self._count:
            chosen = await self._next(lobby, judge)
            channel = Channel(chosen.stream, stall_timeout=self._stall_timeout, first=chosen.first)
            self._channels.add(MULTIFD, channel)
            hello = read_hello(chosen.first[:64], channels=self._count)
            compression = _COMPRESSION[self._compression]
            data = DataChannel(hello.number, channel, self._ram, self._counters, compression)
            self._open[hello.number] = data
            self._counters.data_channels += 1
            self._running += 1
            nursery.start_soon(self._run, data, name=f"trimig.{data.name}")
        self._complete.set()
        self._reception.complete(MULTIFD)
        lobby.watch(judge)  # a further one shows that the source has more of them

    async def _next(self, lobby: Lobby, judge: Judge) -> Chosen:
        """The next data channel. TransportFailed: none has come for ``_LACKING_SECONDS``."""
        began = trio.current_time()
        while True:
            with trio.move_on_after(_LACKING_SECONDS):
                return await lobby.choose(judge)
            waited = trio.current_time() - began
            if not lobby.handshaking or waited >= _HANDSHAKE_SECONDS:
                reason = lobby.last_reason
                # The error has the hint anyway.
                told = reason is None or self._reception.hint() is not None
                dropped = "" if told else f"; the last connection that was refused: {reason}"
                raise TransportFailed(f"{self._lacking(waited)}{dropped}")

    def _check_hello(self, data: bytes) -> None:
        hello = read_hello(data, channels=self._count)
        if hello.number in self._open:
            raise RemoteProtocolError(f"data channel {hello.number} is there already", offset=24, section="multifd")
        if self._machine is not None and hello.uuid != self._machine:
            raise RemoteProtocolError(
                f"the data channel is of the machine with {_named(hello.uuid)}, this one has {_named(self._machine)}",
                offset=8,
                section="multifd",
            )
        self._machine = self._said = hello.uuid

    def _lacking(self, seconds: float) -> str:
        have, count = len(self._open), self._count
        waited = formats.duration(round(seconds))
        if not have:
            return (
                f"no data channel has come for {waited}: the capability multifd is on here, and it may be off at the source: "
                "turn it on there, or turn multifd off here"
            )
        lacking = ", ".join(str(number) for number in range(count) if number not in self._open)
        return (
            f"{have} of {count} data channels have come, and no further one for {waited} (these are missing: {lacking}): set "
            "multifd-channels to the same number at both sides"
        )

    def identify(self, machine: bytes, at: int) -> None:
        """The stream names the UUID of its machine.

        Args:
            machine: 16 bytes.
            at: offset of the element that names it.

        Raises:
            RemoteProtocolError: the data channels are of another machine.
        """
        if not self.wanted:
            return
        if self._said not in (None, machine):
            raise RemoteProtocolError(
                f"the stream is of the machine with {_named(machine)}, and its data channels are of that with "
                f"{_named(self._said or _NO_UUID)}",
                offset=at,
                section="configuration",
            )
        self._machine = machine

    # -- what they bring -----------------------------------------------------------------------------------------------

    def know(self, blocks: Mapping[str, int], profile: PeerProfile) -> None:
        """The list of blocks has come: packets are read from now on.

        Args:
            blocks: used length in bytes, by name.
            profile: of the source, as far as the stream has shown it.
        """
        self._blocks, self._profile = blocks, profile
        self._known.set()

    def admit_pages(self, wait_room: Callable[[], Awaitable[None]] | None) -> None:
        """The blocks have memory: pages are placed from now on.

        Args:
            wait_room: waits while too many pages have come that the guest has not written to its file; None for no wait.
        """
        if wait_room is not None:
            self._wait_room = wait_room
        self._placing.set()

    async def _run(self, data: DataChannel) -> None:
        scope = trio.CancelScope()
        self._scopes.append(scope)
        try:
            with scope:
                await self._read(data)
        except TransportFailed as error:
            if not self._finished:  # a source may end in many ways when it has sent everything
                text = str(error)
                self._break(text if text.startswith(data.name) else f"{data.name}: {text}")
            return
        finally:
            self._running -= 1
            self._tell()
        await data.drain()

    def _break(self, why: str) -> None:
        """Fail in a moment. Until then the main connection may say more: nothing waits for the data channels any more."""
        if self._broken is None and self._nursery is not None:
            self._broken = TransportFailed(why)
            self._nursery.start_soon(self._fail, self._broken, name="trimig.data_channels.broken")
            self._tell()

    async def _fail(self, failure: TransportFailed) -> None:
        await trio.sleep(_REASON_SECONDS)
        raise failure

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise self._broken

    async def _read(self, data: DataChannel) -> None:
        await data.skip_hello()
        await self._known.wait()
        data.expect(self._blocks)
        while (packet := await data.next()) is not None:
            if len(packet.offsets) or len(packet.zeros):
                await self._take(data, packet)
            if packet.sync:
                await self._stop_at(data)
        self._ended.add(data.number)
        self._tell()

    async def _take(self, data: DataChannel, packet: Packet) -> None:
        def check() -> None:
            problem = None
            if not data.begun:
                problem = "pages in front of the first synchronisation"
            elif self._finished:
                problem = "pages behind the last synchronisation"
            if problem is not None:
                raise RemoteProtocolError(f"{data.name}: {problem}", offset=data.at, section="multifd")

        check()
        await self._placing.wait()
        # A guest that writes itself out while it arrives gets room packet by packet.
        await data.place(packet, check if self._wait_room is _always_room else None)
        await self._wait_room()

    async def _stop_at(self, data: DataChannel) -> None:
        """Wait behind a packet with SYNC until the main connection has come to the same place.

        In front of the first one there are no pages. So a channel passes it without the others.
        """
        if not data.begun:
            await self._begun.wait()
            data.begin(self._blocks, zero_pages=not self._by_section)
            return
        release = self._release
        self._arrived.add(data.number)
        self._tell()
        await release.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # -- the main connection -------------------------------------------------------------------------------------------

    def check_main_page(self, at: int) -> None:
        """The main connection brings a page with content.

        Args:
            at: its offset.

        Raises:
            RemoteProtocolError: no data channel has come, so the source has not the capability.
        """
        if self.wanted and not self._open:
            raise RemoteProtocolError(
                "a page has come on the main connection, and no data channel: the capability multifd is on here and off "
                "at the source: turn it on there, or turn multifd off here",
                offset=at,
                section="ram",
            )

    async def section_ended(self, at: int) -> None:
        """A RAM section has ended on the main connection; see :meth:`synchronise`.

        Args:
            at: offset of the end word.
        """
        if not self.wanted:
            return
        if self._by_section is None:
            if self._profile.multifd_scheme != "7.2":
                raise RemoteProtocolError(
                    "the data channels are synchronised as by a machine type up to 8.0, and the peer profile here is "
                    f"{self._profile.name!r}: set the same profile at both sides",
                    offset=at,
                    section="ram",
                )
            self._by_section = True
            self._begun.set()
        elif self._by_section:
            await self._synchronise(at)

    async def mark(self, at: int) -> None:
        """The main connection has a synchronisation mark.

        Args:
            at: its offset.

        Raises:
            RemoteProtocolError: in this stream the ends of the sections synchronise.
            TransportFailed: a channel has ended, or does not come to its packet with SYNC.

        **Cancellation:** no effect.
        """
        if self._by_section:
            raise RemoteProtocolError(
                "a synchronisation mark, in a stream whose first section had none", offset=at, section="ram"
            )
        if self._by_section is None:
            self._by_section = False
            self._begun.set()
        else:
            await self._synchronise(at)

    async def _synchronise(self, at: int) -> None:
        self._check_whole()
        await self._complete.wait()
        while len(self._arrived) < self._count:
            if gone := sorted(self._ended - self._arrived):
                data = self._open[gone[0]]
                self._break(
                    f"{data.name} has ended at byte {data.at}, and its synchronisation has not come (byte {at} of the main "
                    "connection waits for it)"
                )
            if self._broken is not None:
                return  # a source that was cancelled says so behind the end of this section
            await self._wait_news(at)
        self._arrived.clear()
        for data in self._open.values():
            data.synchronised()
        release, self._release = self._release, trio.Event()
        release.set()
        if self._reception.hint() is None:  # otherwise the source may have channels that were dropped here
            self._reception.settle()

    async def _wait_news(self, at: int) -> None:
        """Wait until a channel arrives or ends. TransportFailed: none has moved for ``stall_timeout``."""
        news = self._news
        while True:
            before = sum(data.channel.received for data in self._open.values())
            with trio.move_on_after(self._stall_timeout):
                await news.wait()
                return
            if before == sum(data.channel.received for data in self._open.values()):
                lacking = ", ".join(str(number) for number in self._open if number not in self._arrived)
                raise TransportFailed(
                    f"the synchronisation of data channel {lacking} has not come for {formats.duration(self._stall_timeout)} "
                    f"(byte {at} of the main connection waits for it)"
                )

    async def finish(self, *, drain: bool) -> None:
        """The RAM has ended, or a package has come: no page follows on the data channels.

        Args:
            drain: ignore what they bring from now on.

        Raises:
            RemoteProtocolError: a channel has brought pages behind its last synchronisation.
            TransportFailed: a channel broke.

        **Cancellation:** the channels must be given up.
        """
        if not self.wanted:
            return
        self._check_whole()
        self._finished = True
        await self._complete.wait()
        for data in self._open.values():
            if data.pages:
                raise RemoteProtocolError(
                    f"{data.name}: pages behind the last synchronisation", offset=data.at, section="multifd"
                )
        self._reception.settle()  # from here on a source may be silent for any time
        if drain:
            await self.stop()

    async def stop(self) -> None:
        """Place nothing more. What the channels still bring is read and dropped.

        **Cancellation:** a channel may still place pages.
        """
        for scope in self._scopes:
            scope.cancel("the pages have come")
        while self._running:
            await self._news.wait()


def _named(machine: bytes) -> str:
    return "no UUID" if machine == _NO_UUID else f"the UUID {uuid.UUID(bytes=machine)}"
