"""``calc-dirty-rate`` and ``query-dirty-rate``: how fast the guest writes its memory, measured with its dirty tracker.

The measurement covers every page in both modes; so ``sample-pages`` of the answer is the number of pages in a
GiB. Only one measurement runs at a time, and the beginning of a migration ends it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import trio

from ...engine import guest_calls
from ...errors import TrimigError
from ...guest import PAGE_SIZE
from ...status import IDLE
from ..arguments import Argument
from ..command import QmpCommand
from ..interface import CommandFailed, Session
from ..measuring import Measurement
from .shapes import INT, MAYBE_INT

if TYPE_CHECKING:
    from ..machine import Machine

_MODES: Final = ("page-sampling", "dirty-bitmap", "dirty-ring")
_UNIT_SECONDS: Final = {"second": 1.0, "millisecond": 0.001}
#: QEMU's bounds of ``calc-time``, in seconds, and of ``sample-pages``.
_SHORTEST, _LONGEST = 0.05, 60.0
_FEWEST_SAMPLES, _MOST_SAMPLES = 128, 4096
_MIB: Final = 1 << 20
_PAGES_OF_A_GIB: Final = (1 << 30) // PAGE_SIZE
_MODE: Final = Argument("str", optional=True, choices=_MODES)
_UNIT: Final = Argument("str", optional=True, choices=tuple(_UNIT_SECONDS))


async def calc_dirty_rate(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``calc-dirty-rate``: returns at once; query-dirty-rate has the result when the time is over."""
    mode = arguments.get("mode", "page-sampling")
    unit = arguments.get("calc-time-unit", "second")
    seconds = arguments["calc-time"] * _UNIT_SECONDS[unit]
    if not _SHORTEST <= seconds <= _LONGEST:
        raise CommandFailed("Calculation time is out of range [50ms, 60000ms].")
    if mode == "dirty-ring":
        raise CommandFailed("mode dirty-ring needs KVM, and is not built into trimig: use dirty-bitmap")
    if "sample-pages" in arguments:
        if mode != "page-sampling":
            raise CommandFailed("sample-pages is used only in page-sampling mode")
        if not _FEWEST_SAMPLES <= arguments["sample-pages"] <= _MOST_SAMPLES:
            raise CommandFailed(f"sample-pages is out of range[{_FEWEST_SAMPLES}, {_MOST_SAMPLES}].")
    if machine.busy or any(monitor.status not in IDLE for monitor in (machine.outgoing, machine.incoming)):
        raise CommandFailed("There's a migration process in progress")
    if machine.waiting:
        raise CommandFailed("Guest is waiting for an incoming migration")
    if machine.handed_over:
        raise CommandFailed("the guest was handed over: it does not run here")
    if machine.measurer.last is not None and machine.measurer.last.status == "measuring":
        raise CommandFailed("the last measurement has not ended yet")
    measurement = Measurement(mode=mode, unit=unit, calc_time=arguments["calc-time"], began=int(time.time()))
    machine.measurer.begin(measurement, functools.partial(_measure, machine, measurement, seconds))
    return {}


async def _measure(machine: Machine, measurement: Measurement, seconds: float) -> None:
    """Count the pages that the guest writes within *seconds*.

    **Cancellation:** the tracker is stopped.
    """
    tracker = None
    try:
        tracker = guest_calls.new_tracker(machine.guest)
        await guest_calls.call("starting dirty tracking", tracker.start, seconds + machine.config.handover_timeout)
        began = trio.current_time()
        await trio.sleep(seconds)
        written = await guest_calls.find_written(tracker, machine.guest.ram, machine.config.handover_timeout)
        passed = trio.current_time() - began
        pages = sum(int(np.count_nonzero(bitmap)) for bitmap in written.values())
        measurement.done(round(pages * PAGE_SIZE / _MIB / passed))
    except TrimigError as error:
        measurement.failed(str(error))
    finally:
        if tracker is not None:
            tracker.stop()


async def query_dirty_rate(machine: Machine, arguments: Mapping[str, Any], session: Session) -> Any:
    """``query-dirty-rate``: in MiB per second."""
    found = machine.measurer.last
    wanted = arguments.get("calc-time-unit")
    if found is None:
        return {
            "status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": wanted or "second",
            "sample-pages": 0, "mode": "page-sampling",
        }  # fmt: skip
    unit = wanted or "second"
    # The answer is in whole seconds and rounds a shorter time down, as in QEMU.
    shown = int(found.calc_time * _UNIT_SECONDS[found.unit] / _UNIT_SECONDS[unit] + 1e-9)
    answer: dict[str, Any] = {
        "status": found.status, "start-time": found.began, "calc-time": shown, "calc-time-unit": unit,
        "sample-pages": _PAGES_OF_A_GIB if found.mode == "page-sampling" else 0, "mode": found.mode,
    }  # fmt: skip
    if found.status == "measured":
        answer["dirty-rate"] = found.rate
    return answer


COMMANDS: Final[Mapping[str, QmpCommand]] = {
    "calc-dirty-rate": QmpCommand(
        signature={"calc-time": INT, "calc-time-unit": _UNIT, "sample-pages": MAYBE_INT, "mode": _MODE},
        handler=calc_dirty_rate,
    ),
    "query-dirty-rate": QmpCommand(
        signature={"calc-time-unit": _UNIT},
        handler=query_dirty_rate,
        returns=Argument(
            "object",
            members={
                "dirty-rate": MAYBE_INT,
                "status": Argument("str", choices=("unstarted", "measuring", "measured")),
                "start-time": INT,
                "calc-time": INT,
                "calc-time-unit": Argument("str", choices=tuple(_UNIT_SECONDS)),
                "sample-pages": INT,
                "mode": Argument("str", choices=_MODES),
            },
        ),
    ),
}
