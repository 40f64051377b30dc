"""Commands of the main stream, as bytes: number, length, payload (commands.md part 2)."""

from __future__ import annotations

import struct
from typing import Final

from ..errors import RemoteProtocolError
from .constants import Command
from .marks import Mark, is_mark, wrong_length
from .refusals import unknown_command

#: Bytes before the payload: type of the section, number, length.
HEAD: Final = 5

#: Commands whose payload has a fixed length.
_LENGTH: Final = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.PACKAGED: 4,
    Command.ENABLE_COLO: 0,
    Command.POSTCOPY_RESUME: 0,
    Command.SWITCHOVER_START: 0,
}


def read_command(data: memoryview, *, marks: bool) -> tuple[int, bytes] | None:
    """Number and payload of the command at the start of *data*, which is its type byte.

    Args:
        marks: the sender is a trimig that may use the commands of :mod:`.marks`.

    Returns:
        None if the command is not complete.

    Raises:
        RemoteProtocolError: without an offset; the command is unknown, or has an illegal length.
    """
    if len(data) < HEAD:
        return None
    number, length = struct.unpack_from(">HH", data, 1)
    problem: str | None = None
    if marks and is_mark(number):
        problem = wrong_length(Mark(number), length)
    else:
        try:
            command = Command(number)
        except ValueError:
            raise unknown_command(number, length) from None
        expected = _LENGTH.get(command, length)
        if length != expected:
            problem = f"command {command.name} with {length} bytes of payload, expected {expected}"
    if problem is not None:
        raise RemoteProtocolError(problem)
    return (number, bytes(data[HEAD : HEAD + length])) if len(data) >= HEAD + length else None
