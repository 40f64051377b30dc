"""Live migration of running machines, on QEMU's wire format, with exactly one owner of the guest at all times.

The layers, from the top; imports point downwards only:

* ``trimig.cli``: the command; it uses the names exported here and nothing below.
* ``trimig.api``: the two calls, :func:`migrate` and :func:`receive`.
* ``trimig.guests``, ``trimig.transport``, ``trimig.stream``: ready-made guests, transports, tools on streams.
* ``trimig.engine``: the trio tasks. One nursery per attempt. ``trimig.channel``, below it: connections.
* ``trimig.memory``, ``trimig.policy``, ``trimig.wire``: Linux memory; decisions; bytes. The last two read no clock.
* ``trimig.guest``, ``trimig.monitor``, ``trimig.status``, ``trimig.config``, ``trimig.errors``: shared by all layers.

``trimig.testing`` stands beside them: virtual links, fault injection and sweeps, for your tests as for ours.
"""

from importlib import metadata as _metadata

from .api import migrate as migrate
from .api import receive as receive
from .config.capabilities import Capabilities as Capabilities
from .config.config import Config as Config
from .config.parameters import Parameters as Parameters
from .config.peer import PeerProfile as PeerProfile
from .config.types import GiB as GiB
from .config.types import KiB as KiB
from .config.types import MiB as MiB
from .config.types import parse_size as parse_size
from .errors import ConfigError as ConfigError
from .errors import GuestFailed as GuestFailed
from .errors import GuestNotResumed as GuestNotResumed
from .errors import HandoverUncertain as HandoverUncertain
from .errors import InternalError as InternalError
from .errors import LocalProtocolError as LocalProtocolError
from .errors import MigrationCancelled as MigrationCancelled
from .errors import MigrationError as MigrationError
from .errors import NotConverging as NotConverging
from .errors import NotOwner as NotOwner
from .errors import Owner as Owner
from .errors import Ownership as Ownership
from .errors import PeerFailed as PeerFailed
from .errors import PostcopyLost as PostcopyLost
from .errors import RemoteProtocolError as RemoteProtocolError
from .errors import StateError as StateError
from .errors import TransportFailed as TransportFailed
from .errors import TrimigError as TrimigError
from .guest import Guest as Guest
from .guest import RamBlock as RamBlock
from .guests import AppGuest as AppGuest
from .guests import Device as Device
from .guests import LazyAppGuest as LazyAppGuest
from .guests import ParkedGuest as ParkedGuest
from .guests import ProcessGuest as ProcessGuest
from .guests import WorkloadGuest as WorkloadGuest
from .monitor.blockers import Blocker as Blocker
from .monitor.blockers import Blockers as Blockers
from .monitor.monitor import Monitor as Monitor
from .monitor.statistics import Convergence as Convergence
from .monitor.statistics import Downtime as Downtime
from .monitor.statistics import EncodingUse as EncodingUse
from .monitor.statistics import Event as Event
from .monitor.statistics import Statistics as Statistics
from .monitor.statistics import Summary as Summary
from .status import Role as Role
from .status import Status as Status
from .wire.devices.vmstate import Field as Field
from .wire.devices.vmstate import Subsection as Subsection
from .wire.devices.vmstate import VMState as VMState

try:
    __version__ = _metadata.version("trimig")
except _metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = (
    "AppGuest",
    "Blocker",
    "Blockers",
    "Capabilities",
    "Config",
    "ConfigError",
    "Convergence",
    "Device",
    "Downtime",
    "EncodingUse",
    "Event",
    "Field",
    "GiB",
    "Guest",
    "GuestFailed",
    "GuestNotResumed",
    "HandoverUncertain",
    "InternalError",
    "KiB",
    "LazyAppGuest",
    "LocalProtocolError",
    "MiB",
    "MigrationCancelled",
    "MigrationError",
    "Monitor",
    "NotConverging",
    "NotOwner",
    "Owner",
    "Ownership",
    "Parameters",
    "ParkedGuest",
    "PeerFailed",
    "PeerProfile",
    "PostcopyLost",
    "ProcessGuest",
    "RamBlock",
    "RemoteProtocolError",
    "Role",
    "StateError",
    "Statistics",
    "Status",
    "Subsection",
    "Summary",
    "TransportFailed",
    "TrimigError",
    "VMState",
    "WorkloadGuest",
    "__version__",
    "migrate",
    "parse_size",
    "receive",
)
