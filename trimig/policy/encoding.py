"""Which encoding the pages of a batch get (``encoding = "auto"``): that by which a page is soonest gone, as measured.

An encoder takes time of a processor and saves bytes. Which of the two counts depends on the connection and on how free the
processors are. How free they are is taken from the encoding itself: the processor time of a thread that encodes, divided by
the time that passes meanwhile, is its share of a processor. The load average would have this process in it, is a minute old,
and knows nothing of the limits of a container.

Times are seconds, sizes bytes, rates bytes per second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

from ..guest import PAGE_SIZE

#: The encoding of a page that no encoder has taken.
PLAIN: Final = "plain"
#: Bytes of a plain page: the word in front of it, and the page.
PLAIN_BYTES: Final = 8 + PAGE_SIZE
#: Pages by which an encoding is known. So many are tried at once if it is not.
TRIAL_PAGES: Final = 64
#: After so many pages an older measurement has half its weight.
_HALF_LIFE: Final = 256
#: Times that differ by less than this share are the same.
_SAME: Final = 0.1
#: The time of the last choice counts with this factor.
_STAYS: Final = 0.95
#: Of the time that all pages take, an encoding that was not chosen gets at most one part in so many, to be measured again.
_TRIES: Final = 16
#: At least one page in so many is tried.
_FEWEST_TRIES: Final = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """An encoding that may be chosen.

    Attributes:
        name: see :data:`PLAIN`; otherwise the capability.
        threads: number of threads that encode pages at the same time.
        overlapped: pages are encoded while others are being sent. If False, in turns with the sending.
    """

    name: str
    threads: int = 1
    overlapped: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The connection.

    Attributes:
        link: bytes per second that it takes while it is kept busy; 0 if that was not measured.
        limit: bytes per second that may be sent; 0 for no limit.
    """

    link: float
    limit: float

    @property
    def bound(self) -> bool:
        """The limit, and not the connection, is the bottleneck."""
        return 0 < self.limit < self.link


class Average:
    """A mean in which older values count less and less.

    Args:
        half_life: after values of this weight an older one has half its weight.

    Attributes:
        value: None before the first one.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self.value: float | None = None

    def add(self, value: float, weight: float) -> None:
        """Count *value* with *weight*."""
        kept = 0.5 ** (weight / self._half_life)
        self.value = value if self.value is None else self.value * kept + value * (1 - kept)


class _Measured:
    """What pages of one encoding took, each: bytes, processor time, and time that passed meanwhile."""

    def __init__(self) -> None:
        self.pages = 0
        self.size = Average(_HALF_LIFE)
        self.processor = Average(_HALF_LIFE)
        self.elapsed = Average(_HALF_LIFE)

    def add(self, pages: int, size: int, processor: float, elapsed: float) -> None:
        self.pages += pages
        self.size.add(size / pages, pages)
        self.processor.add(processor / pages, pages)
        self.elapsed.add(elapsed / pages, pages)


class EncodingChoice:
    """Chooses for one migration. The same calls with the same arguments have the same results.

    Args:
        encodings: those that may be chosen beside plain pages.
        processors: number of processors that this process may use.

    Attributes:
        present: the last choice.
    """

    def __init__(self, encodings: Sequence[Encoding], processors: int) -> None:
        self._encodings = {encoding.name: encoding for encoding in encodings}
        self._measured = {encoding.name: _Measured() for encoding in encodings}
        self._processors = processors
        self.present = PLAIN

    def record(self, name: str, *, pages: int, size: int, processor: float, elapsed: float) -> None:
        """Some pages were sent by an encoding.

        Args:
            pages: number of the pages, at least 1.
            size: bytes of all their records; of a page that went whole, the page.
            processor: seconds of processor time that encoding them took, of all threads.
            elapsed: the sum of the seconds that passed in these threads meanwhile.
        """
        self._measured[name].add(pages, size, processor, elapsed)

    def is_known(self, name: str) -> bool:
        """Enough pages of this encoding were measured."""
        return name == PLAIN or self._measured[name].pages >= TRIAL_PAGES // 2

    def page_seconds(self, name: str, rates: Rates) -> float:
        """Seconds in which one page is encoded and sent; infinite if the encoding is not known."""
        if name == PLAIN:
            return max(_divided(PLAIN_BYTES, rates.link), _divided(PLAIN_BYTES, rates.limit))
        if not self.is_known(name):
            return math.inf
        encoding, size = self._encodings[name], self._measured[name].size.value
        assert size is not None
        encoded, sent = self._encoding_seconds(name), _divided(size, rates.link)
        busy = max(encoded, sent) if encoding.overlapped else encoded + sent
        return max(busy, _divided(size, rates.limit))

    def processor_seconds(self, name: str) -> float:
        """Seconds of processor time for one page; 0 for a plain one."""
        return 0.0 if name == PLAIN else self._measured[name].processor.value or 0.0

    def _encoding_seconds(self, name: str) -> float:
        """Seconds for one page until it is encoded, with the processors that the threads get."""
        found = self._measured[name]
        processor, elapsed = found.processor.value or 0.0, found.elapsed.value or 0.0
        if not processor:
            return elapsed
        got = self._encodings[name].threads * processor / max(elapsed, processor)
        return processor / min(got, self._processors)

    def choose(self, rates: Rates, *, without: str | None = None) -> str:
        """The encoding from now on.

        Of those whose times differ from the least by less than a tenth, it is the one that needs least processor time: a plain page
        needs none. The last choice is counted as a little faster than it is, so that the choice does not swing.

        Args:
            without: may not be chosen now.
        """
        times = {name: self.page_seconds(name, rates) for name in (PLAIN, *self._encodings) if name != without}
        if self.present in times:
            times[self.present] *= _STAYS
        enough = min(times.values()) / (1 - _SAME)
        self.present = min((name for name in times if times[name] <= enough), key=self.processor_seconds)
        return self.present

    def one_in(self, name: str, rates: Rates) -> int:
        """One page in so many gets this encoding while another one is chosen: a power of two.

        So a change of what the guest writes, or of how free the processors are, is noticed. The pages take at most a sixteenth of
        the time, however slow the encoding is.
        """
        best = self.page_seconds(self.present, rates)
        seconds = self.page_seconds(name, rates)
        if not self.is_known(name) or seconds <= best:
            return _TRIES
        wanted = _TRIES * seconds / best if best else math.inf
        return _FEWEST_TRIES if wanted >= _FEWEST_TRIES else 1 << math.ceil(math.log2(wanted))


def _divided(size: float, rate: float) -> float:
    return size / rate if rate else 0.0
