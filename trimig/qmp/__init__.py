"""Control from outside, in QEMU's own language: QMP, a server for it and a client.

``interface`` is where the two halves of the server meet: the one that talks (connections, JSON), and the one that does
(the machine and its commands).
"""

from .interface import CommandFailed as CommandFailed
from .interface import Dispatcher as Dispatcher
from .interface import Session as Session
