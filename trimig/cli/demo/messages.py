"""The messages between ``trimig demo`` and its host processes: JSON objects, one in each packet."""

from __future__ import annotations

import base64
import pickle
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    import trimig

#: No packet is longer.
MAX_PACKET: Final = 1 << 16


def pack_config(config: trimig.Config) -> str:
    """*config* for a request. Pickle keeps all of it; both processes run the same program."""
    return base64.b64encode(pickle.dumps(config)).decode()


def unpack_config(text: str) -> trimig.Config:
    """The configuration that :func:`pack_config` packed."""
    return cast("trimig.Config", pickle.loads(base64.b64decode(text)))
