"""The two sections that every machine of QEMU has: ``timer`` and ``globalstate`` (vmstate.md part 4)."""

from __future__ import annotations

from typing import Any, Final

from ..errors import LocalProtocolError, RemoteProtocolError
from ..wire.vmstate import Field, Subsection, VMState
from .device import Device

_RUN_STATE_SIZE: Final = 100

#: Run states that a machine waiting for a migration may go to. QEMU knows three more, and its destination aborts if it
#: is told to go to one of them.
RUN_STATES: Final = frozenset(
    {
        "running",
        "paused",
        "prelaunch",
        "suspended",
        "shutdown",
        "io-error",
        "internal-error",
        "guest-panicked",
        "watchdog",
        "postmigrate",
        "inmigrate",
        "finish-migrate",
        "colo",
    }
)
#: The three.
ILLEGAL_RUN_STATES: Final = frozenset({"debug", "save-vm", "restore-vm"})

WARP_TIMER: Final = VMState(
    "timer/icount/warp_timer",
    fields=(Field("vm_clock_warp_start", "int64"), Field("icount_warp_timer", "timer")),
)
ICOUNT_TIMERS: Final = VMState(
    "timer/icount/timers",
    fields=(Field("icount_rt_timer", "timer"), Field("icount_vm_timer", "timer")),
)
ICOUNT_SHIFT: Final = VMState(
    "timer/icount/shift",
    version=2,
    fields=(Field("icount_time_shift", "int16"), Field("last_delta", "int64")),
)
ICOUNT: Final = VMState(
    "timer/icount",
    fields=(Field("qemu_icount_bias", "int64"), Field("qemu_icount", "int64")),
    subsections=(Subsection(WARP_TIMER), Subsection(ICOUNT_TIMERS), Subsection(ICOUNT_SHIFT)),
)
TIMER: Final = VMState(
    "timer",
    version=2,
    minimum_version=1,
    fields=(
        Field("cpu_ticks_offset", "int64"),
        Field("unused", "unused_buffer", size=8),
        Field("cpu_clock_offset", "int64", since=2),
    ),
    subsections=(Subsection(ICOUNT),),
)
GLOBAL_STATE: Final = VMState(
    "globalstate",
    fields=(Field("size", "uint32"), Field("runstate", "buffer", size=_RUN_STATE_SIZE)),
)


class TimerState(Device):
    """The machine's clocks. What comes with instruction counting is kept as attributes and sent on if it came."""

    vmstate = TIMER

    def __init__(self, *, cpu_ticks_offset: int = 0, cpu_clock_offset: int = 0) -> None:
        super().__init__()
        self.cpu_ticks_offset = cpu_ticks_offset
        #: Virtual clock in ns.
        self.cpu_clock_offset = cpu_clock_offset

    def restore(self, state: dict[str, Any]) -> None:
        """As :meth:`Device.restore`; what an earlier load brought in subsections is forgotten."""
        for name in vars(self).keys() - {"cpu_ticks_offset", "cpu_clock_offset", "instance_id"}:
            delattr(self, name)
        super().restore(state)


class GlobalState(Device):
    """The run state that the guest had before the migration stopped it."""

    vmstate = GLOBAL_STATE

    def __init__(self, run_state: str = "running") -> None:
        super().__init__()
        self.run_state = run_state
        self.size = 0
        self.runstate = bytes(_RUN_STATE_SIZE)

    def pre_save(self) -> None:
        """Raise LocalProtocolError for a run state that a destination could not take."""
        if (problem := _refusal(self.run_state)) is not None:
            raise LocalProtocolError(f"the guest's run state cannot be sent: {problem}")
        text = self.run_state.encode() + b"\0"
        self.size = len(text)
        self.runstate = text.ljust(_RUN_STATE_SIZE, b"\0")

    def post_load(self, version_id: int) -> None:
        """Take the name up to its NUL: behind it may be the rest of a longer one, and *size* is not to be relied on."""
        name, end, _ = self.runstate.partition(b"\0")
        text = name.decode("ascii", "backslashreplace")
        problem = _refusal(text) if end else "it has no end"
        if problem is not None:
            raise RemoteProtocolError(f"run state {text!r}: {problem}", section=self.idstr)
        self.run_state = text


def _refusal(run_state: str) -> str | None:
    if run_state in RUN_STATES:
        return None
    if run_state in ILLEGAL_RUN_STATES:
        return f"a guest cannot arrive in {run_state!r}"
    return f"there is no run state {run_state!r}"


def encode_global_state(run_state: str) -> bytes:
    """The payload of section ``globalstate``.

    Raises:
        LocalProtocolError: there is no such run state, or no guest can arrive in it.
    """
    return GlobalState(run_state).save()


def decode_global_state(payload: bytes, version_id: int = 1) -> str:
    """The run state in a payload of section ``globalstate``.

    Raises:
        RemoteProtocolError: it is not 104 bytes, or there is no such run state, or no guest can arrive in it.
    """
    state = GlobalState()
    state.load(payload, version_id)
    return state.run_state
