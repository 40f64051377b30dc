"""The iterative sections that are read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ..constants import RAM_VERSION
from .ram import RamReader
from .reader import SectionFormat

#: By idstr. All other iterative sections are refused by name.
SECTIONS: Final[Mapping[str, SectionFormat]] = MappingProxyType({"ram": SectionFormat(RAM_VERSION, RamReader)})
#: The same for a stream with data channels beside it (capability multifd).
SECTIONS_WITH_MULTIFD: Final[Mapping[str, SectionFormat]] = MappingProxyType(
    {**SECTIONS, "ram": SectionFormat(RAM_VERSION, functools.partial(RamReader, multifd=True))}
)
