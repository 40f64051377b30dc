"""``trimig run`` as a process: its guests, its output, its end."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import trio

import trimig
from tests.processes.cli.command import first_line, started, text_of, trimig_command
from tests.processes.cli.hosted import GUEST, ends, hosting, status
from trimig import qmp
from trimig.cli.guests import process as workload
from trimig.testing import ScriptedGuest

LIMIT = 60

MODULE = """
import contextlib, trimig

class Stuck(trimig.Device):
    vmstate = trimig.VMState("card", fields=[])
    unmigratable = "it is passed through"

def factory(running):
    guest = trimig.AppGuest("mine", running=running)
    guest.add_ram("table", 1 << 20)
    return guest

async def later(running):
    return factory(running)

@contextlib.asynccontextmanager
async def managed(running):
    with factory(running) as guest:
        yield guest

def stuck():
    guest = factory(True)
    guest.add_device(Stuck())
    return guest

def broken():
    raise RuntimeError("no luck")

made = factory(True)
number = 5
"""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--guest", "horse"], "there are app, parked, process, worker"),
        (["--guest", "proces"], "did you mean process?"),
        (["--guest", "parked:"], "parked:FILE"),
        (["--guest", "worker:"], "needs a program"),
        (["--guest", "worker:ram=5000,x"], "4096"),
        (["--guest", "worker:size=16M,x"], "worker: has no option size; there is ram=SIZE"),
        (["--guest", "worker:'"], "quotation"),
        (["--guest", "process:size=x"], "size"),
        (["--guest", "process:colour=red"], "colour"),
        (["--guest", "process:size=5000"], "4096"),
        (["--guest", "app:mod"], "pkg.mod:factory"),
        (["--guest", "app:no_such_module:f"], "no_such_module"),
        (["--guest", "app:json:no_such"], "has no no_such"),
        (["--guest", "app:json:decoder.nothing"], "has no decoder.nothing"),
        (["--guest", "app:json:JSONEncoder"], "is no guest"),
        (["--guest", "process", "--uuid", "5"], "is no UUID"),
        (["--guest", "process", "--incoming", "pigeon:1"], "pigeon"),
        (["--guest", "process", "--incoming", "tcp:foo"], "HOST:PORT"),
    ],
)
async def test_what_cannot_be_hosted_is_said_in_one_sentence(tmp_path: Path, words: list[str], text: str) -> None:
    code, out, err = await trimig_command("run", "--qmp", f"unix:{tmp_path}/q", *words)
    assert (code, out, err.count("\n"), text in err) == (2, "", 1, True), err
    assert os.listdir(tmp_path) == []


async def test_an_address_that_cannot_be_listened_on_is_one_sentence(tmp_path: Path) -> None:
    """No status of a migration stands before it."""
    code, out, err = await trimig_command("run", "--guest", GUEST, "--incoming", f"unix:{tmp_path}/absent/socket")
    assert (code, out) == (1, "")
    assert err == f"trimig: cannot listen on unix:{tmp_path}/absent/socket: No such file or directory\n"


async def test_guest_that_no_client_could_reach() -> None:
    code, _, err = await trimig_command("run", "--guest", "process")
    assert (code, "--qmp" in err) == (2, True)


@pytest.mark.parametrize("name", ["factory", "later", "managed", "made"])
async def test_guest_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "mymodule.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    async with hosting(f"unix:{tmp_path}/q", "--guest", f"app:mymodule:{name}") as (process, client):
        assert (await client.execute("query-status"))["status"] == "running"
        await client.execute("quit")
        assert (await ends(process))[0] == 0


async def test_guest_of_the_users_own_that_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--only-migratable`` refuses a guest with a device that cannot be migrated (I3, I5)."""
    (tmp_path / "mymodule.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    words = ("run", "--qmp", f"unix:{tmp_path}/q", "--guest")
    for name, more, text in (
        ("number", [], "'int', which is no guest"),
        ("broken", [], "no luck"),
        ("stuck", ["--only-migratable"], "passed through"),
    ):
        code, _, err = await trimig_command(*words, f"app:mymodule:{name}", *more)
        assert (code, err.count("\n"), text in err) == (2, 1, True), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_at_rest(tmp_path: Path, number: signal.Signals) -> None:
    async with hosting(f"unix:{tmp_path}/q", "--guest", GUEST, "--name", "vm") as (process, client):
        events = client.events()
        os.kill(process.pid, number)
        assert (event := await anext(events))["event"] == "SHUTDOWN"
        assert event["data"] == {"guest": False, "reason": "host-signal"}
        code, text = await ends(process)
        assert code == 0, "nothing was interrupted"
        assert "ending" in text
        assert "the guest 'vm' has ended" in text
        assert "put back" not in text
        assert os.listdir(tmp_path) == []


async def test_signal_during_a_migration(tmp_path: Path) -> None:
    """The migration is cancelled; the destination does not get the guest, and can wait for another one."""
    to = f"unix:{tmp_path}/m"
    async with (
        hosting(f"unix:{tmp_path}/a", "--guest", GUEST) as (process, client),
        hosting(f"unix:{tmp_path}/b", "--guest", GUEST, "--incoming", to) as (other, destination),
    ):
        await client.execute("migrate-set-parameters", {"max-bandwidth": 20_000})
        await client.execute("migrate", {"uri": to})
        await status(client, "active")
        os.kill(process.pid, signal.SIGTERM)
        assert (await ends(process))[0] == 130
        assert (await status(destination, "failed"))["owner"] == "source"
        assert (await destination.execute("query-status"))["status"] == "inmigrate"
        await destination.execute("quit")
        assert (await ends(other))[0] == 0
    assert os.listdir(tmp_path) == []


async def test_end_after_a_handover_says_where_the_guest_is(tmp_path: Path) -> None:
    """Both ends of it: SIGTERM of the source, and of a destination that still waits, are no interruption."""
    to = f"unix:{tmp_path}/m"
    async with (
        hosting(f"unix:{tmp_path}/a", "--guest", GUEST, "--name", "vm") as (process, client),
        hosting(f"unix:{tmp_path}/b", "--guest", GUEST, "--name", "vm", "--incoming", to),
        hosting(f"unix:{tmp_path}/c", "--guest", GUEST, "--incoming", f"unix:{tmp_path}/n") as (third, _),
    ):
        await client.execute("migrate", {"uri": to})
        await status(client, "completed")
        os.kill(process.pid, signal.SIGTERM)
        code, text = await ends(process)
        assert (code, "was handed over before, and is at the destination" in text) == (0, True), text
        os.kill(third.pid, signal.SIGTERM)
        code, text = await ends(third)
        assert (code, "no guest has arrived" in text, "nothing listens here" in text) == (0, True, False), text


async def test_wait_for_a_source_that_ends_by_a_signal(tmp_path: Path) -> None:
    """The source tells each client the last status before it ends: it has its guest, and the exit code is 1."""
    to, here = f"unix:{tmp_path}/m", f"unix:{tmp_path}/a"
    async with (
        hosting(here, "--guest", GUEST) as (process, client),
        hosting(f"unix:{tmp_path}/b", "--guest", GUEST, "--incoming", to),
        started("migrate", to, "--qmp", here, "--wait", "-p", "max-bandwidth=200K") as migrate,
    ):
        assert migrate.stderr is not None
        await status(client, "active")
        await first_line(migrate.stderr)
        os.kill(process.pid, signal.SIGTERM)
        code, text = await ends(process)
        assert (code, "failed: the migration was cancelled" in text) == (130, False), text
        text = await text_of(migrate.stderr)
        assert (await migrate.wait(), "the source has kept its guest" in text) == (1, True), text


async def test_address_that_cannot_be_listened_at(tmp_path: Path) -> None:
    """The command ends, so nothing could make it listen."""
    words = ("run", "--guest", GUEST, "--incoming")
    code, _, err = await trimig_command(*words, f"unix:{tmp_path}/none/x")
    assert (code, "cannot listen on" in err, "nothing listens here" in err) == (1, True, False), err
    code, _, err = await trimig_command(*words, "tcp:127.0.0.1:0", "--tls", tmp_path)
    assert (code, "ca-cert.pem" in err, "nothing listens here" in err) == (2, True, False), err


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_from_one_process_to_another(tmp_path: Path, kind: str) -> None:
    """Over either kind of socket, for QMP as for the guest, with equal UUIDs and with -S."""
    uuid = ["--uuid", "00112233-4455-6677-8899-aabbccddeeff", "-c", "validate-uuid", "--guest", GUEST]
    here = {"tcp": ["tcp:127.0.0.1:0"] * 3, "unix": [f"unix:{tmp_path}/{name}" for name in "abm"]}[kind]
    async with (
        hosting(here[0], *uuid) as (one, source),
        hosting(here[1], *uuid, "-S", "--incoming", "defer") as (two, destination),
    ):
        await destination.execute("migrate-incoming", {"uri": here[2]})
        (address,) = (await destination.execute("query-migrate"))["socket-address"]
        to = qmp.uri_of(address)
        await source.execute("migrate-set-parameters", {"max-bandwidth": 0})
        await source.execute("migrate", {"uri": to})
        assert (await status(source, "completed", "failed"))["status"] == "completed"
        assert (await source.execute("query-status"))["status"] == "postmigrate"
        await status(destination, "completed")
        assert (await destination.execute("query-status"))["status"] == "paused"
        await destination.execute("cont")
        assert (await destination.execute("query-status"))["status"] == "running"
        for process, client in ((one, source), (two, destination)):
            await client.execute("quit")
            assert (await ends(process))[0] == 0
    assert os.listdir(tmp_path) == []


async def test_uuids_that_differ(tmp_path: Path) -> None:
    words = ["-c", "validate-uuid", "--guest", GUEST, "--uuid"]
    to = f"unix:{tmp_path}/m"
    async with (
        hosting(f"unix:{tmp_path}/a", *words, "00112233-4455-6677-8899-aabbccddeeff") as (_, source),
        hosting(f"unix:{tmp_path}/b", *words, "10112233-4455-6677-8899-aabbccddeeff", "--incoming", to) as (two, other),
    ):
        await source.execute("migrate", {"uri": to})
        await status(source, "failed")
        assert (await source.execute("query-status"))["status"] == "running"
        # It was not the expected source: the destination goes on waiting.
        assert (await other.execute("query-status"))["status"] == "inmigrate"
        await other.execute("quit")
        _, text = await ends(two)
        assert "was dropped: the stream is of the machine with the UUID 00112233" in text


async def test_uncertain_end_has_a_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination takes too long to answer the commit: exit code and text say that the owner is unknown."""
    (tmp_path / "mymodule.py").write_text(MODULE)
    (tmp_path / "short.toml").write_text("handover-timeout = 0.3\n")
    monkeypatch.chdir(tmp_path)
    other = ScriptedGuest("mine", {"table": 256}, run_state="inmigrate", delays={"activate": 2})
    words = ["--guest", "app:mymodule:factory", "--config", tmp_path / "short.toml"]
    async with hosting(f"unix:{tmp_path}/q", *words) as (process, client), trio.open_nursery() as nursery:
        monitor = trimig.Monitor()
        nursery.start_soon(functools.partial(trimig.receive, other, f"unix:{tmp_path}/m", monitor=monitor))
        while not monitor.addresses:
            await monitor.wait_changed()
        await client.execute("migrate", {"uri": f"unix:{tmp_path}/m"})
        assert (await status(client, "failed"))["owner"] == "unknown"
        os.kill(process.pid, signal.SIGTERM)
        code, text = await ends(process)
        assert (code, "look at the destination" in text) == (3, True)


async def test_lines_for_machines(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with started("run", "--guest", GUEST, "--json", "--qmp", f"unix:{tmp_path}/q", "-S") as process:
            assert process.stdout is not None
            first = json.loads(await first_line(process.stdout))
            assert (first["kind"], first["listening"]) == ("QMP", f"unix:{tmp_path}/q")
            async with qmp.connect(first["listening"]) as client:
                assert (await client.execute("query-status"))["status"] == "prelaunch"
                await client.execute("cont")
                await client.execute("quit")
                records = [json.loads(line) for line in (await text_of(process.stdout)).splitlines()]
            assert [r.get("event") for r in records] == ["RESUME", "SHUTDOWN", "STOP", None]
            assert records[-1]["owner"] == "source"
            assert await process.wait() == 0


async def test_guest_that_dies(tmp_path: Path) -> None:
    """Commands report it, a migration is refused with the reason, and the end is a sentence and exit code 1."""
    async with hosting(f"unix:{tmp_path}/q", "--guest", GUEST) as (process, client):
        children = (await trio.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()).split()
        assert len(children) == 1
        events = client.events()
        os.kill(int(children[0]), signal.SIGKILL)
        assert (await anext(events))["event"] == "STOP"
        found = await client.execute("query-status")
        assert (found["status"], found["running"]) == ("internal-error", False)
        for command in ("stop", "cont"):
            with pytest.raises(
                qmp.CommandFailed, match=r"its worker has died .*killed by signal 9 .*the guest is lost"
            ):
                await client.execute(command)
        with pytest.raises(qmp.CommandFailed, match=r"its worker has died .*killed by signal 9"):
            await client.execute("migrate", {"uri": f"file:{tmp_path}/f"})
        told = await trimig_command("status", "--qmp", f"unix:{tmp_path}/q")
        assert told[1].startswith(
            "guest: internal-error; migration: none; owner: source; its worker has died (process "
        )
        await client.execute("quit")
        code, text = await ends(process)
        assert (code, "killed by signal 9" in text) == (1, True)
    assert os.listdir(tmp_path) == []


async def test_guest_that_dies_while_its_memory_is_sent(tmp_path: Path) -> None:
    to, here = f"unix:{tmp_path}/m", f"unix:{tmp_path}/a"
    async with (
        hosting(here, "--guest", GUEST) as (process, source),
        hosting(f"unix:{tmp_path}/b", "--guest", GUEST, "--incoming", to),
        started("migrate", to, "--qmp", here, "--wait", "-p", "max-bandwidth=2M") as migrate,
    ):
        assert migrate.stderr is not None
        await status(source, "active")
        children = (await trio.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()).split()
        os.kill(int(children[0]), signal.SIGKILL)
        text = await text_of(migrate.stderr)
        assert await migrate.wait() == 1
        assert f"the guest is internal-error at {here}: its worker has died (process {children[0]} was killed" in text
        assert (await source.execute("query-status"))["status"] == "internal-error"


@pytest.mark.parametrize("size", ["4K", "1M", "16M", "100M", "256M", "2G"])
def test_hot_memory_fits_whatever_the_size(size: str) -> None:
    """A size alone is enough: the size of the working set follows from it."""
    options = workload.options_of(f"size={size}")
    assert options["hot"] <= options["size"]
    assert options["hot"] == min(32 << 20, options["size"] // 8)
    assert workload.options_of(f"size={size},hot=4K")["hot"] == 4096
