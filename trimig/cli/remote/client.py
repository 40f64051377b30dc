"""A guest behind a QMP socket, as the control commands see it: a ``trimig run``, or a QEMU.

What both answer is taken as it comes; where a QEMU does not say something (the owner of the guest), it follows from
what it does say. Every question is bounded in time, because a process that has stopped answers none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, Protocol, TypeVar

import click
import trio

import trimig
from trimig import formats, qmp
from trimig.monitor import Convergence
from trimig.policy import convergence, eta

from ..exit_codes import FAILED, INCOMPLETE, UNCERTAIN
from ..picture import FOLLOWING, Picture, with_estimate

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds for one answer. A QEMU that stops its guest for the switchover answers nothing meanwhile.
ANSWER_LIMIT: Final = 30.0
#: Seconds for the greeting.
CONNECT_LIMIT: Final = 5.0
#: Seconds for a cancelled migration to be over: the peer's grace, and some.
CANCEL_LIMIT: Final = 20.0
#: Seconds between two looks at what cannot notify us.
POLL: Final = 0.05
#: Statuses of a migration that is over, or never was. All others go on, also those that a newer QEMU has invented.
ENDED: Final = frozenset({"none", "completed", "failed", "cancelled"})
#: From here on the guest can run at the destination only.
_GIVEN_AWAY: Final = frozenset(
    {"completed", "postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup"}
)
#: The decision has been sent, and is not answered.
_DECIDING: Final = frozenset({"device", "postcopy-device"})
#: The guest stays: nothing was sent that could give it away, or the migration is over, or a QEMU takes its guest back.
_KEPT: Final = frozenset(
    {"none", "setup", "wait-unplug", "cancelling", "cancelled", "failing", "failed", "pre-switchover"}
)


class Refused(click.ClickException):
    """The other side has said no, or cannot be asked; nothing is claimed about the guest."""

    exit_code = FAILED


class Gone(Refused):
    """The connection has ended, or nothing comes over it any more."""


class Busy(Refused):
    """Somebody else is being served there, or nobody is."""


class Client(Protocol):
    """What is needed of :func:`trimig.qmp.connect`."""

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The ``return`` member of the answer; CommandFailed if there is an error instead.

        **Cancellation:** the command may have been executed.
        """

    async def getfd(self, name: str, fd: int) -> None:
        """Pass a descriptor; it stays ours as well.

        **Cancellation:** it may have been passed.
        """

    def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """Events from now on, as they came."""


def qmp_option(command: F) -> F:
    """``--qmp``; the command gets ``address``."""
    return click.option(
        "--qmp",
        "address",
        metavar="ADDR",
        required=True,
        envvar="TRIMIG_QMP",
        help="The QMP socket of a trimig run or a QEMU: unix:PATH or tcp:HOST:PORT. [also: $TRIMIG_QMP]",
    )(command)


def settings_options(command: F) -> F:
    """``-c`` and ``-p``; the command gets ``capabilities`` and ``parameters`` as they were written."""
    parameters = click.option(
        "-p",
        "--parameter",
        "parameters",
        metavar="NAME=VALUE",
        multiple=True,
        help="Set a migration parameter there, by its QMP name; for example -p max-bandwidth=1G.",
    )
    capabilities = click.option(
        "-c",
        "--capability",
        "capabilities",
        metavar="NAME[=off]",
        multiple=True,
        help="Turn a migration capability on there, or off; for example -c pause-before-switchover.",
    )
    return capabilities(parameters(command))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A guest and its migration, as two queries show them."""

    run_state: str
    #: The answer to query-migrate.
    info: Mapping[str, Any]

    @property
    def migration(self) -> str:
        """Its status, ``none`` if there never was one."""
        return str(self.info.get("status", "none"))

    @property
    def ended(self) -> bool:
        """No migration is under way."""
        return self.migration in ENDED

    @property
    def owner(self) -> str:
        """``source``, ``destination`` or ``unknown``: as trimig says, or as far as it follows from what QEMU says.

        Without pause-before-switchover a QEMU stays ``active`` until the destination has answered, so once its guest
        is stopped for the switchover the decision may be on its way.
        """
        if "owner" in self.info:
            return str(self.info["owner"])
        if self.migration in _GIVEN_AWAY:
            return "destination"
        # An `active` migration, or one in a status of a newer QEMU, whose guest is stopped for the switchover.
        stopped = self.migration not in _KEPT and self.run_state == "finish-migrate"
        if self.migration in _DECIDING or stopped:
            return "unknown"
        return "source"

    @property
    def problem(self) -> str:
        """What went wrong; empty if nothing did, or nobody has said what."""
        return str(self.info.get("error-desc", ""))

    @property
    def sentence(self) -> str:
        """One line for people."""
        text = f"guest: {self.run_state}; migration: {self.migration}; owner: {self.owner}"
        if self.run_state == "inmigrate" and self.owner == "source":
            text += f", which is not this side: {self._awaited}"
        why = self.info.get("convergence")
        if isinstance(why, Mapping) and not why.get("converging", True):
            text += (
                f"; it does not converge: {why.get('reason')}; what would help: {' or '.join(why.get('advice', ()))}"
            )
        return f"{text}; {self.problem}" if self.problem else text

    @property
    def _awaited(self) -> str:
        """What a side whose guest has not come does about it."""
        if self.migration in ("failed", "cancelled"):
            return "the last attempt has failed, and nothing listens here until migrate-incoming gives an address"
        addresses = self.info.get("socket-address", ())
        return "a guest is waited for " + (f"at {qmp.uri_of(addresses[0])}" if addresses else "here")

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run_state": self.run_state,
            "migration": self.migration,
            "owner": self.owner,
            **({"error": self.problem} if self.problem else {}),
        }

    @property
    def code(self) -> int:
        """The exit code of a command that has nothing to report but this."""
        if self.owner == "unknown":
            return UNCERTAIN
        return INCOMPLETE if (self.migration, self.owner) == ("failed", "destination") else 0  # a lost postcopy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Capabilities and parameters by their QMP names; some of them, or all."""

    capabilities: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.capabilities or self.parameters)

    def of(self, others: Settings) -> Settings:
        """Those of these whose names are among *others*: what has to be set to undo a change to *others*."""
        return Settings(
            capabilities={k: v for k, v in self.capabilities.items() if k in others.capabilities},
            parameters={k: v for k, v in self.parameters.items() if k in others.parameters},
        )

    def over(self, others: Settings) -> Settings:
        """*others*, changed by these."""
        return Settings(
            capabilities={**others.capabilities, **self.capabilities},
            parameters={**others.parameters, **self.parameters},
        )

    @property
    def words(self) -> str:
        """As options of the command line."""
        return " ".join(
            [f"-c {name}={'on' if state else 'off'}" for name, state in self.capabilities.items()]
            + [f"-p {name}={value if value != '' else repr('')}" for name, value in self.parameters.items()]
        )


class Remote:
    """A client with an address, whose errors are sentences."""

    def __init__(self, client: Client, address: str) -> None:
        self.client = client
        self.address = address

    async def execute(self, name: str, **arguments: Any) -> Any:
        """The answer to a command; underscores in the names of arguments stand for dashes.

        Raises:
            Refused: the other side says no.
            Gone: it does not answer, or the connection has ended.

        **Cancellation:** the command may have been executed.
        """
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        with trio.move_on_after(ANSWER_LIMIT):
            try:
                return await self.client.execute(name, given)
            except qmp.CommandFailed as error:
                raise Refused(f"{self.address} refuses {name}: {error.desc}") from error
            except (OSError, trimig.TrimigError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise Gone(f"the QMP connection to {self.address} is gone: {error}") from error
        raise Gone(
            f"{self.address} has not answered {name} within {formats.duration(ANSWER_LIMIT)}; does the process still run?"
        )

    async def pass_descriptor(self, name: str, descriptor: int) -> None:
        """Give the other side *descriptor* under *name*; a migration to ``fd:NAME`` uses it up.

        Raises:
            Refused: the other side says no.
            Gone: the connection has ended.

        **Cancellation:** it may have been passed.
        """
        try:
            await self.client.getfd(name, descriptor)
        except qmp.CommandFailed as error:
            raise Refused(f"{self.address} refuses getfd: {error.desc}") from error
        except (OSError, trimig.TrimigError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Gone(f"the QMP connection to {self.address} is gone: {error}") from error

    async def forget_descriptor(self, name: str) -> None:
        """Have the other side close what it was given, if it still has it.

        **Cancellation:** it may have been closed.
        """
        with contextlib.suppress(Refused):
            await self.execute("closefd", fdname=name)

    async def state(self) -> State:
        """How it stands now.

        **Cancellation:** has no effect there.
        """
        # In this order: a guest that has been given away in between is then seen as given away.
        run_state = (await self.execute("query-status"))["status"]
        return State(run_state=run_state, info=await self.execute("query-migrate"))

    async def wait_ended(self, limit: float) -> State:
        """Wait until no migration is under way, *limit* seconds at most; the last state seen.

        **Cancellation:** has no effect there.
        """
        return await self.wait(lambda state: state.ended, limit)

    async def wait(self, satisfied: Callable[[State], bool], limit: float) -> State:
        """Wait until the state is as wanted, *limit* seconds at most; the last state seen.

        **Cancellation:** has no effect there.
        """
        end = trio.current_time() + limit
        while True:
            state = await self.state()
            if satisfied(state) or trio.current_time() >= end:
                return state
            await trio.sleep(POLL)

    async def settings(self) -> Settings:
        """All settings in force.

        **Cancellation:** has no effect there.
        """
        rows = await self.execute("query-migrate-capabilities")
        return Settings(
            capabilities={row["capability"]: bool(row["state"]) for row in rows},
            parameters=dict(await self.execute("query-migrate-parameters")),
        )

    async def apply(self, changes: Settings, present: Settings) -> None:
        """Set them, all or none: if the parameters are refused, the capabilities are as they were in *present*.

        **Cancellation:** some may have been set.
        """
        await self._set_capabilities(changes.capabilities)
        if not changes.parameters:
            return
        refusal: Refused | None = None
        try:
            await self.execute("migrate-set-parameters", **changes.parameters)
        except Refused as error:
            refusal = error
        if refusal is not None:
            await self._set_capabilities(present.of(changes).capabilities)
            raise refusal

    async def _set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        rows = [{"capability": name, "state": state} for name, state in capabilities.items()]
        if rows:
            await self.execute("migrate-set-capabilities", capabilities=rows)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Remote]:
    """A connection to the QMP socket at *address*.

    Raises:
        Busy: it is taken and not answered.
        Refused: there is nobody, or somebody who does not speak QMP.
    """
    there = False
    with trio.CancelScope(deadline=trio.current_time() + CONNECT_LIMIT) as limit:
        try:
            async with qmp.connect(address) as client:
                there, limit.deadline = True, math.inf
                yield Remote(client, address)
        except (OSError, trimig.TrimigError, qmp.CommandFailed) as error:
            if there or isinstance(error, trimig.ConfigError):
                raise
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise Refused(text if address in text else f"cannot reach {address}: {text}") from error
    if limit.cancelled_caught:
        raise Busy(
            f"{address} took the connection and has said nothing for {formats.duration(CONNECT_LIMIT)}; a QEMU serves one client at a "
            "time on a QMP socket: is there another?"
        )


# -- settings as they are written --------------------------------------------------------------------------------------

_ON_OFF: Final = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def read_settings(capabilities: Iterable[str], parameters: Iterable[str], present: Settings) -> Settings:
    """The changes that ``-c`` and ``-p`` ask for.

    A value gets the type that the other side's present value has, so that every parameter of every version can be set;
    what it does not list is passed on as it was written, and it will say what it thinks of it.

    Raises:
        trimig.ConfigError: one that is not NAME, NAME=on, NAME=off or NAME=VALUE, or is no number where one is needed.
    """
    states = {}
    for text in capabilities:
        name, equals, word = text.partition("=")
        if equals and word.lower() not in _ON_OFF:
            raise trimig.ConfigError(f"a capability is on or off, not {word!r}", name=name)
        states[name.strip().replace("_", "-")] = _ON_OFF[word.lower()] if equals else True
    values = {}
    for text in parameters:
        name, equals, word = text.partition("=")
        if not equals:
            raise trimig.ConfigError(f"a parameter is given as NAME=VALUE, not {text!r}")
        name = name.strip().replace("_", "-")
        values[name] = _value(name, word.strip(), present.parameters.get(name))
    return Settings(capabilities=states, parameters=values)


def _value(name: str, word: str, like: object) -> object:
    if isinstance(like, bool):
        if word.lower() not in _ON_OFF:
            raise trimig.ConfigError(f"parameter {name!r} is on or off, not {word!r}", name=name)
        return _ON_OFF[word.lower()]
    if isinstance(like, int):
        if any(part in name for part in ("bandwidth", "size")):
            try:
                return trimig.parse_size(word)
            except trimig.ConfigError as error:
                raise trimig.ConfigError(f"parameter {name!r}: {error}", name=name) from error
        try:
            return int(word)
        except ValueError:
            raise trimig.ConfigError(f"parameter {name!r} expects a whole number, not {word!r}", name=name) from None
    if isinstance(like, str):
        return word
    try:
        return json.loads(word)
    except ValueError:
        return word


# -- progress ----------------------------------------------------------------------------------------------------------


class Tracker:
    """Makes pictures for the display of what query-migrate says. What has been shown never steps back.

    Why it does not converge is what a trimig says of it; of a QEMU, which says nothing, it follows from its figures.
    """

    def __init__(self, settings: Mapping[str, Any], *, postcopy: bool = False) -> None:
        """*settings*: the parameters in force; *postcopy*: the rest may be fetched after the switchover."""
        self._limit = settings.get("downtime-limit", 300) / 1000
        self._bandwidth = int(settings.get("max-bandwidth", 0))
        self._postcopy_bandwidth = int(settings.get("max-postcopy-bandwidth", 0))
        self._postcopy = postcopy
        self._iteration = 0
        self._copied = 0
        self._sent = 0
        self._elapsed = 0.0
        self._last: Picture | None = None
        self._why: Convergence | None = None
        self._stall = eta.Stall()
        self._outlook = eta.Outlook()
        #: What is to be said of the passes, once.
        self.warnings: list[str] = []

    def pictures(self, state: State) -> list[Picture]:
        """What is to be shown of *state*: the end of the pass before it, if that is news, and now."""
        now = self._picture(state)
        found = []
        if self._last is not None and 0 < self._last.iteration < now.iteration and now.status not in FOLLOWING:
            found.append(self._over(self._last, now, state))
            now = dataclasses.replace(now, **self._judgement(now))
        self._last = now
        return [with_estimate(picture, self._outlook) for picture in [*found, now]]

    def _over(self, last: Picture, now: Picture, state: State) -> Picture:
        """The outcome of the pass before *now*: what was dirtied in it is known when the next one begins."""
        progress = convergence.Progress(
            remaining=now.remaining,
            bandwidth=now.bandwidth or last.bandwidth,
            iteration=last.iteration,
            elapsed=now.elapsed,
            dirty_rate=now.dirty_rate or 0.0,
            least=self._stall.least,
        )
        bounds = convergence.Bounds(downtime_limit=self._limit, max_bandwidth=self._bandwidth, postcopy=self._postcopy)
        told = state.info.get("convergence")
        if isinstance(told, Mapping):
            self._why = Convergence(
                converging=bool(told["converging"]), reason=str(told["reason"]), advice=tuple(told["advice"])
            )
        else:
            self._why = convergence.explain(progress, bounds)
        # A trimig at the other end says so itself.
        if self._stall.passed(now.remaining) and not self._why.converging and "owner" not in state.info:
            self.warnings.append(convergence.stalled(self._why))
        seconds = math.inf
        if self._why.converging:
            seconds = eta.chase_seconds(
                ahead=progress.remaining,
                bandwidth=progress.bandwidth,
                dirty_rate=progress.dirty_rate,
                downtime_limit=self._limit,
            )
        self._outlook.passed(now.elapsed, seconds)
        return dataclasses.replace(
            last,
            status="active",
            passed=True,
            copied=last.total,
            remaining=now.remaining,
            dirty_rate=now.dirty_rate,
            expected_downtime=now.expected_downtime,
            **self._judgement(now),
        )

    def _judgement(self, now: Picture) -> dict[str, Any]:
        if self._why is None or now.status in FOLLOWING:
            return {}
        return {"converging": self._why.converging, "reason": self._why.reason, "advice": self._why.advice}

    def _picture(self, state: State) -> Picture:
        info = state.info
        ram = info.get("ram", {})
        total = int(ram.get("total", self._last.total if self._last else 0))
        remaining = int(ram.get("remaining", 0))
        following = state.migration in FOLLOWING
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
            requests=int(ram.get("postcopy-requests", 0)) if following else None,
        )
        return dataclasses.replace(now, **self._judgement(now))
