"""A guest whose code is a program of the caller: the examples as workers, bad workers, cancellation; nothing stays."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import trimig
from tests.processes.cli.command import trimig_command
from tests.processes.cli.hosted import ends, hosting, status
from trimig import MiB, ProcessGuest
from trimig.errors import ConfigError, GuestFailed, Owner
from trimig.guest import Guest, LazyGuest
from trimig.testing import virtual_link

ROOT = Path(__file__).resolve().parents[3]
SIZE = 2 * MiB
PYTHON = [sys.executable, str(ROOT / "examples" / "worker.py")]
LIMIT = 60

#: A worker that answers as the script says: REPLIES has the reply for each verb, with the number in place of N.
SCRIPTED = """
import os, socket, sys, time
control = socket.socket(fileno=int(os.environ["TRIMIG_WORKER_SOCKET"]))
script = {"hello": b"N ok 1\\n", "ram": b"N ok 0\\n", **eval(sys.argv[1])}
while packet := control.recv(65536):
    number, verb = packet.partition(b"\\n")[0].split(b" ")[:2]
    answer = script.get(verb.decode(), b"N ok\\n")
    if callable(answer):
        answer = answer()
    if answer is not None:
        control.send(answer.replace(b"N", number))
"""


@pytest.fixture(autouse=True)
def no_descriptor_and_no_process_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The worker in C, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None and "CI" not in os.environ:
        pytest.skip("there is no C compiler")
    assert compiler is not None
    program = tmp_path_factory.mktemp("c") / "worker"
    source = ROOT / "examples" / "worker.c"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-O2", "-o", program, source], check=True)
    return [str(program)]


@contextlib.asynccontextmanager
async def scripted(replies: str = "{}", **options: Any) -> AsyncIterator[ProcessGuest]:
    """A guest with a :data:`SCRIPTED` worker."""
    arguments = {"ram": SIZE, "dirty_tracking": "compare", "call_timeout": 5.0, **options}
    async with ProcessGuest.open([sys.executable, "-c", SCRIPTED, replies], **arguments) as guest:
        yield guest


async def written(guest: ProcessGuest, more: int) -> None:
    """Let the worker make *more* writes, and verify them all."""

    async def count() -> int:
        await guest.pause()
        found = int((await guest.ask("x-verify")).words[0])
        await guest.resume()
        return found

    goal = await count() + more
    with trio.fail_after(LIMIT):
        while await count() < goal:  # noqa: ASYNC110 - there is no event to wait for: it is not our process
            await trio.sleep(0.01)


async def moved(argv: list[str], tracking: str) -> None:
    """Move a guest to a second worker and back to a third; each verifies its memory."""
    with trio.fail_after(LIMIT):
        async with contextlib.AsyncExitStack() as stack:
            options: dict[str, Any] = {"ram": SIZE, "dirty_tracking": tracking}
            first = await stack.enter_async_context(ProcessGuest.open(argv, **options))
            rest = [
                await stack.enter_async_context(ProcessGuest.open(argv, running=False, **options)) for _ in range(2)
            ]
            guest = first
            for target in rest:
                await written(guest, 2 * SIZE // 4096)
                one, other = virtual_link()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trimig.receive, target, other)
                    await trimig.migrate(guest, one)
                assert (guest.owner, target.owner) == (Owner.ELSEWHERE, Owner.HERE)
                assert (guest.run_state, target.run_state) == ("paused", "running")
                guest = target
            await written(guest, 2 * SIZE // 4096)


async def test_worker_in_python_goes_on_with_every_write() -> None:
    await moved(PYTHON, "compare")


async def test_worker_in_c_goes_on_with_every_write(in_c: list[str]) -> None:
    await moved(in_c, "userfaultfd")


async def test_worker_in_c_becomes_one_in_python(in_c: list[str]) -> None:
    """Only the protocol counts: the state and the memory are the same."""
    async with (
        ProcessGuest.open(in_c, ram=SIZE) as here,
        ProcessGuest.open(PYTHON, ram=SIZE, running=False, dirty_tracking="compare") as there,
        trio.open_nursery() as nursery,
    ):
        assert here.dirty_tracker().method == "userfaultfd-wp"
        await written(here, 600)
        one, other = virtual_link()
        nursery.start_soon(trimig.receive, there, other)
        await trimig.migrate(here, one)
        await written(there, 600)


async def test_several_blocks_and_devices_of_the_caller() -> None:
    async with scripted(ram={"ram": SIZE, "video": MiB}, settings=b"fast") as guest:
        assert isinstance(guest, Guest)
        assert isinstance(guest, LazyGuest)
        assert [(block.name, block.length) for block in guest.ram] == [("ram", SIZE), ("video", MiB)]
        await guest.pause()
        assert [section.idstr for section in await guest.save_devices()] == ["trimig-worker"]
        assert (await guest.ask("x-me", 5, body=b"more")).words == ()
        await guest.throttle(20)
        assert guest.throttle_percent == 20
        with pytest.raises(GuestFailed, match="does not offer 'missing'"):
            await guest.missing_memory()


async def test_worker_that_does_not_offer_it_gets_no_throttle(caplog: pytest.LogCaptureFixture) -> None:
    """S3: an older worker would not know the request; the log says so once."""
    async with scripted("{'throttle': lambda: sys.exit(3)}") as guest:
        for percent in (20, 30, 0):
            await guest.throttle(percent)
        await guest.ask("ping")
    assert [record.message for record in caplog.records] == [
        "guest 'trimig-worker' runs at full speed: its worker does not offer 'throttle'"
    ]


async def test_worker_that_offers_it_gets_the_throttle(caplog: pytest.LogCaptureFixture) -> None:
    async with ProcessGuest.open(PYTHON, ram=SIZE, dirty_tracking="compare") as guest:
        await guest.throttle(90)
        await written(guest, 16)
        await guest.throttle(0)
        await written(guest, 16)
    assert not caplog.records
    refusing = "{'hello': b'N ok 1 throttle\\n', 'throttle': b'N error\\nbusy'}"
    async with scripted(refusing) as guest:
        with pytest.raises(GuestFailed, match="refused 'throttle': busy"):
            await guest.throttle(20)


async def test_stopped_guest_is_ready_and_waits() -> None:
    async with scripted(stopped=True) as guest:
        assert (guest.run_state, guest.owner) == ("prelaunch", Owner.HERE)


@pytest.mark.parametrize(
    ("replies", "text"),
    [
        ('{"hello": b"N ok 2\\n"}', "speaks version 1"),
        ('{"hello": b"N ok\\n"}', "speaks version 1"),
        ('{"hello": b"howdy"}', "answered 'hello' with no line .* 'howdy'"),
        ('{"hello": b"9 ok 1\\n"}', "the number 9, which no request has had"),
        ('{"hello": b"N error\\nnot today"}', "refused 'hello': not today"),
        ('{"hello": b"N error\\n" + b"no " * 9999}', "refused 'hello': no no no"),
        ('{"hello": b"x" * 65536}', "answered 'hello' with no line"),
        ('{"hello": b"x" * 70000}', "a packet of more than 65536 bytes"),
        ('{"hello": lambda: sys.exit("no power")}', "ended with exit status 1 .*: no power"),
        ('{"hello": lambda: sys.exit("x" * 9999)}', "ended with exit status 1 "),
        ('{"hello": lambda: os.kill(os.getpid(), 9)}', r"killed by signal 9 \(SIGKILL\)"),
        ('{"hello": lambda: os.kill(os.getpid(), 36)}', "killed by signal 36 "),
        ('{"ram": b"N ok\\n"}', "no address"),
        ('{"ram": b"N ok here\\n"}', "no address: 'here' is no number"),
        ('{"ram": b"N ok 5\\n"}', "the address 5, where no page begins"),
        ('{"hello": b"N ok 1 track\\n"}', "the address 0, where no page begins"),
        ('{"create": b"N error\\nno clay"}', "refused 'create': no clay"),
        ('{"resume": b"N error\\nno legs"}', "refused 'resume': no legs"),
    ],
)
async def test_bad_worker_is_one_bounded_sentence(replies: str, text: str) -> None:
    with trio.fail_after(LIMIT):
        with pytest.raises(GuestFailed, match=text) as caught:
            async with scripted(replies):
                pytest.fail("it was opened")
        assert len(str(caught.value)) < 1000


async def test_worker_that_offers_tracking_and_sends_no_descriptor() -> None:
    replies = '{"hello": b"N ok 1 track\\n", "ram": b"N ok 4096\\n"}'
    with pytest.raises(GuestFailed, match="answered 'track' with 0 descriptors instead of one"):
        async with scripted(replies, dirty_tracking="auto"):
            pytest.fail("it was opened")
    refuses = replies.replace("}", ', "track": b"N error\\nnot allowed"}')
    async with scripted(refuses, dirty_tracking="auto") as guest:
        assert guest.dirty_tracker().method == "compare"
    with pytest.raises(GuestFailed, match=r"no dirty tracking by userfaultfd: .*not allowed"):
        async with scripted(refuses, dirty_tracking="userfaultfd"):
            pytest.fail("it was opened")


async def test_worker_that_is_late_is_told_so_and_its_late_reply_is_passed_over() -> None:
    async with scripted('{"x-slow": lambda: time.sleep(1) or b"N ok late\\n"}', call_timeout=0.4) as guest:
        with pytest.raises(GuestFailed, match=r"did not answer 'x-slow' within 400 ms"):
            await guest.ask("x-slow")
        await trio.sleep(1)
        assert (await guest.ask("x-quick")).words == ()


async def test_worker_that_floods_its_standard_error_is_not_held_up() -> None:
    replies = '{"x-talk": lambda: sys.stderr.write("word " * 200_000) and b"N ok\\n", "x-die": lambda: sys.exit(3)}'
    async with scripted(replies) as guest:
        await guest.ask("x-talk")
        with pytest.raises(GuestFailed, match=r"exit status 3 .*word word") as caught:
            await guest.ask("x-die")
        assert len(str(caught.value)) < 600


async def test_attempt_with_a_worker_that_answers_nonsense_leaves_the_guest_here() -> None:
    async with scripted('{"save": b"gibberish"}') as source, scripted(running=False) as target:
        one, other = virtual_link()

        async def receive() -> None:
            with pytest.raises(trimig.MigrationError):
                await trimig.receive(target, other)

        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                with pytest.raises(GuestFailed, match="gibberish"):
                    await trimig.migrate(source, one)
        assert (source.owner, source.run_state, target.owner) == (Owner.HERE, "running", Owner.ELSEWHERE)


async def test_worker_that_may_run_later_is_killed_before_the_guest_runs_elsewhere() -> None:
    async with scripted('{"resume": None}', running=False, call_timeout=0.3) as guest:
        guest.set_owner(Owner.HERE)
        with pytest.raises(GuestFailed, match="did not answer 'resume'"):
            await guest.resume()
        with pytest.raises(GuestFailed, match="started in the moment"):
            guest.set_owner(Owner.UNKNOWN)
        guest.set_owner(Owner.ELSEWHERE)
        with pytest.raises(ProcessLookupError):
            os.kill(guest.pid, 0)


@pytest.mark.parametrize("verb", ["hello", "ram", "create", "resume", "pause", "save", "load", "quit"])
async def test_call_that_is_cancelled_at_any_step_leaves_nothing(tmp_path: Path, verb: str) -> None:
    """The worker has the request, and never answers it."""
    received = tmp_path / "received"
    replies = f'{{"{verb}": lambda: open({str(received)!r}, "w").close()}}'

    async def use() -> None:
        async with scripted(replies, call_timeout=LIMIT) as guest:
            await guest.pause()
            await guest.load_devices(await guest.save_devices())

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            while not received.exists():  # noqa: ASYNC110 - it is another process
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("after", [0, 0.02, 0.1, 0.3])
async def test_opening_that_is_cancelled_leaves_nothing(after: float) -> None:
    with trio.move_on_after(after) as scope:
        async with scripted():
            await trio.sleep(math.inf)
    assert scope.cancelled_caught


async def test_children_of_the_worker_end_with_it() -> None:
    replies = '{"x-child": lambda: b"N ok %d\\n" % __import__("subprocess").Popen(["sleep", "60"]).pid}'
    async with scripted(replies) as guest:
        child = int((await guest.ask("x-child")).words[0])
        pidfd = os.pidfd_open(child)
    try:
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def test_killed_worker_is_reported_by_signal() -> None:
    async with scripted() as guest:
        os.kill(guest.pid, signal.SIGKILL)
        for call in (guest.pause, guest.resume, guest.save_devices):
            with pytest.raises(GuestFailed, match=r"signal 9 \(SIGKILL\)"):
                await call()


@pytest.mark.parametrize(
    ("argv", "options", "error", "text"),
    [
        ([], {}, ConfigError, "list of a program"),
        ("worker", {}, ConfigError, "list of a program"),
        (["/nonexistent/worker"], {}, GuestFailed, "could not be started"),
        (PYTHON, {"ram": {}}, ConfigError, "at least one RAM block"),
        (PYTHON, {"ram": 5000}, ConfigError, "multiple of 4096"),
        (PYTHON, {"ram": {"": 4096}}, ConfigError, "1 to 255 bytes"),
        (PYTHON, {"dirty_tracking": "marks"}, ConfigError, "marks"),
        (PYTHON, {"settings": bytes(70_000)}, ConfigError, "settings of 70000 bytes"),
    ],
)
async def test_bad_arguments(argv: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        async with ProcessGuest.open(argv, **{"ram": SIZE, **options}):
            pytest.fail("it was opened")


async def test_command_line_hosts_a_worker_and_moves_it(tmp_path: Path, in_c: list[str]) -> None:
    spec = f"worker:ram=2M,{in_c[0]}"
    words = ("run", "--guest", spec, "--incoming", f"unix:{tmp_path}/m", "--qmp")
    async with (
        hosting(f"unix:{tmp_path}/a", "--guest", spec) as (_, here),
        hosting(f"unix:{tmp_path}/b", *words[1:5]) as (process, there),
    ):
        await here.execute("migrate", {"uri": f"unix:{tmp_path}/m"})
        assert (await status(here, "completed", "failed"))["status"] == "completed"
        assert (await there.execute("query-status"))["status"] == "running"
        await there.execute("quit")
        assert (await ends(process))[0] == 0


async def test_command_line_says_why_a_worker_is_of_no_use(tmp_path: Path) -> None:
    code, out, err = await trimig_command(
        "run", "--qmp", f"unix:{tmp_path}/q", "--guest", "worker:/bin/sh -c 'echo no fuel >&2; exit 4'"
    )
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "exit status 4" in err
    assert "no fuel" in err
