"""A guest behind a QMP socket, as the control commands see it: a ``trimig run``, or a QEMU.

What both answer is taken as it comes; where a QEMU does not say something (the owner of the guest), it follows from
what it does say (:mod:`.state`). Every question is bounded in time, because a process that has stopped answers none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, Protocol

import trio

import trimig
from trimig import formats, qmp

from .state import POLL, Busy, Gone, Refused, Settings, State

#: Seconds for one answer. A QEMU that stops its guest for the switchover answers nothing meanwhile.
ANSWER_LIMIT: Final = 30.0
#: Seconds for the greeting.
CONNECT_LIMIT: Final = 5.0


class QmpClient(Protocol):
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


class Remote:
    """A client with an address, whose errors are sentences."""

    def __init__(self, client: QmpClient, address: str) -> None:
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
