"""Makes pictures for the display from the answers to query-migrate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimig.monitor import Convergence
from trimig.policy import convergence, eta
from trimig.status import QMP_IN_POSTCOPY, Status

from ..encodings import encoding_records_of
from ..picture import Picture, with_estimate

if TYPE_CHECKING:
    from .state import State


class Tracker:
    """Makes pictures for the display from the answers to query-migrate. The display never steps back.

    A trimig reports why the passes do not converge; for a QEMU, which does not, the reason is derived from its figures.
    """

    def __init__(self, settings: Mapping[str, Any], *, postcopy: bool = False) -> None:
        """*settings*: the parameters in force; *postcopy*: the capability postcopy-ram is on."""
        self._limit = settings.get("downtime-limit", 300) / 1000
        self._bandwidth = int(settings.get("max-bandwidth", 0))
        self._postcopy_bandwidth = int(settings.get("max-postcopy-bandwidth", 0))
        self._max_throttle = int(settings.get("max-cpu-throttle", 99))
        self._postcopy = postcopy
        self._iteration = 0
        self._copied = 0
        self._sent = 0
        self._elapsed = 0.0
        self._last: Picture | None = None
        self._why: Convergence | None = None
        self._stall = eta.Stall()
        self._remaining_time = eta.RemainingTime()
        #: The message about the passes, shown once.
        self.warnings: list[str] = []

    def pictures(self, state: State) -> list[Picture]:
        """The pictures for *state*: the end of the earlier pass, if that is new, and the present moment."""
        now = self._picture(state)
        found = []
        if self._last is not None and 0 < self._last.iteration < now.iteration and now.status not in QMP_IN_POSTCOPY:
            found.append(self._over(self._last, now, state))
            now = dataclasses.replace(now, **self._judgement(now))
        self._last = now
        return [with_estimate(picture, self._remaining_time) for picture in [*found, now]]

    def _over(self, last: Picture, now: Picture, state: State) -> Picture:
        """The outcome of the pass before *now*: its dirtied pages are known when the next pass begins."""
        progress = convergence.Progress(
            remaining=now.remaining,
            bandwidth=now.bandwidth or last.bandwidth,
            iteration=last.iteration,
            elapsed=now.elapsed,
            dirty_rate=now.dirty_rate or 0.0,
            least=self._stall.least,
            throttle=now.throttle,
        )
        bounds = convergence.Bounds(
            downtime_limit=self._limit,
            max_bandwidth=self._bandwidth,
            postcopy=self._postcopy,
            auto_converge=now.throttle > 0,
            max_throttle=self._max_throttle,
        )
        reported = state.info.get("convergence")
        if isinstance(reported, Mapping):
            self._why = Convergence(
                converging=bool(reported["converging"]),
                reason=str(reported["reason"]),
                advice=tuple(reported["advice"]),
            )
        else:
            self._why = convergence.explain(progress, bounds)
        # A trimig at the other end reports this itself.
        if self._stall.passed(now.remaining) and not self._why.converging and "owner" not in state.info:
            self.warnings.append(convergence.stalled(self._why))
        seconds = math.inf
        if self._why.converging:
            seconds = eta.later_passes_seconds(
                ahead=progress.remaining,
                bandwidth=progress.bandwidth,
                dirty_rate=progress.dirty_rate,
                downtime_limit=self._limit,
            )
        self._remaining_time.passed(now.elapsed, seconds)
        return dataclasses.replace(
            last,
            status=Status.ACTIVE.value,
            passed=True,
            copied=last.total,
            remaining=now.remaining,
            dirty_rate=now.dirty_rate,
            expected_downtime=now.expected_downtime,
            **self._judgement(now),
        )

    def _judgement(self, now: Picture) -> dict[str, Any]:
        if self._why is None or now.status in QMP_IN_POSTCOPY:
            return {}
        return {"converging": self._why.converging, "reason": self._why.reason, "advice": self._why.advice}

    def _picture(self, state: State) -> Picture:
        info = state.info
        ram, cache = info.get("ram", {}), info.get("xbzrle-cache", {})
        total = int(ram.get("total", self._last.total if self._last else 0))
        remaining = int(ram.get("remaining", 0))
        following = state.migration in QMP_IN_POSTCOPY
        self._iteration = max(self._iteration, int(ram.get("dirty-sync-count", 0)))
        self._sent = max(self._sent, int(ram.get("transferred", 0)))
        self._elapsed = max(self._elapsed, info.get("total-time", 0) / 1000)
        if ram:
            self._copied = max(self._copied, total if self._iteration > 1 else total - remaining)
        expected = info.get("expected-downtime")
        now = Picture(
            role="source",
            status=state.migration,
            iteration=self._iteration,
            passed=False,
            total=total,
            copied=self._copied,
            sent=self._sent,
            remaining=remaining,
            bandwidth=max(0.0, float(ram.get("mbps", 0))) * 1e6 / 8,
            dirty_rate=None if following else float(ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)),
            max_bandwidth=self._postcopy_bandwidth if following else self._bandwidth,
            expected_downtime=None if expected is None else expected / 1000,
            downtime_limit=self._limit,
            elapsed=self._elapsed,
            encoded=int(cache.get("pages", 0)) * int(ram.get("page-size", 4096)),
            encoded_sent=int(cache.get("bytes", 0)),
            encodings=tuple(encoding_records_of(info)),
            requests=int(ram.get("postcopy-requests", 0)) if following else None,
            throttle=int(info.get("cpu-throttle-percentage", 0)),
        )
        return dataclasses.replace(now, **self._judgement(now))
