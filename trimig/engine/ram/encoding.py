"""The choice of the encoding in which pages are sent in precopy. All encoders are made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ... import formats
from ...errors import ConfigError
from .auto import AutoEncoder
from .compress import CompressEncoder
from .xbzrle import XbzrleEncoder

if TYPE_CHECKING:
    from ...config.config import Config
    from ...config.parameters import Parameters
    from ...guest import Pages, RamBlock
    from ...monitor.statistics import Counters
    from .records import PageEncoder, PageSender


def choose_encoder(
    config: Config,
    parameters: Callable[[], Parameters],
    blocks: Sequence[RamBlock],
    counters: Counters,
    delivered: Callable[[], int],
) -> PageEncoder | None:
    """The encoder for the capabilities of *config*; None for PAGE and ZERO records only.

    Args:
        config: as at the begin of the migration.
        parameters: returns the present parameters, which may change during the migration.
        blocks: the guest's RAM.
        counters: the encoder adds its members of ``query-migrate``.
        delivered: returns the number of bytes that the connections have transported.

    Raises:
        ConfigError: there is not enough memory for the encoder.
    """
    differences = _xbzrle(parameters, blocks, counters) if config.capabilities.xbzrle else None
    compressed = CompressEncoder(parameters, counters) if config.capabilities.compress else None
    if config.encoding == "auto":
        return AutoEncoder(compressed, differences, parameters, blocks, counters, delivered)
    if compressed is None or differences is None:
        return compressed or differences
    return FirstThen(compressed, differences)


def check_encoding(config: Config) -> None:
    """Check that ``encoding = "auto"`` has something to choose.

    Raises:
        ConfigError: no capability in force offers another encoding than plain pages.
    """
    capabilities = config.capabilities
    if config.encoding != "auto":
        return
    if capabilities.multifd:
        raise ConfigError(
            'encoding = "auto" has nothing to choose with multifd: on the data channels each page goes by multifd-compression, '
            "which both sides must know before; turn multifd off, or leave encoding off",
            name="encoding",
        )
    if not (capabilities.xbzrle or capabilities.compress):
        raise ConfigError(
            'encoding = "auto" has nothing to choose: turn a capability on that it may use, xbzrle or (for a destination up to '
            "QEMU 9.0) compress",
            name="encoding",
        )


class FirstThen:
    """Two encoders: one in the first pass, the other one in all later passes, as QEMU has compress and xbzrle together. A
    :class:`.records.PageEncoder`.
    """

    def __init__(self, first: PageEncoder, then: PageEncoder) -> None:
        self._first = first
        self._then = then
        self._present = first

    def begin_pass(self, *, first: bool, last: bool) -> None:
        """See :class:`.records.PageEncoder`."""
        self._present = self._first if first else self._then
        self._present.begin_pass(first=first, last=last)

    def zeros(self, block: str, indices: NDArray[np.int64]) -> None:
        """See :class:`.records.PageEncoder`."""
        self._present.zeros(block, indices)

    async def send(
        self, records: PageSender, block: str, pages: Pages, indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """See :class:`.records.PageEncoder`.

        **Cancellation:** as for :meth:`.records.PageSender.send`.
        """
        return await self._present.send(records, block, pages, indices)


def _xbzrle(present: Callable[[], Parameters], blocks: Sequence[RamBlock], counters: Counters) -> XbzrleEncoder:
    def cache_size() -> int:
        parameters = present()
        return parameters.xbzrle_cache_size

    try:
        return XbzrleEncoder(blocks, cache_size, counters)
    except MemoryError as error:
        size = formats.size(cache_size())
        raise ConfigError(
            f"there is not enough memory for an XBZRLE cache of {size}", name="xbzrle-cache-size"
        ) from error
