"""A few dirty pages of each pass, in the encodings that are off: what they would take is the base of advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PageBitmap, Pages
from ...monitor.statistics import PageCost
from ...policy.encoding import PLAIN_BYTES, Average
from ...policy.encoding_advice import DIFFERENCES, ZLIB
from ...wire.pages.compressed import deflate
from ...wire.pages.xbzrle_pages import encode_pages
from .effort import timed

if TYPE_CHECKING:
    from ...config.config import Config
    from ...monitor.statistics import Counters

#: Pages of each pass that are kept, and compared if the next pass has them again; and those that are compressed. Together they take
#: less than a millisecond.
_KEPT: Final = 8
_COMPRESSED: Final = 4
#: Pages after which an older measurement has half its weight.
_HALF_LIFE: Final = 32
#: Bytes of a record beside its content: the word, and what stands in front of a difference or of a zlib stream.
_DELTA_HEAD: Final = 8 + 3
_ZLIB_HEAD: Final = 8 + 4
_LEVEL: Final = 1


def unused_encodings(config: Config, *, several_channels: bool) -> tuple[str, ...]:
    """The capabilities that encode pages, are off, and could be on beside those that are on.

    Args:
        several_channels: the transport can open further connections to the destination.
    """
    c, found = config.capabilities, []
    if not (c.xbzrle or c.multifd):
        found.append("xbzrle")
    if c.multifd:
        found += ["multifd"] if config.parameters.multifd_compression == "none" else []
    elif several_channels and not (c.xbzrle or c.compress or c.postcopy_ram):
        found.append("multifd")
    elif config.peer.compressed_pages != "no" and not (c.compress or c.postcopy_preempt or c.postcopy_ram):
        found.append("compress")
    return tuple(found)


class PageSampler:
    """Samples the dirty pages of one migration.

    Args:
        counters: get the measurements.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._kept: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._before: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._means = {name: (Average(_HALF_LIFE), Average(_HALF_LIFE)) for name in (DIFFERENCES, ZLIB)}
        self._compressed = 0

    def begin_pass(self) -> None:
        """A pass begins."""
        self._before, self._kept = self._kept, {}
        self._compressed = 0

    def look(self, block: str, pages: Pages, todo: PageBitmap) -> None:
        """Look at some of the pages of *block* that the pass sends, before it does.

        Args:
            pages: where to read the content.
            todo: the pages that are sent.
        """
        room = _KEPT - len(self._kept)
        dirty = np.flatnonzero(todo)
        if room <= 0 or not len(dirty):
            return
        again = [index for name, index in self._before if name == block and todo[index]][:room]
        spread = dirty[:: max(1, len(dirty) // room)].tolist()
        chosen = np.array(list(dict.fromkeys([*again, *spread]))[:room], np.int64)
        copies = pages[chosen]  # the guest may write meanwhile
        self._kept.update({(block, index): copy for index, copy in zip(chosen.tolist(), copies, strict=True)})
        if again:
            old = np.stack([self._before[block, index] for index in again])
            deltas, took = timed(encode_pages, old, copies[: len(again)])
            sizes = [PLAIN_BYTES if delta is None else _DELTA_HEAD + len(delta) for delta in deltas if delta != b""]
            self._add(DIFFERENCES, sum(sizes), len(deltas), took.processor)
        some = copies[: _COMPRESSED - self._compressed]
        if len(some):
            self._compressed += len(some)
            streams, took = timed(_deflated, some)
            size = sum(min(PLAIN_BYTES, _ZLIB_HEAD + len(stream)) for stream in streams)
            self._add(ZLIB, size, len(some), took.processor)

    def _add(self, name: str, size: int, count: int, seconds: float) -> None:
        sizes, times = self._means[name]
        sizes.add(size / count, count)
        times.add(seconds / count, count)
        self._counters.samples[name] = PageCost(size=sizes.value or 0.0, seconds=times.value or 0.0)


def _deflated(pages: Pages) -> Sequence[bytes]:
    return [deflate(page.data, _LEVEL) for page in pages]
