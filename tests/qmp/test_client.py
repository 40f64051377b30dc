"""The QMP client against a scripted server: answers out of order, garbage, silence, an early end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair

from trimig import qmp
from trimig.errors import ConfigError, TransportFailed
from trimig.qmp.client import EVENT_BACKLOG

LIMIT = 20
GREETING = {"QMP": {"version": {"qemu": {"major": 9}}, "capabilities": ["oob"]}}


class Server:
    """The server's end of one connection."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def say(self, *messages: object) -> None:
        await self.stream.send_all(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += await self.stream.receive_some()
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    async def negotiate(self) -> None:
        await self.say(GREETING)
        await self.answer(await self.hear())

    async def answer(self, request: dict[str, Any], value: object = None) -> None:
        await self.say({"return": {} if value is None else value, "id": request["id"]})


@asynccontextmanager
async def talk() -> AsyncIterator[tuple[qmp.Client, Server]]:
    """A client after the negotiation, and its server."""
    ours, theirs = memory_stream_pair()
    server = Server(theirs)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.negotiate)
            async with qmp.connect(ours) as client:
                yield client, server


async def refused(data: bytes) -> TransportFailed:
    """The error of a client whose server sends *data* first."""
    ours, theirs = memory_stream_pair()
    with trio.fail_after(LIMIT):
        await theirs.send_all(data)
        with pytest.raises(TransportFailed) as caught:
            async with qmp.connect(ours):
                raise AssertionError("it was taken")
    return caught.value


async def test_greeting_says_who_it_is() -> None:
    async with talk() as (client, _):
        assert client.version == {"qemu": {"major": 9}}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no QMP"),
        (b"[1]\r\n", "no QMP"),
        (b'{"hello": 1}\r\n', "no QMP"),
        (b'{"error": {"class": "GenericError", "desc": "too many clients"}}\r\n', "too many clients"),
    ],
)
async def test_peer_that_is_no_server(data: bytes, text: str) -> None:
    assert text in str(await refused(data))


async def test_server_that_never_greets_and_the_callers_patience() -> None:
    ours, _theirs = memory_stream_pair()
    with trio.move_on_after(0.05) as patience:
        async with qmp.connect(ours):
            raise AssertionError("it was taken")
    assert patience.cancelled_caught


async def test_answers_find_their_callers_in_any_order() -> None:
    async with talk() as (client, server):
        found: dict[str, object] = {}

        async def ask(name: str) -> None:
            found[name] = await client.execute(name, {"x": 1})

        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c"):
                nursery.start_soon(ask, name)
            requests = [await server.hear() for _ in range(3)]
            assert all(request["arguments"] == {"x": 1} for request in requests)
            for request in reversed(requests):
                await server.answer(request, request["execute"] * 2)
        assert found == {"a": "aa", "b": "bb", "c": "cc"}


async def test_error_has_its_class_and_text() -> None:
    async with talk() as (client, server):

        async def refuse() -> None:
            request = await server.hear()
            await server.say({"error": {"class": "CommandNotFound", "desc": "no such"}, "id": request["id"]})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(qmp.CommandFailed, match="no such") as caught:
                await client.execute("x")
        assert caught.value.error_class == "CommandNotFound"


async def test_answer_for_a_caller_that_has_gone_is_dropped_and_the_next_one_arrives() -> None:
    async with talk() as (client, server):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.execute, "slow")
                slow = await server.hear()
                scope.cancel("the caller goes")
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await server.answer(slow, "late")
                await server.answer(await server.hear(), "mine")

            nursery.start_soon(answer)
            assert await client.execute("quick") == "mine"


async def test_events_come_in_order_between_answers_and_to_every_reader() -> None:
    async with talk() as (client, server):
        early, second = client.events(), client.events()
        await server.say(*({"event": "E", "data": {"n": n}} for n in range(3)))
        assert [(await anext(early))["data"]["n"] for _ in range(3)] == [0, 1, 2]
        late = client.events()
        await server.say({"event": "F"})
        assert (await anext(late))["event"] == "F"
        assert (await anext(second))["data"]["n"] == 0


async def test_reader_that_is_far_behind_loses_the_oldest_and_is_told() -> None:
    async with talk() as (client, server):
        feed = client.events()
        await server.say(*({"event": "E", "data": {"n": n}} for n in range(EVENT_BACKLOG + 5)), {"event": "LAST"})
        while client._event_count < EVENT_BACKLOG + 6:  # noqa: ASYNC110 - the client has no event for that
            await trio.sleep(0.001)
        assert (await anext(feed))["data"]["n"] == 6
        assert client.dropped == 6


async def test_server_that_goes_in_the_middle_is_told_to_every_waiting_task() -> None:
    async with talk() as (client, server):
        outcomes: list[str] = []

        async def ask() -> None:
            with pytest.raises(TransportFailed) as caught:
                await client.execute("x")
            outcomes.append(str(caught.value))

        async def listen() -> None:
            with pytest.raises(TransportFailed):
                await anext(client.events())
            outcomes.append("events")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            nursery.start_soon(listen)
            for _ in range(2):
                await server.hear()
            await server.stream.aclose()
        assert sorted(outcomes) == ["events"] + ["the other side closed the QMP connection"] * 2
        with pytest.raises(TransportFailed):
            await client.execute("y")


async def test_garbage_behind_the_greeting_ends_the_connection() -> None:
    async with talk() as (client, server):

        async def ask() -> None:
            with pytest.raises(TransportFailed, match="no QMP"):
                await client.execute("x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await server.hear()
            await server.stream.send_all(b"\xff\xfe nonsense\r\n")


async def test_descriptors_need_a_unix_socket() -> None:
    async with talk() as (client, _):
        with pytest.raises(ConfigError, match="unix socket only"):
            await client.getfd("fd0", 0)


@pytest.mark.parametrize("steps", range(12))
async def test_cancelled_after_any_number_of_steps_nothing_is_left(steps: int) -> None:
    """The reading task and the stream end with the block; every test checks the descriptors."""
    ours, theirs = memory_stream_pair()
    server = Server(theirs)
    living = trio.lowlevel.current_statistics().tasks_living
    with trio.fail_after(LIMIT), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                with contextlib.suppress(trio.BrokenResourceError, json.JSONDecodeError):
                    await server.negotiate()
                    await server.answer(await server.hear())

            async def strike() -> None:
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel("the test")

            nursery.start_soon(serve)
            nursery.start_soon(strike)
            async with qmp.connect(ours) as client:
                await client.execute("x")
                await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.lowlevel.current_statistics().tasks_living == living
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")


async def test_address_without_a_server(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", "tcp:127.0.0.1:1"):
        with pytest.raises(TransportFailed, match=r"\(does a QEMU or a trimig run with this QMP address\?\)"):
            async with qmp.connect(address):
                raise AssertionError("it was taken")
