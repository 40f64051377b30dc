"""The choice of the encoding in which pages are sent in precopy. All encoders are made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ... import formats
from ...errors import ConfigError
from .xbzrle import XbzrleEncoder

if TYPE_CHECKING:
    from ...config.config import Config
    from ...config.parameters import Parameters
    from ...guest import RamBlock
    from ...monitor.statistics import Counters
    from .records import PageEncoder


def choose_encoder(
    config: Config, parameters: Callable[[], Parameters], blocks: Sequence[RamBlock], counters: Counters
) -> PageEncoder | None:
    """The encoder for the capabilities of *config*; None for PAGE and ZERO records only.

    Args:
        config: as at the begin of the migration.
        parameters: returns the present parameters, which may change during the migration.
        blocks: the guest's RAM.
        counters: the encoder adds its members of ``query-migrate``.

    Raises:
        ConfigError: there is not enough memory for the encoder.
    """
    if config.capabilities.xbzrle:
        return _xbzrle(parameters, blocks, counters)
    return None


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
