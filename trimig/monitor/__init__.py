"""The record of one migration: its status, its figures, its events and its listeners.

:class:`Monitor` is the public half, which watches and steers. :class:`.core.MonitorCore` is the half that the engine
changes.
"""

from .monitor import Monitor as Monitor
from .statistics import Convergence as Convergence
from .statistics import Downtime as Downtime
from .statistics import EncodingUse as EncodingUse
from .statistics import Event as Event
from .statistics import Statistics as Statistics
from .statistics import Summary as Summary
