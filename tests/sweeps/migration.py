"""One small migration between two scripted guests, and every rule that must hold after it, whatever was injected."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import trio

import trimig
from trimig.status import TERMINAL, Status
from trimig.testing import (
    Calls,
    End,
    FailingGuest,
    FailingStream,
    FakeDevice,
    OwnerReferee,
    Scenario,
    ScriptedGuest,
    SweepContext,
    VirtualLink,
)
from trimig.wire.constants import ReturnPath

# Short, so that few windows of the limiter pass while a run waits for a peer that will not answer.
HANDOVER_TIMEOUT = 2.0
TEARDOWN_GRACE = 1.0
STALL_TIMEOUT = 4.0
#: Virtual seconds until a dead host is noticed: a source may be silent for any time before its switchover.
KEEPALIVE = 60.0
#: Seconds in pre-switchover, if the migration is held.
HELD = 0.5

Outcome = tuple[str, str, str]


def make_config(
    *, return_path: bool = True, description: bool = True, hold: bool = False, xbzrle: bool = False
) -> trimig.Config:
    """Limits that virtual time makes short; no bandwidth limit."""
    return trimig.Config(
        capabilities=trimig.Capabilities(return_path=return_path, pause_before_switchover=hold, xbzrle=xbzrle),
        parameters=trimig.Parameters(max_bandwidth=0),
        peer=dataclasses.replace(trimig.PeerProfile(), suppress_vmdesc=not description),
        handover_timeout=HANDOVER_TIMEOUT,
        teardown_grace=TEARDOWN_GRACE,
        stall_timeout=STALL_TIMEOUT,
        max_iterations=8,
        on_bound="switchover",
    )


def make_guests(
    seed: int, *, pages: int, content: Literal["zero", "random", "mixed"], dirty: int, run_state: str
) -> tuple[ScriptedGuest, ScriptedGuest]:
    """The properties of a source and of its migration."""
    source = ScriptedGuest(
        blocks={"ram": pages},
        content=content,
        seed=seed,
        dirty_per_sync=dirty,
        working_set=1,
        devices=[FakeDevice("clock", size=8, seed=seed)],
        run_state=run_state,
    )
    target = ScriptedGuest(
        blocks={"ram": pages},
        content="random",
        seed=seed + 99,
        devices=[FakeDevice("clock", size=8)],
        run_state="inmigrate",
    )
    return source, target


class Watched(trimig.Monitor):
    """A monitor that records how much had been sent when the transport got the commit."""

    def __init__(self, link: VirtualLink) -> None:
        super().__init__()
        self._link = link
        self.decided_at: int | None = None
        self.held_at: int | None = None
        self.add_listener(self._heard)

    def _heard(self, event: trimig.Event) -> None:
        if event.name != "MIGRATION":
            return
        new = Status(event.data["status"])
        if new is Status.HANDOVER:
            self.decided_at = self._link.sent("a->b")
        if new is Status.SETUP:
            self.held_at = None  # another attempt, over another link
        if new is Status.PRE_SWITCHOVER:
            self.held_at = self._link.sent("a->b")
            # A system task, because a cancel of a side would end the side's own task; it ends after HELD seconds in any
            # case.
            trio.lowlevel.spawn_system_task(self._go_on)
        if new is Status.DEVICE and self.held_at is not None:
            assert self._link.sent("a->b") == self.held_at, "something was sent while it was held"

    async def _go_on(self) -> None:
        await trio.sleep(HELD)
        if self.status is Status.PRE_SWITCHOVER:
            self.resume()


class NotingStream(trio.abc.HalfCloseableStream):
    """Passes everything on, and records the sent bytes, and whether a send ever ended in an error or a cancellation."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self.cut = False
        #: All bytes to be sent. After a send that was cut, none of the later bytes has left.
        self.said = bytearray()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream behind, the **Cancellation** too."""
        cut, self.cut = self.cut, True
        self.said += data
        await self._stream.send_all(data)
        self.cut = cut

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream behind, the **Cancellation** too."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As the stream behind, the **Cancellation** too."""
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream behind, the **Cancellation** too."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Close the stream behind. **Cancellation:** it is closed nevertheless."""
        await self._stream.aclose()


class ProbedStream(NotingStream):
    """An end of a link whose keepalive breaks a hanging call: a destination waits without a limit.

    The link's own keepalive notices faults of the link itself.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, calls: Calls) -> None:
        super().__init__(stream)
        self._calls = calls

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream behind, the **Cancellation** too. BrokenResourceError: the call hangs."""
        with trio.move_on_after(KEEPALIVE if self._calls.hang else math.inf):
            return await super().receive_some(max_bytes)
        raise trio.BrokenResourceError from OSError("its host answers no probes")


class DeliveringStream(NotingStream):
    """A stream that also reports when the other end has taken everything, by polling."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, link: VirtualLink) -> None:
        super().__init__(stream)
        self._link = link

    async def delivered(self) -> None:
        """Wait until the other end has taken everything. **Cancellation:** no effect."""
        await trio.lowlevel.checkpoint()
        while self._link.delivered("a->b") < self._link.sent("a->b"):  # noqa: ASYNC110 - the link has no event for that
            await trio.sleep(0.25)


class SilentStream(DeliveringStream):
    """The other end may never answer."""

    perhaps_silent = True


STREAMS: dict[str, Callable[..., NotingStream]] = {"delivering": DeliveringStream, "perhaps silent": SilentStream}


class Life:
    """The guest's state when it was stopped, and whether the state was the same when it was started again."""

    def __init__(self, guest: ScriptedGuest) -> None:
        self._guest = guest
        self.run_state = guest.run_state
        self.first = guest.digest()
        self.stopped: str | None = None
        self.changed = False
        guest.on_event(self._see)

    def _see(self, event: str) -> None:
        if event == "stop":
            self.stopped = self._guest.digest()
        elif event == "start" and self.stopped is not None:
            self.changed = self.changed or self._guest.digest() != self.stopped


async def politely(monitor: trimig.Monitor, side: Callable[[], Awaitable[trimig.Summary]]) -> trimig.Summary:
    """Run *side*; turn a cancel of this task into a call of Monitor.cancel(), and wait for the outcome."""
    result: list[trimig.Summary | trimig.TrimigError] = []
    done = trio.Event()

    async def run() -> None:
        with trio.CancelScope(shield=True):
            try:
                result.append(await side())
            except trimig.TrimigError as error:
                result.append(error)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        try:
            await done.wait()
        except trio.Cancelled:
            nursery.cancel_scope.shield = True
            while monitor.status is Status.NONE:
                await trio.lowlevel.checkpoint()  # without a migration under way a cancel would have no effect
            with contextlib.suppress(trimig.StateError):  # too late, and reported as such
                monitor.cancel("the sweep")
            await done.wait()
    if isinstance(result[0], trimig.TrimigError):
        raise result[0]
    return result[0]


async def migrate_once(
    ctx: SweepContext,
    *,
    pages: int = 3,
    content: Literal["zero", "random", "mixed"] = "zero",
    dirty: int = 1,
    run_state: str = "running",
    return_path: bool = True,
    description: bool = True,
    polite: bool = False,
    hold: bool = False,
    stream: str = "",
    xbzrle: bool = False,
) -> Outcome:
    """Migrate under any injection of the context, check the rules, settle the owner, and migrate again undisturbed."""
    source, target = make_guests(ctx.seed, pages=pages, content=content, dirty=dirty, run_state=run_state)
    referee = OwnerReferee(source=source, destination=target)
    life = Life(source)
    config = make_config(return_path=return_path, description=description, hold=hold, xbzrle=xbzrle)
    failing = FailingStream(ctx.link.a, ctx.calls, label="a")
    outgoing = STREAMS[stream](failing, ctx.link) if stream else NotingStream(failing)
    answering = ProbedStream(FailingStream(ctx.link.b, ctx.calls, label="b"), ctx.calls)
    sender, taker = Watched(ctx.link), trimig.Monitor()
    living = trio.lowlevel.current_statistics().tasks_living

    async def send() -> trimig.Summary:
        guest = FailingGuest(source, ctx.calls, label="source")
        return await trimig.migrate(guest, outgoing, config, monitor=sender)

    async def take() -> trimig.Summary:
        guest = FailingGuest(target, ctx.calls, label="destination")
        # A destination that knew of the pause would wait for a silent source for ever.
        there = make_config(return_path=return_path, description=description)
        return await trimig.receive(guest, answering, there, monitor=taker)

    if polite:
        sides: dict[str, Any] = {
            "source": functools.partial(politely, sender, send),
            "destination": functools.partial(politely, taker, take),
        }
    else:
        sides = {"source": send, "destination": take}
    ends = await ctx.run(**sides)
    if sender.held_at is not None:
        await trio.sleep(HELD)  # until the caller lets the migration go on
    assert trio.lowlevel.current_statistics().tasks_living == living
    assert ctx.link.closed
    referee.check()
    judge_ends(ends, {"source": sender, "destination": taker}, source, target)
    judge_owner(ends, sender, source, target, life, confirmed=return_path)
    if isinstance(ends["source"].error, trimig.HandoverUncertain):
        judge_doubt(ctx, sender, outgoing, answering)
        await settle(ends["source"].error, source, target)
        assert sender.status is (Status.COMPLETED if target.executed else Status.FAILED)
    outcome = (str(ends["source"]), str(ends["destination"]), "+".join(referee.running()) or "none runs")
    if sender.owner is trimig.Ownership.SOURCE:
        if source.run_state != run_state:
            await source.resume()  # a GuestNotResumed says that the resume may be tried again
        await migrate_again(ctx, sender, taker, source, target, run_state)
        referee.check()
    return outcome


def judge_ends(
    ends: dict[str, End], monitors: dict[str, trimig.Monitor], source: ScriptedGuest, target: ScriptedGuest
) -> None:
    """No task and no claim is left, and every end is one that the interface names."""
    for guest in (source, target):
        assert not guest.claimed, f"{guest} is still claimed"
        assert not guest.tracking, f"{guest} is still tracked"
    for name, end in ends.items():
        monitor = monitors[name]
        assert monitor.status in TERMINAL or monitor.status is Status.NONE, f"{name} is left {monitor.status}"
        if end.kind == "returned":
            assert monitor.status is Status.COMPLETED
        if end.kind == "cancelled":
            assert monitor.status in (Status.CANCELLED, Status.NONE)
        if end.error is not None:
            assert isinstance(end.error, trimig.TrimigError)
            assert not isinstance(end.error, trimig.InternalError | trimig.StateError), f"{end.error!r}"
            if monitor.status is not Status.CANCELLED:
                assert monitor.info()["error-desc"] == str(end.error) != ""


def judge_owner(
    ends: dict[str, End],
    monitor: trimig.Monitor,
    source: ScriptedGuest,
    target: ScriptedGuest,
    life: Life,
    *,
    confirmed: bool,
) -> None:
    """The owner that each side reports is true."""
    here, there = ends["source"], ends["destination"]
    arrived = there.kind == "returned"
    assert not life.changed, "the source was started again other than it had been stopped"
    assert target.executed == (arrived and life.run_state == "running")
    if arrived:
        assert target.run_state == life.run_state
        assert target.digest() == source.digest() == (life.stopped or life.first), "it arrived other than it was"
    else:
        assert not target.running
    if isinstance(here.error, trimig.HandoverUncertain):
        assert here.error.owner is monitor.owner is trimig.Ownership.UNKNOWN
        assert monitor.status is Status.UNCERTAIN
        assert not source.running
    elif here.kind == "returned":
        assert monitor.owner is trimig.Ownership.DESTINATION
        assert not source.running
        if confirmed:
            assert arrived, f"the source says that it is done, the destination says {there}"
    else:
        assert monitor.owner is trimig.Ownership.SOURCE
        assert not arrived, f"{here}, and yet the destination has it"
        if isinstance(here.error, trimig.TrimigError):
            assert here.error.owner is trimig.Ownership.SOURCE
        if not isinstance(here.error, trimig.GuestNotResumed):
            assert source.run_state == life.run_state, f"{here} left the guest {source.run_state}"


def judge_doubt(ctx: SweepContext, monitor: Watched, outgoing: NotingStream, answering: NotingStream) -> None:
    """This side cannot know the answer: the commit may have left, and no SHUT has come."""
    assert monitor.decided_at is not None
    left = ctx.link.sent("a->b") > monitor.decided_at
    # A stream that fails in send_all does not say how much it took (trio.abc.SendStream): then no side can know.
    assert left or outgoing.cut, "not a byte of the decision had left, and that could be known"
    come = bytes(answering.said[: ctx.link.delivered("b->a")])
    assert not has_shut(come) or ctx.calls.fired, "the answer was there to be read"


def has_shut(answers: bytes) -> bool:
    """Whether the messages of a destination include a whole SHUT; the last message may be incomplete."""
    while len(answers) >= 4:
        number, length = int.from_bytes(answers[:2]), int.from_bytes(answers[2:4])
        if number == ReturnPath.SHUT:
            return len(answers) >= 4 + length
        answers = answers[4 + length :]
    return False


async def settle(doubt: trimig.HandoverUncertain, source: ScriptedGuest, target: ScriptedGuest) -> None:
    """Settle as an operator would that looks at the destination."""
    before = target.run_state
    await doubt.settle(trimig.Ownership.DESTINATION if target.executed else trimig.Ownership.SOURCE)
    assert target.run_state == before
    assert source.running != target.running


async def migrate_again(
    ctx: SweepContext,
    sender: trimig.Monitor,
    taker: trimig.Monitor,
    source: ScriptedGuest,
    target: ScriptedGuest,
    run_state: str,
) -> None:
    """T7: after a failed or cancelled attempt the next one succeeds, with the same guests and monitors."""
    link = ctx.new_link()
    config = make_config()
    ends = await ctx.run_undisturbed(
        source=lambda: trimig.migrate(source, link.a, config, monitor=sender),
        destination=lambda: trimig.receive(target, link.b, config, monitor=taker),
    )
    assert [str(end) for end in ends.values()] == ["returned", "returned"], f"the second attempt: {ends}"
    assert target.run_state == run_state
    assert target.digest() == source.digest()


def scenario(**options: object) -> Scenario[Outcome]:
    """The scenario over a link with some latency, a small window and pieces of random size."""
    return Scenario(
        body=functools.partial(migrate_once, **options),  # type: ignore[arg-type]  # passed through as they are
        link=functools.partial(VirtualLink, window=8192, latency=0.001, chunk=(1, 4096), keepalive=KEEPALIVE),
        exit_within=HANDOVER_TIMEOUT + TEARDOWN_GRACE + 1e-6,
        limit=600.0,
    )
