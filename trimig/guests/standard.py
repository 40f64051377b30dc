"""The two sections that every machine of QEMU has: ``timer`` and ``globalstate`` (vmstate.md part 4)."""

from __future__ import annotations

from typing import Any, Final

from ..wire.devices.globalstate import GLOBAL_STATE, fields_of, run_state_of
from ..wire.devices.vmstate import Field, Subsection, VMState
from .device import Device

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


class TimerState(Device):
    """The machine's clocks. State of instruction counting is kept in attributes, and sent if it was received."""

    vmstate = TIMER

    def __init__(self, *, cpu_ticks_offset: int = 0, cpu_clock_offset: int = 0) -> None:
        super().__init__()
        self.cpu_ticks_offset = cpu_ticks_offset
        #: Virtual clock in nanoseconds.
        self.cpu_clock_offset = cpu_clock_offset

    def restore(self, state: dict[str, Any]) -> None:
        """As :meth:`Device.restore`; drops subsection values of an earlier load."""
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
        self.runstate = b""

    def pre_save(self) -> None:
        """Raise LocalProtocolError for a run state that a destination could not take."""
        vars(self).update(fields_of(self.run_state))

    def post_load(self, version_id: int) -> None:
        """Set the run state; RemoteProtocolError if no guest can arrive in it."""
        self.run_state = run_state_of(self.runstate)
