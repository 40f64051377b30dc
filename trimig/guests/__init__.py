"""What can be migrated out of the box.

:class:`AppGuest` is the caller's own state in this process, :class:`ProcessGuest` a worker process that shares its
memory with us, :class:`ParkedGuest` what was received from a QEMU.
"""

from .app import AppGuest as AppGuest
from .base import GuestBase as GuestBase
from .device import Device as Device
from .device import device_section as device_section
from .parked import ParkedGuest as ParkedGuest
from .process import ProcessGuest as ProcessGuest
from .standard import TimerState as TimerState
