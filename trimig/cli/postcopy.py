"""Postcopy for the commands that migrate a guest themselves: its options, its schedule and its signals."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import click

from trimig import formats
from trimig.errors import ConfigError, HandoverUncertain, Ownership, PostcopyLost, StateError, TrimigError
from trimig.status import IN_POSTCOPY, TERMINAL, Status

from .options import PERCENT, SECONDS

if TYPE_CHECKING:
    from trimig.config import Config
    from trimig.monitor import Monitor, Statistics

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds between two polls.
_EVERY: Final = 0.01
_PAGE: Final = 4096
#: Bytes per second.
_SLOWEST: Final = 64 << 10
#: Seconds.
_RECOVERY: Final = 60.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PostcopySchedule:
    """When to switch to postcopy, and when to cut the connection on purpose; shares of the memory, 0 to 1."""

    after: float
    #: The share of the memory left at the switch; None for no cut.
    cut_after: float | None = None

    async def run(self, monitor: Monitor) -> None:
        """Switch and cut, once each, while *monitor*'s migration runs.

        **Cancellation:** no switch and no cut happens any more.
        """
        async for now in monitor.watch(_EVERY):
            if now.status in TERMINAL:
                return
            if now.status is Status.SETUP and not self.after and self.cut_after is None:
                monitor.start_postcopy()  # before the first pass, because that pass may end before the next poll
                break
            if now.total and now.status is Status.ACTIVE and _sent(now) >= self.after:
                if self.cut_after is not None and not monitor.config.parameters.max_postcopy_bandwidth:
                    # Send the rest in about a second: without a limit it would arrive before the cut.
                    monitor.set_parameters(max_postcopy_bandwidth=max(now.remaining, _SLOWEST))
                monitor.start_postcopy()
                break
        if self.cut_after is None:
            return
        begun: Statistics | None = None
        async for now in monitor.watch(_EVERY):
            if now.status is not Status.POSTCOPY_ACTIVE:
                continue
            begun = begun or now
            if begun.remaining and 1 - now.remaining / begun.remaining >= self.cut_after:
                with contextlib.suppress(StateError):  # all pages have been sent meanwhile
                    monitor.pause("the connection was cut on purpose (--cut-after)")
                return


class PostcopyInterrupts:
    """Signals in postcopy: the first is refused, because the guest needs the rest of its memory; the second
    abandons the rest.

    :meth:`decide` is for :func:`trimig.cli.runner.run`.
    """

    def __init__(self, statuses: Callable[[], Status], give_up: Callable[[], None]) -> None:
        """*statuses* returns the present status; *give_up* is called before the job is cancelled."""
        self._status = statuses
        self._give_up = give_up
        self._warned = False

    @classmethod
    def of(cls, monitor: Monitor) -> Self:
        """For a job that is a migration with that monitor."""
        return cls(lambda: monitor.status, functools.partial(drop, monitor))

    @staticmethod
    def truth(monitor: Monitor) -> TrimigError | None:
        """The error for a guest whose migration a signal has ended; None if the source has its guest unchanged."""
        if monitor.status is Status.POSTCOPY_LOST:
            return PostcopyLost("the rest was given up: the destination has the guest without all of its memory")
        if monitor.owner is Ownership.UNKNOWN:
            return HandoverUncertain("it was ended before the answer came: either side may have the guest")
        return None

    def decide(self) -> tuple[str, bool] | None:
        """The text to print, and whether the signal is obeyed; None before the switch and after the end."""
        if self._status() not in IN_POSTCOPY:
            return None
        if not self._warned:
            self._warned = True
            return (
                "it is too late to cancel: the guest is at the destination, and the rest of its memory follows; "
                "the next signal gives that up, and the guest cannot go on then"
            ), False
        self._give_up()
        return "giving the rest up; the guest stays at the destination, with a part of its memory", True


def followed(info: Mapping[str, Any]) -> str:
    """What a summary says of postcopy: the bytes that have followed the guest. Empty if there was none.

    Args:
        info: the answer to ``query-migrate`` at the end.
    """
    count = info.get("ram", {}).get("postcopy-bytes", 0)
    return f"; by postcopy: {formats.size(count)} of it followed the guest" if count else ""


def drop(monitor: Monitor) -> None:
    """Break the connection of a migration in postcopy, so that a cancellation takes effect; otherwise do nothing."""
    with contextlib.suppress(StateError):
        monitor.pause("the rest was given up")


def _sent(now: Statistics) -> float:
    """The share of the memory that has been sent in the first pass; 1 after the first pass."""
    return 1.0 if now.iteration > 1 else (now.normal_pages + now.zero_pages + now.encoded_pages) * _PAGE / now.total


def options(command: F, *, also: tuple[str, ...] = ()) -> F:
    """``--postcopy`` and ``--postcopy-after``; the command gets ``postcopy_after: float | None``.

    Use it above :func:`trimig.cli.options.config_options`, because it also turns on the capability.

    Args:
        also: capabilities that postcopy turns on as well, unless the user turns them off.
    """

    @click.option(
        "--postcopy",
        is_flag=True,
        help="Switch to postcopy after the first pass: the guest runs at the destination, and its memory follows.",
    )
    @click.option(
        "--postcopy-after",
        type=PERCENT,
        metavar="PERCENT",
        help="The same, as soon as that much of the memory has been sent; for example 40%.",
    )
    @functools.wraps(command)
    def decorated(*args: Any, postcopy: bool, postcopy_after: float | None, **kwargs: Any) -> Any:
        after = postcopy_after if postcopy_after is not None else (1.0 if postcopy else None)
        if after is not None:
            kwargs["capabilities"] = (*also, *kwargs["capabilities"], "postcopy-ram")
        return command(*args, postcopy_after=after, **kwargs)

    return decorated  # type: ignore[return-value]  # the same callable with other keywords: not expressible


recover_option: Final = click.option(
    "--recover-for",
    type=SECONDS,
    metavar="SECONDS",
    help="In postcopy: when the connection is lost, look for the other side again for so long.  [default: 60]",
)


def refuse_pause(config: Config, command: str) -> None:
    """Refuse pause-before-switchover: *command* has no socket over which a client could let the migration go on.

    Raises:
        ConfigError: the capability is on.
    """
    if config.capabilities.pause_before_switchover:
        raise ConfigError(
            f"trimig {command} cannot be told to go on after pause-before-switchover, so it would wait for ever; host "
            "the guest with trimig run --qmp ADDR, and use trimig migrate and trimig continue with that ADDR",
            name="pause-before-switchover",
        )


def recovering(config: Config, seconds: float | None) -> Config:
    """*config* with a time limit for recovering a lost connection in postcopy (60 s for None)."""
    if not config.capabilities.postcopy_ram or (seconds is None and config.recovery_retry):
        return config  # the value comes from a file
    return dataclasses.replace(config, recovery_retry=True, recovery_timeout=_RECOVERY if seconds is None else seconds)
