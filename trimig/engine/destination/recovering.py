"""The answer to a source on a recovery connection, and the error for the source of another migration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RemoteProtocolError
from ...wire.return_path import ReceivedPages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...guest import PageBitmap
    from ...wire import events as ev


def bitmap_of(event: ev.CommandElement, received: Mapping[str, PageBitmap]) -> ReceivedPages:
    """The answer to RECV_BITMAP.

    Args:
        received: the received pages, by the block's name.

    Raises:
        RemoteProtocolError: the guest has no such block.
    """
    payload = event.payload
    name = payload[1:].decode("utf-8", "surrogateescape")
    if not payload or len(payload) != 1 + payload[0] or name not in received:
        raise RemoteProtocolError(f"RECV_BITMAP for the unknown RAM block {name!r}", offset=event.at)
    return ReceivedPages(block=name, pages=received[name])


def wrong_attempt(named: bytes | None, at: int) -> RemoteProtocolError:
    """The error for a source that has named another attempt, or no attempt (*named* is None).

    Args:
        at: offset of the element that is legal only for the source of this attempt.
    """
    return RemoteProtocolError(
        "this connection is of the source of another migration: the id of the attempt is another one"
        if named is not None
        else "this connection is of the source of another migration: it names no attempt, and this one has an id",
        offset=at,
        section="postcopy",
    )
