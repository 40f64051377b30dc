"""The virtual link: trio's own stream checks, limits, and every kind of fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import (
    MockClock,
    assert_checkpoints,
    check_half_closeable_stream,
    check_two_way_stream,
    wait_all_tasks_blocked,
)

from trimig.testing import DribbleStream, Fault, FaultKind, Transfer, VirtualLink, VirtualListener, VirtualStream
from trimig.testing import virtual_link as make_virtual_link


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3000}, {"chunk": (1, 9000)}, {"latency": 0.01, "rate": 1e8}],
    ids=["plain", "window", "chunks", "slow"],
)
async def test_link_passes_the_stream_checks_of_trio(autojump_clock: MockClock, options: dict[str, float]) -> None:
    async def pair() -> tuple[VirtualStream, VirtualStream]:
        link = VirtualLink(seed=1, **options)  # type: ignore[arg-type]  # a table of options is not typed by name
        return link.a, link.b

    async def clogged() -> tuple[VirtualStream, VirtualStream]:
        ends = await pair()
        for end in ends:
            with trio.move_on_after(1000):
                while True:
                    await end.send_all(bytes(1000))
        return ends

    await check_two_way_stream(pair, clogged)
    await check_half_closeable_stream(pair, clogged)


async def test_dribble_stream_passes_the_half_close_check(autojump_clock: MockClock) -> None:
    async def pair() -> tuple[DribbleStream, DribbleStream]:
        a, b = make_virtual_link(window=100)
        return DribbleStream(a, send=4096, receive=4096), DribbleStream(b, send=4096, receive=4096)

    await check_half_closeable_stream(pair, None)


async def test_dribble_stream_moves_one_byte_at_a_time() -> None:
    link = VirtualLink()
    a, b = DribbleStream(link.a), DribbleStream(link.b)
    await a.send_all(b"abc")
    assert [t.n for t in link.log] == [1, 1, 1]
    assert [await b.receive_some(), await b.receive_some(10), await b.receive_some()] == [b"a", b"b", b"c"]


async def test_a_full_window_blocks_the_sender_until_the_peer_reads(autojump_clock: MockClock) -> None:
    link = VirtualLink(window=10)
    with trio.move_on_after(1) as scope:
        await link.a.send_all(bytes(11))
    assert scope.cancelled_caught
    assert (link.sent("a->b"), link.delivered("a->b")) == (10, 0)
    assert len(await link.b.receive_some()) == 10
    await link.a.send_all(b"!")
    assert await link.b.receive_some() == b"!"
    assert (link.sent("b->a"), link.delivered("a->b")) == (0, 11)


async def test_rate_and_latency_decide_when_the_last_byte_arrives(autojump_clock: MockClock) -> None:
    link = VirtualLink(rate=1000, latency=5, window=100_000)
    await link.a.send_all(bytes(10_000))
    await link.a.send_eof()
    assert trio.current_time() == 0
    first = await link.b.receive_some()
    assert len(first) == 4096
    assert trio.current_time() == pytest.approx(9.096)
    assert len(await read_all(link.b)) == 10_000 - 4096
    assert trio.current_time() == pytest.approx(15)


async def test_directions_share_neither_window_nor_rate(autojump_clock: MockClock) -> None:
    link = VirtualLink(window=4)
    await link.a.send_all(b"full")
    await link.b.send_all(b"over")
    assert (await link.a.receive_some(), await link.b.receive_some()) == (b"over", b"full")


async def chunks_of(seed: int) -> list[int]:
    link = VirtualLink(seed=seed, chunk=(2, 9))
    await link.a.send_all(bytes(200))
    await link.a.aclose()
    return [len(chunk) async for chunk in link.b]


async def test_chunk_sizes_come_from_the_seed_and_stay_within_their_bounds() -> None:
    sizes = await chunks_of(1)
    assert sum(sizes) == 200
    assert all(2 <= n <= 9 for n in sizes[:-1])
    assert sizes == await chunks_of(1) != await chunks_of(2)


async def test_log_and_record_hold_what_was_sent(autojump_clock: MockClock) -> None:
    link = VirtualLink(record=True)
    await link.a.send_all(b"one")
    await trio.sleep(2)
    await link.b.send_all(b"three")
    assert link.log == [Transfer(0.0, "a->b", 3), Transfer(2.0, "b->a", 5)]
    assert (link.recorded("a->b"), link.recorded("b->a")) == (b"one", b"three")
    with pytest.raises(ValueError, match="record=True"):
        VirtualLink().recorded("a->b")


@pytest.mark.parametrize("after", [0, 1, 5, 9, 10])
async def test_eof_fault_delivers_exactly_its_bytes_then_ends_both_ways(after: int) -> None:
    link = VirtualLink(faults=[Fault(direction="a->b", after=after, kind="eof")])
    if after:
        await link.b.send_all(b"answer")
    if after < 10:
        with pytest.raises(trio.BrokenResourceError):
            await link.a.send_all(bytes(range(10)))
    else:
        await link.a.send_all(bytes(range(10)))
    assert await read_all(link.b) == bytes(range(after))
    assert await read_all(link.a) == (b"answer" if after else b"")
    for end in (link.a, link.b):
        with pytest.raises(trio.BrokenResourceError):
            await end.send_all(b"more")
    assert [fault.after for fault in link.struck] == [after]


async def test_reset_fault_is_seen_on_both_sides_and_loses_the_answer() -> None:
    link = VirtualLink(faults=[Fault(direction="a->b", after=3, kind="reset")])
    await link.b.send_all(b"answer")
    with pytest.raises(trio.BrokenResourceError):
        await link.a.send_all(b"abcdef")
    assert await link.b.receive_some() == b"abc"
    for end in (link.a, link.b):
        with pytest.raises(trio.BrokenResourceError):
            await end.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await end.send_all(b"more")
    assert link.dropped("b->a") == 6


async def test_half_close_fault_leaves_the_way_back_whole() -> None:
    link = VirtualLink(faults=[Fault(direction="a->b", after=3, kind="half-close")])
    with pytest.raises(trio.BrokenResourceError):
        await link.a.send_all(b"abcdef")
    assert await read_all(link.b) == b"abc"
    await link.b.send_all(b"still here")
    assert await link.a.receive_some() == b"still here"


@pytest.mark.parametrize("kind", ["blackhole", "silence"])
async def test_swallowing_faults_fill_the_window_and_hide_the_close(autojump_clock: MockClock, kind: FaultKind) -> None:
    link = VirtualLink(window=8, faults=[Fault(direction="a->b", after=3, kind=kind)])
    with trio.move_on_after(1) as blocked:
        await link.a.send_all(bytes(100))
    assert blocked.cancelled_caught
    assert await link.b.receive_some() == bytes(3)
    await link.b.send_all(b"back")
    with trio.move_on_after(1) as back:
        assert await link.a.receive_some() == b"back"
    assert back.cancelled_caught == (kind == "blackhole")
    await link.a.aclose()
    with trio.move_on_after(1000) as silent:
        await link.b.receive_some()
    assert silent.cancelled_caught, "the news of the close must not arrive"
    await link.b.send_all(b"x")
    assert link.dropped("a->b") == link.sent("a->b") - 3 > 0


async def test_stall_fault_delays_only_what_comes_behind_it(autojump_clock: MockClock) -> None:
    link = VirtualLink(faults=[Fault(direction="a->b", after=3, kind="stall", seconds=60)])
    await link.a.send_all(b"abcdef")
    assert (await link.b.receive_some(), trio.current_time()) == (b"abc", 0)
    assert (await link.b.receive_some(), trio.current_time()) == (b"def", 60)


async def test_injected_fault_wakes_tasks_that_wait_on_either_end() -> None:
    link = VirtualLink(window=1)
    broken = []

    async def expect_broken(operation: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await operation()
        broken.append(operation)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_broken, partial(link.a.send_all, b"xyz"))
        nursery.start_soon(expect_broken, partial(link.a.receive_some, 10))
        await wait_all_tasks_blocked()
        link.inject("reset", "b->a")
    assert len(broken) == 2


@pytest.mark.parametrize("lossy", [False, True])
async def test_close_with_unread_bytes_resets_only_where_asked(lossy: bool) -> None:
    link = VirtualLink(reset_on_unread=lossy)
    await link.a.send_all(b"never read")
    await link.b.send_all(b"last words")
    await link.b.aclose()
    if lossy:
        with pytest.raises(trio.BrokenResourceError):
            await link.a.receive_some()
    else:
        assert await read_all(link.a) == b"last words"
    assert not link.closed
    await link.a.aclose()
    assert link.closed


def test_faults_and_links_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="kind"):
        Fault(direction="a->b", after=0, kind="gremlin")  # type: ignore[arg-type]  # the refusal is the test
    with pytest.raises(ValueError, match="direction"):
        Fault(direction="up", after=0, kind="eof")  # type: ignore[arg-type]  # the refusal is the test
    with pytest.raises(ValueError, match="byte 0"):
        Fault(direction="a->b", after=-1, kind="eof")
    with pytest.raises(ValueError, match="seconds"):
        Fault(direction="a->b", after=0, kind="stall")
    with pytest.raises(ValueError, match="window"):
        VirtualLink(window=0)
    with pytest.raises(ValueError, match="chunk"):
        VirtualLink(chunk=(3, 2))


async def test_a_fault_for_a_byte_that_has_passed_is_refused() -> None:
    link = VirtualLink()
    await link.a.send_all(b"abc")
    with pytest.raises(ValueError, match="passed"):
        link.add_fault(Fault(direction="a->b", after=2, kind="eof"))


async def test_listener_hands_out_links_in_order() -> None:
    listener = VirtualListener(partial(VirtualLink, window=5))
    with assert_checkpoints():
        client = await listener.connect()
    await client.send_all(b"hello")
    with assert_checkpoints():
        server = await listener.accept()
    assert await server.receive_some() == b"hello"
    assert [link.a for link in listener.links] == [client]


async def test_closed_listener_refuses_and_drops_what_was_not_accepted() -> None:
    listener = VirtualListener()
    client = await listener.connect()
    await listener.aclose()
    assert await client.receive_some() == b""
    with pytest.raises(ConnectionRefusedError):
        await listener.connect()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_closing_a_listener_wakes_a_waiting_accept() -> None:
    listener = VirtualListener()

    async def accept() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        await listener.aclose()
