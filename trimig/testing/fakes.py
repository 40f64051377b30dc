"""A guest without a machine: memory in NumPy arrays, a script instead of a processor, and a journal of its events.

:class:`ScriptedGuest` has no task and no thread. Its writes follow from its running time on trio's clock, and are
computed when the test looks at the guest (a dirty-tracking sync, a pause, a digest). So a guest costs nothing between
two looks, and a run under :func:`~trimig.testing.deterministic_schedule` repeats to the byte.

:class:`~trimig.testing.OwnerReferee` watches several of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import trio

from ..errors import Owner, RemoteProtocolError, StateError
from ..guest import PAGE_SIZE, DeviceProtocol, DeviceSection, Pages
from ..owner import OwnerState, Settle
from .parts import FakeBlock, FakeDevice, MarksTracker

Content = Literal["random", "zero", "mixed"]

#: The most writes after a leap in time; the stamps continue as if all writes had been made.
_MOST_WRITES_AT_ONCE: Final = 4096


class Write(NamedTuple):
    """One scripted write: *page* of *block* is filled with the byte *value* once the guest has run for *at* seconds."""

    at: float
    block: str
    #: The number of the page in the block.
    page: int
    value: int


class JournalEntry(NamedTuple):
    """An event that took effect on a guest.

    ``event`` is one of ``pause``, ``resume``, ``activate``, ``throttle``, ``save``, ``load``, ``claim``, ``release``,
    ``track``, ``sync``, ``untrack``.
    """

    #: Virtual seconds; 0 outside a run.
    time: float
    event: str
    #: The argument of the call, or empty.
    detail: str = ""


class ScriptedGuest:
    """Implements :class:`trimig.guest.Guest` in this process, for tests.

    Time is *guest time*: the guest's running time in seconds, by trio's clock, less the throttled time. Every
    coroutine has a checkpoint before its effect and one after it, so that a cancel can come on either side.

    Args:
        name: machine name.
        blocks: pages of each RAM block, in order.
        content: the initial memory; ``"mixed"`` leaves every third page zero.
        seed: for content, and for the pages that *rate* and *dirty_per_sync* hit.
        devices: their state; None for a guest with sections as bytes (:attr:`sections`).
        run_state: QEMU's name; the guest runs if this is ``"running"``.
        script: writes at given guest times, in any order.
        rate: random pages written per second of guest time. Each write stamps the running number of the write.
        dirty_per_sync: random pages written at each sync and at each pause while running. So a guest is busy even if
            virtual time does not pass, as on a link without latency.
        working_set: random writes hit only so many pages, the first ones (over all blocks in order); None for all.
        delays: virtual seconds that a call takes, by name (``{"pause": 0.01, "activate": 2}``), between its two
            checkpoints and before its effect.
    """

    def __init__(
        self,
        name: str = "scripted",
        blocks: Mapping[str, int] | None = None,
        *,
        content: Content = "random",
        seed: int = 0,
        devices: Sequence[DeviceProtocol] | None = (),
        run_state: str = "running",
        script: Sequence[Write] = (),
        rate: float = 0.0,
        dirty_per_sync: int = 0,
        working_set: int | None = None,
        delays: Mapping[str, float] | None = None,
    ) -> None:
        self._name = name
        self._random = random.Random(f"{seed} writes")
        self._memory: dict[str, Pages] = {}
        content_of = np.random.default_rng(seed)
        for block, count in ({"ram": 8} if blocks is None else blocks).items():
            pages = np.zeros((count, PAGE_SIZE), np.uint8)
            if content != "zero":
                pages[:] = content_of.integers(0, 256, pages.shape, np.uint8)
            if content == "mixed":
                pages[::3] = 0
            self._memory[block] = pages
        self._ram = tuple(FakeBlock(block, pages, self.update) for block, pages in self._memory.items())
        places = [(block, page) for block, pages in self._memory.items() for page in range(len(pages))]
        self._places = places if working_set is None else places[:working_set]
        self._devices = None if devices is None else {(d.idstr, d.instance_id): d for d in devices}
        self._run_state = run_state
        first = Owner.ELSEWHERE if run_state == "inmigrate" else Owner.HERE
        self._owner = OwnerState(first, runs=lambda: self.running)
        self._script = sorted(script)
        self._rate = rate
        self._dirty_per_sync = dirty_per_sync
        self._delays = dict(delays or {})
        self._stolen = 0.0  # the share of running time that the throttle takes
        self._looked_at: float | None = None
        self._rate_writes = 0
        self._trackers: list[MarksTracker] = []
        self._watchers: list[Callable[[str], None]] = []
        #: Why the guest is claimed, or None.
        self.claimed: str | None = None
        #: The sections as bytes, for a guest without devices.
        self.sections: tuple[DeviceSection, ...] = ()
        #: The events, in order.
        self.journal: list[JournalEntry] = []
        #: Calls that no correct engine makes (device state of a running guest), in words.
        self.misuse: list[str] = []
        #: A call started the guest (resume, activate); it was not only created running.
        self.executed = False
        #: The guest's running time in seconds.
        self.guest_time = 0.0
        #: The number of writes made so far.
        self.writes = 0

    def __repr__(self) -> str:
        return f"<ScriptedGuest {self._name} {self._run_state}>"

    # For the test

    @property
    def running(self) -> bool:
        """Whether the guest is executing now."""
        return self._run_state == "running"

    @property
    def tracking(self) -> int:
        """The number of dirty trackers that are on; 0 without a migration."""
        return len(self._trackers)

    def events(self) -> list[str]:
        """The events of the journal without times and details."""
        return [entry.event for entry in self.journal]

    def digest(self) -> str:
        """The digest of all RAM and device state, brought up to date."""
        self.update()
        digest = hashlib.blake2b(digest_size=16)
        for block, pages in self._memory.items():
            digest.update(f"{block} {len(pages)} ".encode())
            digest.update(pages.data)
        for section in self._sections():
            digest.update(f"{section.idstr} {section.instance_id} {section.version_id} ".encode())
            digest.update(section.payload)
        return digest.hexdigest()

    def on_event(self, watcher: Callable[[str], None]) -> None:
        """Call *watcher* with ``"start"``, ``"stop"`` or ``"load"`` at that moment; *watcher* must not fail."""
        self._watchers.append(watcher)

    def write(self, block: str, page: int, value: int) -> None:
        """Fill a page, like a write of the guest: trackers notice it."""
        self._memory[block][page] = value
        self._mark(block, page)

    # Guest

    @property
    def name(self) -> str:
        """Machine name."""
        return self._name

    @property
    def ram(self) -> Sequence[FakeBlock]:
        """The RAM blocks."""
        return self._ram

    @property
    def devices(self) -> Mapping[tuple[str, int], DeviceProtocol] | None:
        """Devices by (idstr, instance id), or None."""
        return self._devices

    @property
    def run_state(self) -> str:
        """QEMU's run state name."""
        return self._run_state

    @property
    def owner(self) -> Owner:
        """Whether the guest may run here."""
        return self._owner.owner

    def set_owner(self, owner: Owner, *, handed_over: bool = False, settle: Settle | None = None) -> None:
        """Set the owner."""
        self._owner.set(owner, handed_over=handed_over, settle=settle)

    async def settle(self, owner: Owner) -> None:
        """Set the owner. **Cancellation:** cancelled before any effect, or not at all."""
        await self._owner.settle(owner)

    def claim(self, purpose: str) -> None:
        """Reserve the guest; StateError if it is reserved."""
        if self.claimed is not None:
            raise StateError(f"the guest is busy: {self.claimed}")
        self.claimed = purpose
        self._note("claim", purpose)

    def release(self) -> None:
        """End the reservation."""
        self.claimed = None
        self._note("release")

    async def pause(self) -> None:
        """Stop. **Cancellation:** the guest may or may not be paused."""
        await self._enter("pause")
        if self.running:
            self.sync_point(note=False)
            self._set_run_state("paused")
        self._note("pause")
        await trio.lowlevel.checkpoint()

    async def resume(self) -> None:
        """Run again. **Cancellation:** the guest may or may not run."""
        with self._owner.starting():
            await self._enter("resume")
            self._note("resume")
            self._set_run_state("running")
        await trio.lowlevel.checkpoint()

    async def activate(self, run_state: str) -> None:
        """Bring the guest into *run_state*. **Cancellation:** the guest may or may not have that state."""
        await self._enter("activate")
        self._note("activate", run_state)
        self._set_run_state(run_state)
        await trio.lowlevel.checkpoint()

    def dirty_tracker(self) -> MarksTracker:
        """A new tracker."""
        return MarksTracker(self)

    async def throttle(self, percent: int) -> None:
        """Reduce the running time. **Cancellation:** the throttle may or may not be set."""
        await self._enter("throttle")
        self.update()
        self._stolen = percent / 100
        self._note("throttle", str(percent))
        await trio.lowlevel.checkpoint()

    async def save_devices(self) -> Sequence[DeviceSection]:
        """One section for each device. **Cancellation:** has no effect."""
        await self._enter("save")
        if self.running:
            self.misuse.append("save_devices of a running guest")
        self._note("save")
        sections = self._sections()
        await trio.lowlevel.checkpoint()
        return sections

    async def load_devices(self, sections: Sequence[DeviceSection]) -> None:
        """Load devices; RemoteProtocolError for an unknown device. **Cancellation:** devices may be half loaded."""
        await self._enter("load")
        if self.running:
            self.misuse.append("load_devices into a running guest")
        self._note("load", str(len(sections)))
        self._tell("load")
        if self._devices is None:
            self.sections = tuple(sections)
        else:
            for section in sections:
                device = self._devices.get((section.idstr, section.instance_id))
                if device is None:
                    raise RemoteProtocolError("no such device", section=section.idstr)
                device.load(section.payload, section.version_id)
        await trio.lowlevel.checkpoint()

    # Time, and the guest's writes in it

    def update(self) -> None:
        """Bring memory up to date with the clock. Does nothing outside a run, or while the guest is stopped."""
        if not self.running or not trio.lowlevel.in_trio_run():
            return
        now = trio.current_time()
        if self._looked_at is not None and now > self._looked_at:
            self.guest_time += (now - self._looked_at) * (1 - self._stolen)
        self._looked_at = now
        while self._script and self._script[0].at <= self.guest_time:
            _, block, page, value = self._script.pop(0)
            self.write(block, page, value)
        due = int(self.guest_time * self._rate) - self._rate_writes
        if due > 0:
            self._rate_writes += due
            self._write_random(due)

    def sync_point(self, *, note: bool = True) -> None:
        """Make the writes of a busy guest at each look (``dirty_per_sync``)."""
        self.update()
        if self.running:
            self._write_random(self._dirty_per_sync)
        if note:
            self._note("sync")

    def attach(self, tracker: MarksTracker) -> None:
        """Tell *tracker* about every write from now on."""
        if tracker not in self._trackers:
            self._trackers.append(tracker)
            self._note("track")

    def detach(self, tracker: MarksTracker) -> None:
        """Stop telling *tracker*. Idempotent."""
        if tracker in self._trackers:
            self.update()
            self._trackers.remove(tracker)
            self._note("untrack")

    def _write_random(self, count: int) -> None:
        if not self._places:
            return
        skipped = max(0, count - _MOST_WRITES_AT_ONCE)
        self.writes += skipped
        for _ in range(count - skipped):
            block, page = self._random.choice(self._places)
            self._memory[block][page, :8] = np.frombuffer((self.writes + 1).to_bytes(8, "big"), np.uint8)
            self._mark(block, page)

    def _mark(self, block: str, page: int) -> None:
        self.writes += 1
        for tracker in self._trackers:
            tracker.mark(block, page)
        for device in (self._devices or {}).values():
            if isinstance(device, FakeDevice):
                device.set_write_count(self.writes)

    async def _enter(self, call: str) -> None:
        await trio.lowlevel.checkpoint()
        delay = self._delays.get(call, 0.0)
        if delay:
            await trio.sleep(delay)

    def _set_run_state(self, run_state: str) -> None:
        was = self.running
        if was and run_state != "running":
            self.update()
        self._run_state = run_state
        if self.running and not was:
            self.executed = True
            self._looked_at = None
            self.update()
            self._tell("start")
        elif was and not self.running:
            self._tell("stop")

    def _sections(self) -> tuple[DeviceSection, ...]:
        if self._devices is None:
            return self.sections
        return tuple(
            DeviceSection(
                idstr=device.idstr,
                instance_id=device.instance_id,
                version_id=device.version_id,
                payload=device.save(),
                description=device.describe(),
            )
            for device in self._devices.values()
        )

    def _note(self, event: str, detail: str = "") -> None:
        self.journal.append(JournalEntry(_now(), event, detail))

    def _tell(self, event: str) -> None:
        for watcher in self._watchers:
            watcher(event)


def _now() -> float:
    return trio.current_time() if trio.lowlevel.in_trio_run() else 0.0
