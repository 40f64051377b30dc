"""The guests that come with trimig.

:class:`AppGuest` is the caller's own state in this process. :class:`LazyAppGuest` is the same for an application that
awaits its pages. :class:`ProcessGuest` is a program of the caller's, in any language, that shares its memory with this process;
:class:`WorkloadGuest` is such a program that checks itself. :class:`ParkedGuest` is a guest that was received from a
QEMU and is kept.
"""

from .app import AppGuest as AppGuest
from .base import GuestBase as GuestBase
from .device import Device as Device
from .device import device_section as device_section
from .kinds import ArrivalRecord as ArrivalRecord
from .kinds import GuestKind as GuestKind
from .kinds import GuestRequest as GuestRequest
from .kinds import HandoverRecord as HandoverRecord
from .kinds import installed_kind as installed_kind
from .kinds import installed_names as installed_names
from .lazy_app import LazyAppGuest as LazyAppGuest
from .parked.guest import ParkedGuest as ParkedGuest
from .process import ProcessGuest as ProcessGuest
from .standard import TimerState as TimerState
from .workload.guest import WorkloadGuest as WorkloadGuest
