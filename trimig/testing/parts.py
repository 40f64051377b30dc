"""The parts of a scripted guest: blocks of NumPy arrays, a device, and a dirty tracker."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from ..errors import RemoteProtocolError
from ..guest import PAGE_SIZE, PageBitmap, Pages

if TYPE_CHECKING:
    from .fakes import ScriptedGuest


class FakeBlock:
    """A RAM block in ordinary memory."""

    def __init__(self, name: str, pages: Pages, update: Callable[[], None]) -> None:
        self._name = name
        self._pages = pages
        self._update = update

    @property
    def name(self) -> str:
        """The id on the wire."""
        return self._name

    @property
    def length(self) -> int:
        """Bytes."""
        return self._pages.nbytes

    @property
    def pages(self) -> Pages:
        """The memory, shape ``(pages, PAGE_SIZE)``, with all writes of the guest up to now."""
        self._update()
        return self._pages

    def absent(self) -> PageBitmap | None:
        """None: a scripted guest does not know its absent pages."""
        return None


class FakeDevice:
    """A device of *size* opaque bytes. The first eight count the writes of its guest.

    Args:
        idstr: device id string.
        instance_id: the number that distinguishes devices of the same idstr.
        size: bytes of state, at least 8.
        seed: for the initial bytes.
        load_error: raised by :meth:`load`, to play a destination that refuses.
    """

    #: The number of the version that is saved.
    version_id: int = 1

    def __init__(
        self,
        idstr: str = "fake",
        *,
        instance_id: int = 0,
        size: int = 16,
        seed: int = 0,
        load_error: Exception | None = None,
    ) -> None:
        if size < 8:
            raise ValueError("a fake device has at least 8 bytes")
        self.idstr = idstr
        self.instance_id = instance_id
        #: The state.
        self.data = bytearray(random.Random(f"{seed} {idstr} {instance_id}").randbytes(size))
        self.load_error = load_error

    def set_write_count(self, writes: int) -> None:
        """Set the number of writes."""
        self.data[:8] = writes.to_bytes(8, "big")

    def save(self) -> bytes:
        """All bytes."""
        return bytes(self.data)

    def measure(self, data: memoryview, version_id: int) -> int | None:
        """The fixed size, or None if *data* is shorter; RemoteProtocolError for a newer version."""
        self._check(version_id)
        return len(self.data) if len(data) >= len(self.data) else None

    def load(self, payload: bytes, version_id: int) -> None:
        """Load the bytes; RemoteProtocolError for another size or a newer version."""
        self._check(version_id)
        if len(payload) != len(self.data):
            raise RemoteProtocolError(f"{len(payload)} bytes for a device of {len(self.data)}", section=self.idstr)
        if self.load_error is not None:
            raise self.load_error
        self.data[:] = payload

    def describe(self) -> Mapping[str, Any]:
        """One buffer field."""
        size = len(self.data)
        return {
            "name": self.idstr,
            "instance_id": self.instance_id,
            "vmsd_name": self.idstr,
            "version": self.version_id,
            "fields": [{"name": "data", "type": "buffer", "size": size}],
        }

    def _check(self, version_id: int) -> None:
        if version_id > self.version_id:
            raise RemoteProtocolError(f"version {version_id} is newer than {self.version_id}", section=self.idstr)


class MarksTracker:
    """Dirty tracking by the guest's own marks: exact, because only the guest writes its memory."""

    method = "marks"

    def __init__(self, guest: ScriptedGuest) -> None:
        self._guest = guest
        self._dirty: dict[str, PageBitmap] = {}

    async def start(self) -> None:
        """Tracking on. **Cancellation:** it may be on."""
        await trio.lowlevel.checkpoint()
        self._guest.update()
        self._clear()
        self._guest.attach(self)
        await trio.lowlevel.checkpoint()

    async def sync(self) -> Mapping[str, PageBitmap]:
        """Get and clear. **Cancellation:** nothing was cleared."""
        await trio.lowlevel.checkpoint()
        self._guest.sync_point()
        result = self._dirty
        self._clear()
        return result

    def stop(self) -> None:
        """Tracking off. Idempotent."""
        self._guest.detach(self)

    def mark(self, block: str, page: int) -> None:
        """Mark a page that the guest has written."""
        self._dirty[block][page] = True

    def _clear(self) -> None:
        self._dirty = {block.name: np.zeros(block.length // PAGE_SIZE, bool) for block in self._guest.ram}
