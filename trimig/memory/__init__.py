"""Linux memory: RAM blocks on memfd, dirty tracking, userfaultfd.

``linux`` has the system calls, ``block`` the memory, ``tracking`` the trackers, ``faults`` the pages of postcopy.
"""

from .block import MemfdBlock as MemfdBlock
from .faults import Faults as Faults
from .faults import MissingPages as MissingPages
from .faults import UffdMemory as UffdMemory
from .linux import MemoryUnavailable as MemoryUnavailable
from .tracking import METHODS as METHODS
from .tracking import CompareTracker as CompareTracker
from .tracking import LateTracker as LateTracker
from .tracking import MarkTracker as MarkTracker
from .tracking import NullTracker as NullTracker
from .tracking import TrackedRange as TrackedRange
from .tracking import UffdTracker as UffdTracker
from .tracking import choose_tracker as choose_tracker
from .tracking import snapshot_of as snapshot_of
from .tracking import tracked_ranges as tracked_ranges
