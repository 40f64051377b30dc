"""Control over QMP, QEMU's monitor protocol: a server and a client.

``interface`` lies between the two halves of the server. ``messages``, ``session``, ``server`` and ``websocket`` hold
the conversation with clients. ``machine`` and ``commands`` execute the commands. ``client`` also talks to a QEMU.
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
