"""``trimig run --control ws://…`` as a process: a guest is driven and migrated in JSON and in msgpack."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from tests.processes.cli.command import first_line, started, text_of

LIMIT = 60
GUEST = "process:size=8M,dirty-rate=1M,hot=1M"


class Control:
    """A client that speaks one of the two encodings; events are kept."""

    def __init__(self, connection: WebSocketConnection, *, packed: bool) -> None:
        self.events: list[str] = []
        self._connection = connection
        self._packed = packed

    async def ask(self, name: str, **arguments: Any) -> Any:
        """The answer to a command, in the kind of frame of the command."""
        command = {"execute": name, "arguments": arguments, "id": name}
        await self._connection.send_message(msgpack.packb(command) if self._packed else json.dumps(command))
        while True:
            frame = await self._connection.get_message()
            assert isinstance(frame, bytes) is self._packed
            message = msgpack.unpackb(frame) if isinstance(frame, bytes) else json.loads(frame)
            if "event" in message:
                self.events.append(message["event"])
            else:
                assert message.pop("id") == name
                return message


@pytest.mark.parametrize("packed", [False, True], ids=["JSON", "msgpack"])
async def test_guest_is_driven_and_migrated_over_a_websocket(*, packed: bool) -> None:
    """Greeting, commands, a refusal, events, the migration to another process, and the end."""
    with trio.fail_after(LIMIT):
        async with (
            started("run", "--guest", GUEST, "--incoming", "tcp:127.0.0.1:0", "--json") as there,
            started("run", "--guest", GUEST, "--control", "ws://127.0.0.1:0/") as process,
        ):
            assert there.stdout is not None
            assert process.stderr is not None
            uri = json.loads(await first_line(there.stdout))["listening"]
            while "control at" not in (line := await first_line(process.stderr)):
                assert line
            async with open_websocket_url(line.rpartition(" ")[2]) as connection:
                assert set(json.loads(await connection.get_message())) == {"QMP"}
                control = Control(connection, packed=packed)
                assert await control.ask("qmp_capabilities") == {"return": {}}
                assert (await control.ask("query-status"))["return"]["status"] == "running"
                assert (await control.ask("no-such"))["error"]["class"] == "CommandNotFound"
                await control.ask("migrate-set-parameters", **{"max-bandwidth": 0})
                assert await control.ask("migrate", uri=uri) == {"return": {}}
                while (found := (await control.ask("query-migrate"))["return"])["status"] != "completed":
                    assert found["status"] not in ("failed", "cancelled")
                    await trio.sleep(0.01)
                assert found["owner"] == "destination"
                assert "STOP" in control.events
                assert await control.ask("quit") == {"return": {}}
            assert "Traceback" not in await text_of(process.stderr)
            assert await process.wait() == 0
