"""Control from outside, in QEMU's own language: QMP, a server for it and a client.

``interface`` is where the two halves of the server meet: the one that talks (``messages``, ``session``, ``server``,
``websocket``), and the one that does (the machine and its commands). ``client`` is the other end, for a QEMU as well.
"""

from ..config.addresses import uri_of as uri_of
from .client import Client as Client
from .client import connect as connect
from .interface import CommandFailed as CommandFailed
from .interface import Dispatcher as Dispatcher
from .interface import Session as Session
from .machine import Machine as Machine
from .server import serve as serve
from .websocket import serve_websocket as serve_websocket
