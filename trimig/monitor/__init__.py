"""The record of one migration: its status, its figures, its events, and who listens to them.

:class:`Monitor` is the public half: it watches and steers. :class:`.core.MonitorCore` is the half that the engine moves.
"""

from .monitor import Monitor as Monitor
from .statistics import WHY_CLOSED as WHY_CLOSED
from .statistics import Convergence as Convergence
from .statistics import Downtime as Downtime
from .statistics import Event as Event
from .statistics import Statistics as Statistics
from .statistics import Summary as Summary
