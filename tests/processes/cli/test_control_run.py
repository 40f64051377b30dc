"""The control commands with ``trimig run`` behind the QMP socket: the same words as for a QEMU."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.processes.cli.command import first_line, started, trimig_command
from trimig import qmp

LIMIT = 60
GUEST = "process:size=32M,dirty-rate=4M,hot=2M"


@asynccontextmanager
async def hosts(directory: Path, *more: str) -> AsyncIterator[tuple[str, str]]:
    """A running guest and its destination, by their QMP addresses; both are ended in order."""
    addresses = f"unix:{directory}/source", f"unix:{directory}/destination"
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            for address, words in zip(addresses, ((), ("--incoming", "tcp:127.0.0.1:0")), strict=True):
                process = await stack.enter_async_context(
                    started("run", "--guest", GUEST, "--qmp", address, *words, *more)
                )
                assert process.stderr is not None
                assert "QMP at" in await first_line(process.stderr)
                stack.callback(process.terminate)
            yield addresses


async def asked(*words: str) -> dict[str, Any]:
    """The JSON output of a command, which must succeed."""
    code, out, err = await trimig_command(*words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


async def where(address: str) -> str:
    """The URI of a waiting receiver."""
    while True:
        if found := (await asked("info", "--qmp", address)).get("socket-address"):
            return qmp.uri_of(found[0])
        await trio.sleep(0.05)


async def test_guest_is_tried_dry_and_migrated(tmp_path: Path) -> None:
    """The dry run changes nothing; after the real migration both sides report the owner."""
    async with hosts(tmp_path) as (source, destination):
        before = await asked("set", "--qmp", source)
        found = await asked("migrate", "--dry-run", "--seconds", "4", "--qmp", source)
        assert found["verdict"] == "converges"
        assert found["measured"]["transferred_bytes"] > 0
        assert await asked("set", "--qmp", source) == before
        state = await asked("status", "--qmp", source)
        assert state == {"run_state": "running", "migration": "cancelled", "owner": "source"}
        done = await asked("migrate", await where(destination), "--wait", "--qmp", source, "-p", "max-bandwidth=0")
        assert (done["migration"], done["owner"]) == ("completed", "destination")
        assert (await asked("status", "--qmp", source))["owner"] == "destination"
        assert (await asked("status", "--qmp", destination))["run_state"] == "running"
        code, _, err = await trimig_command("migrate", "tcp:127.0.0.1:1", "--qmp", source)
        assert (code, "Can't migrate the vm" in err) == (1, True)


async def test_ctrl_c_cancels_in_the_other_process(tmp_path: Path) -> None:
    async with hosts(tmp_path) as (source, destination):
        uri = await where(destination)
        words = ("migrate", uri, "--wait", "--qmp", source, "-p", "max-bandwidth=200K")
        async with started(*words) as process:
            while (await asked("status", "--qmp", source))["migration"] != "active":
                assert process.poll() is None
            os.kill(process.pid, signal.SIGINT)
            assert await process.wait() == 130
        assert await asked("status", "--qmp", source) == {
            "run_state": "running", "migration": "cancelled", "owner": "source"
        }  # fmt: skip


async def test_switchover_waits_for_continue(tmp_path: Path) -> None:
    """N1, F13, F14, with the sentence of the other side."""
    async with hosts(tmp_path) as (source, destination):
        uri = await where(destination)
        code, _, err = await trimig_command("continue", "--qmp", source)
        assert (code, "no migration that waits before its switchover" in err) == (1, True)
        words = ("-c", "pause-before-switchover", "-p", "max-bandwidth=0", "--qmp", source)
        assert (await trimig_command("migrate", uri, *words))[0] == 0
        while (state := await asked("status", "--qmp", source))["migration"] != "pre-switchover":
            assert state["migration"] in ("setup", "active")
        assert state["owner"] == "source"
        assert (await trimig_command("continue", "--qmp", source))[0] == 0
        while (state := await asked("status", "--qmp", destination))["migration"] != "completed":
            assert state["migration"] != "failed"
        assert state["run_state"] == "running"


async def test_refusal_is_one_sentence(tmp_path: Path) -> None:
    async with hosts(tmp_path) as (source, _):
        for words, text in (
            (("postcopy",), "postcopy"),
            (("set", "-p", "downtime-limit=2000001"), "downtime"),
            (("set", "-c", "no-such"), "no-such"),
            (("migrate", "pigeon:1"), "protocol"),
        ):
            code, out, err = await trimig_command(*words, "--qmp", source)
            assert (code, out, err.count("\n"), text in err) == (1, "", 1, True), err
