"""The control commands, as processes, with real QEMUs behind the QMP sockets; and one script that drives both kinds."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from tests.processes.cli.command import first_line, started, text_of
from tests.qemu.bootsector import boot_sector, parse_counts
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.installed import SPOKEN

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).resolve().parents[2]
DRIVE = ROOT / "examples" / "qmp_drive.py"
LIMIT = 90
#: Bytes per second at which no migration completes within a test.
SLOW = "200K"


@contextlib.asynccontextmanager
async def controlled(
    path: Path, machine: str = "none", ram: str = "16M", **more: Any
) -> AsyncIterator[tuple[Qemu, str]]:
    """A QEMU with a second QMP socket at *path*, and the address of that socket."""
    extra = ["-qmp", f"unix:{path},server=on,wait=off"]
    async with Qemu.start(machine, ram, extra=extra, **more) as vm:
        if machine == "none":
            vm.ram[:] = random_ram(len(vm.ram), seed=3)
        yield vm, f"unix:{path}"


@contextlib.asynccontextmanager
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Qemu, str, Qemu, str]]:
    """A source with its QMP address, a destination, and the address at which it waits."""
    with trio.fail_after(LIMIT):
        async with (
            controlled(tmp_path / "source") as (vm, address),
            Qemu.start("none", "16M", incoming="defer") as there,
        ):
            yield vm, address, there, await there.incoming("tcp:127.0.0.1:0")


async def command(
    *words: str, program: tuple[str, ...] = ("-m", "trimig"), meanwhile: Callable[[int], Any] | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; *meanwhile* runs beside it and gets its process id."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    argv = [sys.executable, *program, *words]
    run = functools.partial(
        trio.run_process,
        argv,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
    )
    done: subprocess.CompletedProcess[bytes]
    if meanwhile is None:
        done = await run()
    else:
        ended: list[subprocess.CompletedProcess[bytes]] = []

        async def beside(*, task_status: trio.TaskStatus[trio.Process]) -> None:
            ended.append(await run(task_status=task_status))

        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(beside)
            await meanwhile(process.pid)
        (done,) = ended
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_guest_of_a_qemu_is_migrated_and_reported(tmp_path: Path) -> None:
    async with pair(tmp_path) as (vm, address, there, uri):
        code, out, _ = await command("status", "--qmp", address)
        assert (code, out) == (0, "guest: running; migration: none; owner: source\n")
        code, out, err = await command("migrate", uri, "--qmp", address, "--wait", "--json", "-c", "return-path")
        report = json.loads(out)
        assert (code, report["migration"], report["owner"]) == (0, "completed", "destination")
        assert report["transferred_bytes"] > 16 << 20
        phases = [record["phase"] for record in map(json.loads, err.splitlines()) if record["event"] == "progress"]
        order = ["connecting", "first copy", "later passes", "switchover", "completed"]
        assert phases == sorted(phases, key=order.index)
        await there.wait_status("running")
        assert np.array_equal(vm.ram, there.ram)
        code, out, _ = await command("status", "--qmp", address)
        assert (code, out) == (0, "guest: postmigrate; migration: completed; owner: destination (the other side)\n")
        code, out, _ = await command("info", "--qmp", address)
        assert "ram.total" in out


async def test_ctrl_c_cancels_in_the_qemu_and_the_next_one_succeeds(tmp_path: Path) -> None:
    async with controlled(tmp_path / "source") as (vm, address):
        async with Qemu.start("none", "16M", incoming="tcp:127.0.0.1:0") as lost:
            uri = await lost.incoming_uri("")

            async def interrupt(pid: int) -> None:
                await vm.wait_migration_status("active")
                os.kill(pid, signal.SIGINT)

            code, _, _ = await command(
                "migrate", uri, "--qmp", address, "--wait", "-p", f"max-bandwidth={SLOW}", meanwhile=interrupt
            )
            assert code == 130
        assert (await vm.query_migrate())["status"] == "cancelled"
        await vm.wait_status("running")
        async with Qemu.start("none", "16M", incoming="defer") as there:
            uri = await there.incoming("tcp:127.0.0.1:0")
            code, out, _ = await command("migrate", uri, "--qmp", address, "--wait", "-p", "max-bandwidth=0")
            assert (code, "migrated to" in out) == (0, True)
            await there.wait_status("running")


async def test_switchover_waits_for_continue(tmp_path: Path) -> None:
    """N1, F13, F14: before pre-switchover the command is refused; then the migration goes on."""
    async with pair(tmp_path) as (vm, address, there, uri):
        code, _, err = await command("continue", "--qmp", address)
        assert (code, "no migration that waits before its switchover" in err) == (1, True)
        assert (await command("set", "-c", "pause-before-switchover", "--qmp", address))[0] == 0
        assert (await command("migrate", uri, "--qmp", address))[0] == 0
        await vm.wait_migration_status("pre-switchover")
        code, out, _ = await command("status", "--qmp", address, "--json")
        assert json.loads(out) == {"run_state": "finish-migrate", "migration": "pre-switchover", "owner": "source"}
        assert (await command("continue", "--qmp", address))[0] == 0
        await vm.wait_migration_status("completed")
        await there.wait_status("running")


async def test_postcopy_between_two_qemus_with_a_lost_connection(tmp_path: Path) -> None:
    """O6, row 35: the command switches, waits while the migration is paused, and ends after the recovery."""
    slow = ("-p", "max-bandwidth=4M", "-p", "max-postcopy-bandwidth=1M")
    with trio.fail_after(LIMIT):
        async with (
            controlled(tmp_path / "source") as (vm, source),
            controlled(tmp_path / "destination", incoming="defer") as (there, destination),
        ):
            assert (await command("set", "-c", "postcopy-ram", "--qmp", destination))[0] == 0
            uri = await there.incoming("tcp:127.0.0.1:0")

            async def cut_and_recover(_: int) -> None:
                await vm.wait_migration_status("postcopy-active")
                assert (await command("pause", "--qmp", destination))[0] == 0  # the socket of the source is taken
                await vm.wait_migration_status("postcopy-paused")
                await there.wait_migration_status("postcopy-paused")
                code, out, err = await command("recover", "tcp:127.0.0.1:0", "--qmp", destination)
                assert (code, err) == (0, "")
                at = out.strip().removeprefix("the destination waits at ")
                assert (await command("set", "-p", "max-postcopy-bandwidth=0", "--qmp", source))[0] == 0
                assert (await command("recover", at, "--qmp", source))[1] == f"the source connects to {at}\n"

            words = ("migrate", uri, "--qmp", source, "--postcopy-after", "20%", *slow)
            code, out, err = await command(*words, meanwhile=cut_and_recover)
            assert code == 0, err
            assert out.startswith(f"migrated to {uri} in ")
            assert "switching to postcopy" in err
            assert "trimig recover there" in err
            assert np.array_equal(vm.ram, there.ram)
            await there.wait_status("running")


async def test_cancel_and_refusals_of_a_qemu(tmp_path: Path) -> None:
    """C2, D7, F9, F16."""
    async with pair(tmp_path) as (vm, address, _, uri):
        code, out, _ = await command("cancel", "--qmp", address)
        assert (code, "no migration to cancel" in out) == (0, True)
        assert (await command("migrate", uri, "--qmp", address, "-p", f"max-bandwidth={SLOW}"))[0] == 0
        for words in (
            ("set", "-c", "xbzrle"),
            ("set", "-p", "downtime-limit=2000001"),
            ("postcopy",),
            ("migrate", "tcp:127.0.0.1:1"),
        ):
            code, _, err = await command(*words, "--qmp", address)
            assert (code, err.startswith(f"trimig: {address} refuses "), err.count("\n")) == (1, True, 1), err
        code, out, _ = await command("cancel", "--qmp", address)
        assert (code, out.startswith("cancelled (guest: running")) == (0, True)
        await vm.wait_status("running")


async def test_events_of_a_qemu_until_the_end(tmp_path: Path) -> None:
    """H1, states.md part 9: the order of a simple migration."""
    async with pair(tmp_path) as (vm, address, _, uri):
        async with started("events", "--until-end", "--json", "--qmp", address) as process:
            assert process.stdout is not None
            seen = trio.Event()

            async def make_events() -> None:
                while not seen.is_set():  # there is no other sign that the command has begun to follow
                    await vm.qmp.execute("stop")
                    await vm.qmp.execute("cont")
                    await trio.sleep(0.02)
                await vm.qmp.execute("migrate", {"uri": uri})

            async with trio.open_nursery() as nursery:
                nursery.start_soon(make_events)
                out = await first_line(process.stdout) + "\n"
                seen.set()
                out += await text_of(process.stdout)
            assert await process.wait() == 0
        events = [json.loads(line) for line in out.splitlines()]
        names = [event.get("data", {}).get("status", event["event"]) for event in events]
        # Versions from 10.0 on show the status "device" of each migration.
        story = [name for name in names[names.index("setup") :] if name not in ("MIGRATION_PASS", "device")]
        assert story == ["setup", "active", "STOP", "completed"]
        assert set(names[: names.index("setup")]) <= {"STOP", "RESUME"}


async def settings(address: str) -> dict[str, Any]:
    """All settings."""
    found: dict[str, Any] = json.loads((await command("set", "--json", "--qmp", address))[1])
    return found


async def test_dry_run_leaves_a_running_guest_as_it_was(tmp_path: Path) -> None:
    """The guest counts on, its memory is right, its settings are as before; then it is migrated for good."""
    with trio.fail_after(LIMIT):
        async with controlled(tmp_path / "source", "pc", "64M", boot=boot_sector()) as (vm, address):
            await vm.wait_serial(lambda text: text.count("\n") >= 3)
            before = await settings(address)
            code, out, err = await command("migrate", "--dry-run", "--json", "--seconds", "5", "--qmp", address)
            assert code == 0, err
            record = json.loads(out)
            assert record["verdict"] == "converges"
            assert record["total_time_ms"]["high"] >= record["total_time_ms"]["likely"] > 0
            assert await settings(address) == before
            assert (await vm.query_migrate())["status"] == "cancelled"
            await vm.wait_status("running")
            count = vm.serial_text().count("\n")
            await vm.wait_serial(lambda text: text.count("\n") >= count + 3)
            counts = parse_counts(vm.serial_text())
            assert counts == list(range(counts[0], counts[0] + len(counts)))
            async with Qemu.start("pc", "64M", boot=boot_sector(), incoming="defer") as there:
                uri = await there.incoming("tcp:127.0.0.1:0")
                assert (await command("migrate", uri, "--wait", "--qmp", address))[0] == 0
                await there.wait_status("running")


async def test_dry_run_predicts_what_the_link_will_take(tmp_path: Path) -> None:
    """16 MiB of random memory at 1 MiB/s: about 16 seconds, although the sink on this host is faster."""
    with trio.fail_after(LIMIT):
        async with controlled(tmp_path / "source") as (vm, address):
            code, out, err = await command("migrate", "--dry-run", "--json", "-p", "max-bandwidth=1M", "--qmp", address)
            assert code == 0, err
            assert json.loads(out)["total_time_ms"]["likely"] == pytest.approx(16_000, rel=0.2)
            await vm.wait_status("running")


async def test_interrupted_dry_run_restores_the_qemu(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with controlled(tmp_path / "source", "pc", "512M", boot=boot_sector()) as (vm, address):
            await vm.set_capabilities({"events": False})
            before = await settings(address)

            async def interrupt(pid: int) -> None:
                await vm.wait_migration_status("active", "pre-switchover", "cancelling", "cancelled")
                os.kill(pid, signal.SIGINT)

            code, _, _ = await command("migrate", "--dry-run", "--seconds", "60", "--qmp", address, meanwhile=interrupt)
            assert code in (0, 130)  # it may have had enough passes by then
            assert await settings(address) == before
            await vm.wait_status("running")
            assert (await vm.query_migrate())["status"] == "cancelled"


async def test_no_server_behind_the_socket(tmp_path: Path) -> None:
    code, out, err = await command("status", "--qmp", f"unix:{tmp_path}/absent")
    assert (code, out, err.count("\n"), "absent" in err) == (1, "", 1, True)


# -- one script, two programs ------------------------------------------------------------------------------------------


async def transcript(*arguments: str) -> list[str]:
    """The output of examples/qmp_drive.py; without addresses it starts two ``trimig run``."""
    code, out, err = await command(*arguments, program=(str(DRIVE),))
    assert (code, err) == (0, "")
    return out.splitlines()


async def qemu_transcript(tmp_path: Path, version: str, *options: str) -> list[str]:
    guest = functools.partial(controlled, machine="pc", ram="32M", boot=boot_sector(), version=version)
    async with (
        guest(tmp_path / "a") as (_, source),
        guest(tmp_path / "b", incoming="defer") as (_, destination),
    ):
        return await transcript(source, destination, *options)


@pytest.mark.parametrize("version", [SPOKEN])
async def test_script_of_an_independent_client_drives_two_qemus(tmp_path: Path, version: str) -> None:
    """G1-G3, G10, H1: the transcript agrees with what states.md and config.md say about that version."""
    with trio.fail_after(LIMIT):
        lines = [line.split(None, 2) for line in await qemu_transcript(tmp_path, version)]
    members = {(who, text.split(":")[0]): text.split(": ")[1].split() for kind, who, text in lines if kind == "members"}
    assert members["source", "none"] == ["-"]
    assert members["source", "cancelled"] == ["status"]
    assert {"downtime", "ram.total", "setup-time", "total-time"} <= set(members["source", "completed"])
    arrived = [text for kind, who, text in lines if (kind, who) == ("event", "destination")]
    assert arrived == ["MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed"]
    errors = [text.rsplit(": ", 1)[1] for kind, _, text in lines if kind == "error"]
    assert errors[0] == "CommandNotFound"
    assert set(errors[1:]) == {"GenericError"}


def shape(lines: list[str]) -> list[str]:
    """A transcript without the additions of trimig: three members, and a reason that QEMU does not give."""
    ours = {"owner", "dirty-tracking", "convergence", "error-desc"}
    return [" ".join(word for word in line.split() if word not in ours) for line in lines]


@pytest.mark.parametrize("pause", [True, False], ids=["paused", "at once"])
@pytest.mark.parametrize("version", [SPOKEN])
async def test_transcripts_of_qemu_and_trimig_agree(tmp_path: Path, version: str, *, pause: bool) -> None:
    """H1, H4: members per status, order of events, classes of errors: a client cannot tell them apart."""
    options = () if pause else ("--no-pause",)
    with trio.fail_after(LIMIT):
        ours = shape(await transcript(*options))
        assert ours == shape(await qemu_transcript(tmp_path, version, *options))
    told = [line.removeprefix("event source ") for line in ours if line.startswith("event source ")]
    last = told[len(told) - told[::-1].index("MIGRATION setup") :]
    held = ["MIGRATION pre-switchover", "MIGRATION device"] if pause else []
    assert [word for word in last if word != "MIGRATION_PASS"] == [
        "MIGRATION active",
        "STOP",
        *held,
        "MIGRATION completed",
    ]
    assert last[last.index("STOP") :].count("MIGRATION_PASS") == 1


async def test_dry_run_of_a_qemu_of_another_user(tmp_path: Path) -> None:
    """The sink is passed as a descriptor, so a QEMU without access to the user's files can write to it."""
    with trio.fail_after(LIMIT), tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        path = f"{directory}/qmp"
        process = await trio.lowlevel.open_process(
            ["qemu-system-x86_64", "-M", "none", "-m", "16M", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"],
            user=65534, group=65534, extra_groups=[], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not await trio.Path(path).exists():
                assert process.poll() is None
                await trio.sleep(0.02)
            code, out, err = await command("migrate", "--dry-run", "--json", "--qmp", f"unix:{path}")
            assert code == 0, err
            assert json.loads(out)["measured"]["transferred_bytes"] > 0
            code, out, err = await command("status", "--json", "--qmp", f"unix:{path}")
            assert (json.loads(out)["migration"], json.loads(out)["run_state"]) == ("cancelled", "running")
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
