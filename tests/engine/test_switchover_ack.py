"""The capability switchover-ack: a source switches over when its destination has said so, and not before."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable

import pytest
import trio

import trimig
from tests.engine.test_order import END, EOF, made
from tests.engine.test_postcopy_bad_input import ALL, HEAD, START, destination, devices, part
from tests.engine.test_recovery import told
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.engine.source import migrate_stream
from trimig.errors import ConfigError, RemoteProtocolError, TrimigError
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import FakeDevice, LazyScriptedGuest, ScriptedGuest, VirtualLink, virtual_link
from trimig.wire import encoder as wire
from trimig.wire.devices import description
from trimig.wire.return_path import Pong, ReturnPathDecoder, Shut, SwitchoverAck, encode


def config(*, here: bool, postcopy: bool = False, acks: bool = True, **options: object) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(switchover_ack=here, postcopy_ram=postcopy),
        parameters=trimig.Parameters(max_bandwidth=64 << 10),
        peer=dataclasses.replace(trimig.PeerProfile(), switchover_ack_legacy=acks),
        **options,  # type: ignore[arg-type]  # handed on as they are
    )


class Both:
    """Two sides over a virtual link."""

    def __init__(self, here: trimig.Config, there: trimig.Config) -> None:
        self.configs = here, there
        self.sender, self.taker = MonitorCore(), MonitorCore()
        self.source = ScriptedGuest(blocks={"ram": 64}, devices=[FakeDevice("clock", size=8)])
        self.target = LazyScriptedGuest(
            blocks={"ram": 64}, run_state="inmigrate", devices=[FakeDevice("clock", size=8)], touches=[63, 1]
        )
        self.errors: dict[str, TrimigError] = {}

    async def run(self) -> None:
        link = VirtualLink(latency=0.001)

        async def side(name: str, call: Callable[[], Awaitable[trimig.Summary]]) -> None:
            try:
                await call()
            except TrimigError as error:
                self.errors[name] = error

        async def opener(stream: trio.abc.Stream) -> trio.abc.Stream:
            await trio.lowlevel.checkpoint()
            return stream

        out, into = (Connections(first=functools.partial(opener, stream)) for stream in (link.a, link.b))
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                take = functools.partial(receive_stream, self.target, into, self.configs[1], self.taker)
                nursery.start_soon(side, "destination", take)
                send = functools.partial(migrate_stream, self.source, out, self.configs[0], self.sender)
                await side("source", send)


@pytest.mark.parametrize("acks", [True, False], ids=["up to 11.0", "from 11.1 on"])
@pytest.mark.parametrize("postcopy", [False, True])
async def test_on_on_both_sides(autojump_clock: trio.testing.MockClock, *, acks: bool, postcopy: bool) -> None:
    """One ACK, or none, as the machine type has it; by precopy and by postcopy."""
    each = config(here=True, postcopy=postcopy, acks=acks)
    both = Both(each, each)
    statuses = told(both.sender)
    if postcopy:
        both.sender.add_listener(lambda e: both.sender.start_postcopy() if e.data.get("status") == "setup" else None)
    await both.run()
    assert not both.errors
    assert both.target.digest() == both.source.digest()
    assert ("postcopy-active" in statuses) is postcopy


async def test_on_at_the_source_only_it_says_what_it_waits_for(autojump_clock: trio.testing.MockClock) -> None:
    """The guest runs on at the source; reason and advice are shown, and a bound ends it with them."""
    both = Both(config(here=True, max_total_time=60.0), config(here=False))
    seen: list[dict[str, object]] = []

    async def look() -> None:
        await both.sender.wait_status(Status.ACTIVE)
        await trio.sleep(5)
        seen.append(both.sender.info()["convergence"])
        assert both.source.running

    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await both.run()
    assert "no SWITCHOVER_ACK has come" in str(seen[0]["reason"])
    error = both.errors["source"]
    assert isinstance(error, trimig.NotConverging)
    assert "no SWITCHOVER_ACK has come" in str(error)
    assert "turn switchover-ack on at the destination" in str(error)
    assert both.source.running
    assert not both.target.executed


async def test_on_at_the_destination_only_it_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    """As by a QEMU 7.2; the sentence names the capability, and the guest runs on."""
    both = Both(config(here=False), config(here=True))
    await both.run()
    error = both.errors["source"]
    assert isinstance(error, RemoteProtocolError)
    assert "the capability switchover-ack is off here" in str(error)
    assert both.source.running


@pytest.mark.parametrize(
    ("machine", "count"),
    [
        ("pc-i440fx-7.2", 1),
        ("pc-q35-8.1", 1),
        ("pc-i440fx-10.0", 1),
        ("virt-11.0", 1),
        ("pc-i440fx-11.1", 0),
        ("pc-q35-12.0", 0),
        ("none", 1),
    ],
)
async def test_the_machine_type_decides_how_many(
    autojump_clock: trio.testing.MockClock, machine: str, count: int
) -> None:
    """Before PONG 1, also where the return path is asked for twice."""
    head = wire.file_header() + wire.configuration(machine, ()) + wire.command(1) + wire.command(1) + wire.ping(1)
    on = trimig.Config(capabilities=trimig.Capabilities(switchover_ack=True))
    async with made("parked") as target, destination(target, on) as there:
        peer = await there.connect()
        text = wire.description(description.build(4096, []))
        await peer.say(head + START + part(*ALL) + END + devices() + EOF + text)
        await peer.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)
    assert peer.heard == [SwitchoverAck()] * count + [Pong(value=1), Shut(status=0)]


async def test_a_destination_that_answers_nowhere_is_not_asked(autojump_clock: trio.testing.MockClock) -> None:
    """Without a return path there is nothing to say it on."""
    on = trimig.Config(capabilities=trimig.Capabilities(switchover_ack=True))
    async with made("parked") as target, destination(target, on) as there:
        peer = await there.connect()
        text = wire.description(description.build(4096, []))
        await peer.say(HEAD[: HEAD.index(wire.command(1))] + START + part(*ALL) + END + devices() + EOF + text)
        await peer.stream.send_eof()
        await peer.hear()
    assert isinstance(there.outcome, trimig.Summary)
    assert peer.heard == []
    ours, theirs = virtual_link()
    with pytest.raises(ConfigError, match="switchover-ack needs a return path"):
        await trimig.migrate(ScriptedGuest(blocks={"ram": 4}), OneWay(ours), config(here=True))
    await theirs.aclose()


class OneWay(trio.abc.SendStream):
    """One direction of a stream."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


def test_its_bytes() -> None:
    """A type and a length, and nothing else."""
    assert encode(SwitchoverAck()) == b"\0\x07\0\0"
    assert ReturnPathDecoder({}).feed(b"\0\x07\0\0") == [SwitchoverAck()]
    with pytest.raises(RemoteProtocolError, match="SWITCHOVER_ACK with 1 bytes of payload, expected 0"):
        ReturnPathDecoder({}).feed(b"\0\x07\0\x01\0")
