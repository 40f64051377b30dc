"""tmp"""

from .determinism import deterministic_schedule as deterministic_schedule
from .link import DIRECTIONS as DIRECTIONS
from .link import FAULT_KINDS as FAULT_KINDS
from .link import Direction as Direction
from .link import Fault as Fault
from .link import FaultKind as FaultKind
from .link import Transfer as Transfer
from .link import VirtualLink as VirtualLink
from .link import VirtualStream as VirtualStream
from .link import opposite as opposite
from .link import virtual_link as virtual_link
from .streams import DribbleStream as DribbleStream
from .streams import VirtualListener as VirtualListener
