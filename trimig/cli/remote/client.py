"""A guest behind a QMP socket, for the control commands: a ``trimig run``, or a QEMU.

The commands use the members that both answer. A QEMU does not report the owner of the guest; the owner then follows
from other members (:mod:`.state`). Every request has a time limit, because a stopped process never answers.
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

#: Seconds for one answer. A QEMU answers nothing while it stops its guest for the switchover.
ANSWER_LIMIT: Final = 30.0
#: Seconds for the greeting.
CONNECT_LIMIT: Final = 5.0


class QmpClient(Protocol):
    """The methods of :func:`trimig.qmp.connect` that are used here."""

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The ``return`` member of the answer; CommandFailed for an error answer.

        **Cancellation:** the command may have been executed.
        """

    async def getfd(self, name: str, fd: int) -> None:
        """Pass a descriptor; this process keeps its own.

        **Cancellation:** it may have been passed.
        """

    def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """The events from now on, unchanged."""


class Remote:
    """A client with an address; its errors are sentences for users."""

    def __init__(self, client: QmpClient, address: str) -> None:
        self.client = client
        self.address = address

    async def execute(self, name: str, **arguments: Any) -> Any:
        """The answer to a command; underscores in the names of arguments stand for dashes.

        Raises:
            Refused: the other side refuses the command.
            Gone: the other side does not answer, or the connection has ended.

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
            f"{self.address} has not answered {name} within {formats.duration(ANSWER_LIMIT)}; "
            "does the process still run?"
        )

    async def pass_descriptor(self, name: str, descriptor: int) -> None:
        """Give the other side *descriptor* under *name*; a migration to ``fd:NAME`` consumes it.

        Raises:
            Refused: the other side refuses the command.
            Gone: the connection has ended.

        **Cancellation:** the descriptor may have been passed.
        """
        try:
            await self.client.getfd(name, descriptor)
        except qmp.CommandFailed as error:
            raise Refused(f"{self.address} refuses getfd: {error.desc}") from error
        except (OSError, trimig.TrimigError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Gone(f"the QMP connection to {self.address} is gone: {error}") from error

    async def forget_descriptor(self, name: str) -> None:
        """Make the other side close the descriptor, if it still has it.

        **Cancellation:** the descriptor may have been closed.
        """
        with contextlib.suppress(Refused):
            await self.execute("closefd", fdname=name)

    async def state(self) -> State:
        """The present state.

        **Cancellation:** has no effect there.
        """
        # In this order: a guest that is handed over in between is then seen as handed over.
        run_state = (await self.execute("query-status"))["status"]
        return State(run_state=run_state, info=await self.execute("query-migrate"))

    async def wait_ended(self, limit: float) -> State:
        """Wait at most *limit* seconds until no migration is under way; the last state.

        **Cancellation:** has no effect there.
        """
        return await self.wait(lambda state: state.ended, limit)

    async def wait(self, satisfied: Callable[[State], bool], limit: float) -> State:
        """Wait at most *limit* seconds until the state is as wanted; the last state.

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
        """Set *changes*, all or none: if the parameters are refused, the capabilities are restored from *present*.

        **Cancellation:** some of them may have been set.
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
        Busy: the connection is accepted and no greeting comes.
        Refused: no process listens there, or the process does not speak QMP.
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
            f"{address} took the connection and has said nothing for {formats.duration(CONNECT_LIMIT)}; a QEMU "
            "serves one client at a time on a QMP socket: is there another?"
        )
