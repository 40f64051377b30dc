"""The encodings that would help a migration that does not converge, with the downtime that each of them would leave.

The prediction is the time for what is left, if each of its pages took what the sampled ones did. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from .. import formats
from ..guest import PAGE_SIZE
from ..monitor.statistics import PageCost

#: The names of samples: differences, and pages compressed by zlib at level 1.
DIFFERENCES: Final = "xbzrle"
ZLIB: Final = "zlib"
#: What each capability does, where it must be on, and the sample that its effect is predicted from.
_WAYS: Final[Mapping[str, tuple[str, str]]] = {
    "xbzrle": ("send differences (capability xbzrle)", DIFFERENCES),
    "multifd": ("compress pages (capability multifd with multifd-compression zstd, at both sides)", ZLIB),
    "compress": ("compress pages (capability compress, at both sides)", ZLIB),
}
#: An encoding is no advice if it leaves more than this share of the downtime.
_HELPS: Final = 0.9


def predicted_downtime(rest: float, bandwidth: float, cost: PageCost, *, processors: int) -> float:
    """Seconds for *rest* bytes of memory.

    Args:
        bandwidth: bytes per second.
        processors: number of them that encode while pages are sent; 0 for an encoder that does so in turns with the sending.
    """
    sending = cost.size / bandwidth
    page = max(cost.seconds / processors, sending) if processors else cost.seconds + sending
    return rest / PAGE_SIZE * page


def encoding_advice(
    rest: float,
    bandwidth: float,
    downtime: float,
    *,
    capabilities: Sequence[str],
    samples: Mapping[str, PageCost],
    processors: int,
) -> tuple[str, ...]:
    """One clause for each capability that would help, the most effective first. Those whose effect is not known stand last.

    Args:
        rest: bytes of memory that are left.
        bandwidth: bytes per second, above 0.
        downtime: seconds that the rest takes as things are.
        capabilities: that could be turned on.
        samples: what a dirtied page would take, by the names above, as far as it was measured.
        processors: number of them for threads that compress.
    """
    found: list[tuple[float, str]] = []
    for capability in capabilities:
        what, sample = _WAYS[capability]
        cost = samples.get(sample)
        if cost is None:
            found.append((math.inf, f"{what}: its effect was not measured"))
            continue
        seconds = predicted_downtime(rest, bandwidth, cost, processors=processors if sample == ZLIB else 0)
        if seconds <= downtime * _HELPS:
            size = formats.size(cost.size)
            found.append(
                (seconds, f"{what}: a dirtied page takes {size} then, and the rest {formats.whole_ms(seconds)}")
            )
    return tuple(clause for _, clause in sorted(found))
