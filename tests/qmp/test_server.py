"""The QMP server on real sockets, with a dispatcher that does nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import open_descriptors
from tests.qmp.fake import LIMIT, NEGOTIATE, VERSION, Bug, Fake, Raw, dial, serving, talking, until
from trimig.errors import ConfigError, TransportFailed
from trimig.qmp import serve
from trimig.qmp.messages import MAX_MESSAGE
from trimig.qmp.server import MAX_FDS

STATUS = {"status": "running", "singlestep": False, "running": True}


def error(desc: str, kind: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": kind, "desc": desc}}


def line(command: str, ident: object = None, **arguments: Any) -> bytes:
    message: dict[str, Any] = {"execute": command}
    if ident is not None:
        message["id"] = ident
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message).encode() + b"\n"


@pytest.fixture(params=["unix", "tcp"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/qmp" if request.param == "unix" else "tcp:127.0.0.1:0"


# -- the conversation ----------------------------------------------------------------------------------------------


async def test_greeting_negotiation_and_a_command(where: str) -> None:
    async with serving(where) as (fake, address):
        raw = await dial(address)
        async with raw.stream:
            assert await raw.read() == {"QMP": {"version": VERSION, "capabilities": []}}
            assert await raw.ask(NEGOTIATE) == {"return": {}}
            assert await raw.ask(line("query-status", "a")) == {"return": STATUS, "id": "a"}
            names = [entry["name"] for entry in (await raw.ask(line("query-commands")))["return"]]
            assert names == ["qmp_capabilities", "query-commands", *fake.commands]


#: Before the negotiation: a line, and QEMU 7.2's answer to it (without an offer of out-of-band execution).
BEFORE = {
    "a command": (
        b'{"execute":"stop"}',
        error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"),
    ),
    "oob": (b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}', error("Capability oob not available")),
    "no such capability": (
        b'{"execute":"qmp_capabilities","arguments":{"enable":["nope"]}}',
        error("Parameter 'enable' does not accept value 'nope'"),
    ),
    "no list": (
        b'{"execute":"qmp_capabilities","arguments":{"enable":"x"}}',
        error("Invalid parameter type for 'enable', expected: array"),
    ),
    "no name": (
        b'{"execute":"qmp_capabilities","arguments":{"enable":[7]}}',
        error("Invalid parameter type for 'enable[0]', expected: string"),
    ),
    "another argument": (
        b'{"execute":"qmp_capabilities","arguments":{"foo":1}}',
        error("Parameter 'foo' is unexpected"),
    ),
    "nothing to enable": (b'{"execute":"qmp_capabilities","arguments":{"enable":[]}}', {"return": {}}),
}


@pytest.mark.parametrize(("sent", "answer"), BEFORE.values(), ids=BEFORE)
async def test_before_the_negotiation(sent: bytes, answer: dict[str, Any], tmp_path: Path) -> None:
    async with serving(tmp_path) as (fake, address):
        raw = await dial(address)
        async with raw.stream:
            await raw.read()
            assert await raw.ask(sent) == answer
            assert fake.executed == []
            assert len(fake.subscribers) == ("return" in answer)


#: After the negotiation, QEMU 7.2's answers.
AFTER = {
    "negotiation again": (
        NEGOTIATE,
        error("Capabilities negotiation is already complete, command ignored", "CommandNotFound"),
    ),
    "no such command": (
        b'{"execute":"nope","id":null}',
        error("The command nope has not been found", "CommandNotFound") | {"id": None},
    ),
    "an array": (b"[1]", error("QMP input must be a JSON object")),
    "a number": (b"5\n", error("QMP input must be a JSON object")),
    "a string": (b'"x"\n', error("QMP input must be a JSON object")),
    "an empty object": (b'{"id":3}', error("QMP input lacks member 'execute'") | {"id": 3}),
    "a name that is none": (b'{"execute":5}', error("QMP input member 'execute' must be a string")),
    "arguments that are none": (
        b'{"execute":"stop","arguments":[]}',
        error("QMP input member 'arguments' must be an object"),
    ),
    "another member": (b'{"execute":"stop","foo":1}', error("QMP input member 'foo' is unexpected")),
    "out of band": (b'{"exec-oob":"stop"}', error("QMP input member 'exec-oob' is unexpected")),
    "arguments of query-commands": (
        b'{"execute":"query-commands","arguments":{"x":1}}',
        error("Parameter 'x' is unexpected"),
    ),
    "a class of its own": (b'{"execute":"fail"}', error("it is refused", "DeviceNotFound")),
    "no JSON": (b"hello\n", error("JSON parse error, Expecting value at character 0 of the message")),
}


@pytest.mark.parametrize(("sent", "answer"), AFTER.values(), ids=AFTER)
async def test_what_is_refused_leaves_the_connection_usable(
    sent: bytes, answer: dict[str, Any], tmp_path: Path
) -> None:
    async with serving(tmp_path) as (fake, address), talking(address) as raw:
        assert await raw.ask(sent) == answer
        assert await raw.ask(line("query-status", 2)) == {"return": STATUS, "id": 2}
        assert [name for name, _ in fake.executed if name == "stop"] == []


@pytest.mark.parametrize("ident", [0, -1.5, "", "x", True, None, [], [1, {"a": None}], {"a": [1]}, 10**30])
async def test_ids_of_any_type_come_back(ident: object, tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, address), talking(address) as raw:
        sent = json.dumps({"execute": "echo", "arguments": {"é": [1]}, "id": ident}).encode()
        assert await raw.ask(sent) == {"return": {"é": [1]}, "id": ident}
        sent = json.dumps({"execute": "fail", "id": ident}).encode()
        assert (await raw.ask(sent))["id"] == ident


async def test_pipelined_commands_are_answered_in_order(where: str) -> None:
    async with serving(where) as (_, address), talking(address) as raw:
        await raw.send(b"".join(line("echo" if n % 3 else "fail", n) for n in range(1000)))
        answers = [await raw.read() for _ in range(1000)]
        assert [answer["id"] for answer in answers] == list(range(1000))
        assert ["error" in answer for answer in answers] == [n % 3 == 0 for n in range(1000)]


async def test_a_command_waits_for_the_one_before_it_but_not_for_another_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as (fake, address), talking(address) as raw, talking(address) as other:
        await raw.send(line("wait", 1) + line("echo", 2))
        await fake.waiting.wait()
        assert await other.ask(line("echo", 3)) == {"return": {}, "id": 3}
        assert [name for name, _ in fake.executed] == ["wait", "echo"]
        fake.hold.set()
        assert [(await raw.read())["id"], (await raw.read())["id"]] == [1, 2]


async def test_events_come_to_clients_that_have_negotiated_in_order(where: str) -> None:
    async with serving(where) as (fake, address), talking(address) as raw, talking(address) as second:
        late = await dial(address)
        async with late.stream:
            await late.read()
            fake.tell("MIGRATION", status="setup")
            assert (await raw.ask(line("stop", 1)))["event"] == "MIGRATION"
            assert [(await raw.read()).get("event"), (await raw.read()).get("id")] == ["STOP", 1]
            assert [(await second.read())["event"], (await second.read())["event"]] == ["MIGRATION", "STOP"]
            assert await late.ask(NEGOTIATE) == {"return": {}}
            fake.tell("RESUME")
            expected = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}
            assert [await late.read(), await raw.read(), await second.read()] == [expected] * 3


async def test_one_that_has_gone_gets_no_events(tmp_path: Path) -> None:
    async with serving(tmp_path) as (fake, address):
        async with talking(address):
            assert len(fake.subscribers) == 1
        await until(lambda: not fake.subscribers)


# -- many, silent, broken ------------------------------------------------------------------------------------------


async def test_a_hundred_clients_at_once(where: str) -> None:
    async with serving(where) as (fake, address):
        together = trio.Event()
        served = 0

        async def one(number: int) -> None:
            nonlocal served
            async with talking(address) as raw:
                served += 1
                if served == 100:
                    together.set()
                await together.wait()
                assert await raw.ask(line("echo", number)) == {"return": {}, "id": number}

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
        assert len(fake.executed) == 100


async def test_one_too_many_is_refused_in_words_and_the_next_one_is_welcome(where: str) -> None:
    async with serving(where, max_clients=2) as (fake, address), talking(address):
        async with talking(address):
            extra = await dial(address)
            async with extra.stream:
                assert await extra.read() == error("too many clients")
                assert await extra.read() is None
        await until(lambda: len(fake.subscribers) == 1)
        raw = await dial(address)
        async with raw.stream:
            while "QMP" not in await raw.read():
                await raw.stream.aclose()  # its place is still taken
                raw = await dial(address)
            assert await raw.ask(NEGOTIATE) == {"return": {}}


async def test_client_that_never_reads_events_is_dropped_and_disturbs_no_other(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "trimig.qmp")
    async with serving(where) as (fake, address), talking(address), talking(address) as other:
        assert len(fake.subscribers) == 2
        told = 0
        while len(fake.subscribers) == 2:
            fake.tell("MIGRATION_PASS", text="x" * 10_000)
            assert (await other.read())["event"] == "MIGRATION_PASS"
            told += 1
            assert told < 5000
        assert await other.ask(line("echo", 1)) == {"return": {}, "id": 1}
    assert [record.getMessage() for record in caplog.records] == ["a QMP client was dropped: it did not read"]


async def test_one_that_asks_much_and_reads_nothing_waits_for_itself(tmp_path: Path) -> None:
    """The client is not dropped: the server reads no commands meanwhile, so the answers are limited."""
    async with serving(tmp_path) as (fake, address), talking(address) as raw, talking(address) as other:
        asked = 0
        with trio.move_on_after(0.3):
            while True:
                await raw.send(line("echo", asked, text="x" * 10_000))
                asked += 1
        assert await other.ask(line("echo", "o")) == {"return": {}, "id": "o"}
        executed = len(fake.executed)
        assert executed < asked + 2
        assert executed * 10_000 < 8 << 20
        for number in range(executed - 1):
            assert (await raw.read())["id"] == number


@pytest.mark.parametrize("part", [b"", b'{"execute":"stop"', b'{"execute":"st', b'{"a":"\\', b"\xff\xfe"])
async def test_half_a_line_and_then_the_end(part: bytes, where: str) -> None:
    async with serving(where) as (fake, address), talking(address) as other:
        async with talking(address) as raw:
            await raw.send(part)
        await until(lambda: len(fake.subscribers) == 1)
        assert await other.ask(line("echo", 1)) == {"return": {}, "id": 1}
        assert [name for name, _ in fake.executed] == ["echo"]


async def test_one_that_closes_its_sending_side_only_gets_all_answers(where: str) -> None:
    async with serving(where) as (_, address), talking(address) as raw:
        await raw.send(b"".join(line("echo", n) for n in range(50)))
        await raw.stream.send_eof()
        assert [(await raw.read())["id"] for _ in range(50)] == list(range(50))
        assert await raw.read() is None


async def test_one_that_vanishes_with_answers_under_way(where: str) -> None:
    async with serving(where) as (fake, address):
        async with talking(address) as raw:
            # More than a socket buffer, less than the server's limit for reading: the send would wait for ever.
            await raw.send(b"".join(line("echo", n, text="x" * 5000) for n in range(90)))
        await until(lambda: not fake.subscribers)
        async with talking(address) as other:
            assert await other.ask(line("query-status")) == {"return": STATUS}


async def test_a_huge_line_is_answered_and_the_connection_ended(where: str) -> None:
    async with serving(where) as (_, address), talking(address) as raw, trio.open_nursery() as nursery:

        async def much() -> None:
            try:
                await raw.send(b'{"execute":"' + b"x" * (MAX_MESSAGE + 1))
            except trio.BrokenResourceError:
                return  # the server closed the connection before all was sent

        nursery.start_soon(much)
        assert await raw.read() == error(f"a message of more than {MAX_MESSAGE} bytes")
        assert await raw.read() is None


@pytest.mark.parametrize("first", ["POST", "GET", "OPTIONS", "PUT"])
@pytest.mark.parametrize("negotiated", [False, True])
async def test_a_request_of_a_web_page_executes_nothing_and_is_logged(
    where: str, first: str, caplog: pytest.LogCaptureFixture, *, negotiated: bool
) -> None:
    """The whole request in one packet, and with its body behind; the connection is closed at once, other clients
    stay."""
    head = f"{first} / HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\n\r\n".encode()
    body = NEGOTIATE + line("stop")
    for pieces in ([head + body], [head, body], [head[:2], head[2:] + body]):
        async with serving(where) as (fake, address):
            async with talking(address) as other:
                raw = await dial(address)
                async with raw.stream:
                    await raw.read()
                    if negotiated:
                        await raw.ask(NEGOTIATE)
                    for piece in pieces:
                        with contextlib.suppress(trio.BrokenResourceError):
                            await raw.send(piece)
                    answer = await raw.read()
                    if answer is not None:
                        assert "this is HTTP" in answer["error"]["desc"]
                        assert await raw.read() is None
                assert await other.ask(line("query-status")) == {"return": STATUS}
            assert [name for name, _ in fake.executed] == ["query-status"]
    assert "was sent away: this is HTTP" in caplog.text


# -- descriptors ---------------------------------------------------------------------------------------------------


def count() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_descriptor_reaches_the_command_it_came_with(tmp_path: Path) -> None:
    async with serving(tmp_path) as (fake, address), talking(address) as raw:
        reading, writing = os.pipe()
        try:
            await raw.send_with(line("getfd", 1), [writing])
        finally:
            os.close(writing)
        assert await raw.read() == {"return": {}, "id": 1}
        os.write(fake.fds[0], b"through")
        assert os.read(reading, 100) == b"through"
        assert os.get_inheritable(fake.fds[0]) is False
        os.close(reading)
        assert (await raw.ask(line("getfd", 2)))["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"


async def test_pipelined_descriptors_come_in_order_also_ahead_of_their_command(tmp_path: Path) -> None:
    """As QEMU's own scripts do: the descriptor comes with a space."""
    paths = [tmp_path / name for name in "abc"]
    async with serving(tmp_path) as (fake, address), talking(address) as raw:
        for path in paths:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY)
            await raw.send_with(b" ", [fd])
            os.close(fd)
        await raw.send(line("getfd") * 3)
        assert [await raw.read() for _ in paths] == [{"return": {}}] * 3
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fake.fds] == [str(path) for path in paths]


@pytest.mark.parametrize("each", [1, MAX_FDS, MAX_FDS + 5])
async def test_descriptors_that_no_command_takes_are_closed(each: int, tmp_path: Path) -> None:
    """The surplus descriptors at once, the others with the connection."""
    async with serving(tmp_path) as (fake, address):
        before = count()
        with (tmp_path / "file").open("wb") as file:
            async with talking(address) as raw:
                both = count()
                for _ in range(3 * MAX_FDS // each + 1):
                    await raw.send_with(line("echo"), [file.fileno()] * each)
                    assert await raw.read() == {"return": {}}
                assert count() <= both + MAX_FDS
        await until(lambda: not fake.subscribers)
        assert count() == before, open_descriptors()


async def test_tcp_carries_no_descriptors() -> None:
    async with serving("tcp:127.0.0.1:0") as (_, address), talking(address) as raw:
        assert (await raw.ask(line("getfd")))["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"


async def test_no_descriptor_left_for_one_more_client_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trimig.transport.unix import UnixListener

    real, short = UnixListener.accept, 2

    async def accept(self: UnixListener) -> trio.abc.Stream:
        nonlocal short
        if short:
            short -= 1
            raise OSError(24, "Too many open files")
        return await real(self)

    monkeypatch.setattr(UnixListener, "accept", accept)
    async with serving(tmp_path) as (_, address), talking(address) as raw:
        assert await raw.ask(line("echo", 1)) == {"return": {}, "id": 1}
    assert "a QMP client cannot be accepted: Too many open files" in caplog.text


# -- the socket, and the end ---------------------------------------------------------------------------------------


async def test_the_socket_is_its_owners_and_goes_with_the_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, address):
        assert address == f"unix:{tmp_path}/qmp"
        assert stat.S_IMODE((tmp_path / "qmp").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == []


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "qmp"))
    async with serving(tmp_path) as (_, address), talking(address) as raw:
        assert await raw.ask(line("echo")) == {"return": {}}


async def test_a_live_socket_is_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as (fake, address), talking(address) as raw:
        with pytest.raises(TransportFailed, match="in use"):
            await serve(Fake(), address)
        assert await raw.ask(line("echo")) == {"return": {}}
        async with talking(address) as another:
            assert await another.ask(line("echo")) == {"return": {}}
        assert [name for name, _ in fake.executed] == ["echo", "echo"]


async def test_a_file_in_its_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "qmp").write_text("mine")
    with pytest.raises(TransportFailed):
        await serve(Fake(), f"unix:{tmp_path}/qmp")
    assert (tmp_path / "qmp").read_text() == "mine"


@pytest.mark.parametrize(
    "address", ["", "unix:", "tcp:", "tcp:host", "pigeon:1", "/tmp/qmp", "fd:3", "tcp:1.2.3.4:99999"]
)
async def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError):
        await serve(Fake(), address)


async def test_tcp_without_a_host_is_loopback(caplog: pytest.LogCaptureFixture) -> None:
    async with serving("tcp::0") as (_, address), talking(address) as raw:
        assert await raw.ask(line("echo")) == {"return": {}}
    assert caplog.text == ""


async def test_tcp_elsewhere_warns(caplog: pytest.LogCaptureFixture) -> None:
    async with serving("tcp:0.0.0.0:0"):
        pass
    assert "reachable from other machines" in caplog.text


async def test_cancelled_it_leaves_no_socket_and_no_task(tmp_path: Path) -> None:
    fake = Fake()
    clients: list[Raw] = []
    before = count()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as outer:
            scope = trio.CancelScope()

            async def run(task_status: trio.TaskStatus[str]) -> None:
                with scope:
                    await serve(fake, f"unix:{tmp_path}/qmp", task_status=task_status)

            address = await outer.start(run)
            for _ in range(3):
                clients.append(await dial(address))
                await clients[-1].negotiate()
            await clients[0].send(line("wait"))
            await fake.waiting.wait()
            scope.cancel("the test says so")
        for raw in clients:
            assert await raw.read() is None
            await raw.stream.aclose()
    assert fake.subscribers == []
    assert os.listdir(tmp_path) == []
    assert count() == before


async def test_quit_takes_effect_after_its_answer(where: str) -> None:
    async with serving(where) as (fake, address), talking(address) as raw:
        readable = False

        def look() -> None:
            nonlocal readable
            with socket.socket(fileno=os.dup(raw.stream.socket.fileno())) as sock:
                readable = b'"id": 2' in sock.recv(1 << 16, socket.MSG_PEEK)
            fake.ended.set()

        fake.on_quit = look
        await raw.send(line("echo", 1) + line("quit", 2))
        await fake.ended.wait()
        assert [(await raw.read())["id"], (await raw.read())["id"]] == [1, 2]
        assert readable


async def test_quit_takes_effect_although_its_client_does_not_wait(where: str) -> None:
    async with serving(where) as (fake, address):
        async with talking(address) as raw:
            await raw.send(line("quit"))
        await fake.ended.wait()


async def test_quit_of_a_client_that_never_reads_takes_effect_when_it_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path) as (fake, address), talking(address) as raw:
        for _ in range(100):
            fake.tell("MIGRATION_PASS", text="x" * 5000)
        await raw.send(line("quit"))
        await until(lambda: bool(fake.executed))
        while fake.subscribers:
            fake.tell("MIGRATION_PASS", text="x" * 5000)
            await trio.lowlevel.checkpoint()
        await fake.ended.wait()


async def test_an_exception_of_the_dispatcher_is_not_swallowed(tmp_path: Path) -> None:
    fake = Fake()

    async def break_it(address: str) -> None:
        async with talking(address) as raw:
            assert await raw.ask(line("bug")) is None

    with trio.fail_after(LIMIT):
        with pytest.RaisesGroup(Bug, flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(break_it, await nursery.start(serve, fake, f"unix:{tmp_path}/qmp"))
    assert fake.subscribers == []
    assert os.listdir(tmp_path) == []
