"""The interface to find the end of a device section, which only the device knows."""

from __future__ import annotations

from typing import Protocol


class Measure(Protocol):
    """Finds the length of a device's payload."""

    def __call__(self, idstr: str, instance_id: int, version_id: int, data: memoryview, /) -> int | None:
        """The number of bytes of the payload at the start of *data*; None if it is not complete yet.

        Raises RemoteProtocolError for an unknown device, a version that is too new, or impossible data.
        """
