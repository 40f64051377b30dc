"""Settings: capabilities, parameters, the peer's profile and the engine's options; frozen, and valid once they exist.

Names, ranges, defaults and rules are those of QEMU 7.2 to 11.1 (config.md, newer.md), in Python spelling: ``downtime-limit`` is
``Parameters.downtime_limit``. The only difference is ``return-path``, which is on by default. The readers of QMP, TOML
and command lines return a new object or raise :class:`~trimig.errors.ConfigError`; they never change an object in part.

``types`` has the types of option values. ``capabilities``, ``parameters``, ``peer`` and ``config`` have one class each.
``objects`` has the objects that parameters name (TLS credentials). ``built`` lists the features that are built.
"""

from __future__ import annotations

from .addresses import uri_of as uri_of
from .bitmaps import BitmapAlias as BitmapAlias
from .bitmaps import NodeAlias as NodeAlias
from .built import BUILT as BUILT
from .capabilities import CAPABILITY_NAMES as CAPABILITY_NAMES
from .capabilities import RULES as RULES
from .capabilities import Capabilities as Capabilities
from .capabilities import Proposal as Proposal
from .capabilities import check_proposal as check_proposal
from .config import ENGINE_OPTIONS as ENGINE_OPTIONS
from .config import Config as Config
from .objects import AuthzList as AuthzList
from .objects import AuthzRule as AuthzRule
from .objects import AuthzSimple as AuthzSimple
from .objects import ConfigObject as ConfigObject
from .objects import TlsPsk as TlsPsk
from .objects import TlsX509 as TlsX509
from .objects import parse_object as parse_object
from .objects import read_object as read_object
from .parameters import PARAMETER_NAMES as PARAMETER_NAMES
from .parameters import Parameters as Parameters
from .peer import BY_MACHINE as BY_MACHINE
from .peer import LEGACY_2_2 as LEGACY_2_2
from .peer import LEGACY_2_3 as LEGACY_2_3
from .peer import PEERS as PEERS
from .peer import QEMU_7_2 as QEMU_7_2
from .peer import QEMU_8_0 as QEMU_8_0
from .peer import QEMU_8_1 as QEMU_8_1
from .peer import QEMU_9_0 as QEMU_9_0
from .peer import QEMU_10_0 as QEMU_10_0
from .peer import QEMU_11_1 as QEMU_11_1
from .peer import PeerProfile as PeerProfile
from .peer import profile_for_machine as profile_for_machine
from .types import GiB as GiB
from .types import KiB as KiB
from .types import MiB as MiB
from .types import parse_size as parse_size
