"""Arguments that are missing, too many, of the wrong type or out of range: trimig and a real QEMU refuse alike."""

from __future__ import annotations

from typing import Any

import pytest

from tests.qemu.harness import Qemu
from tests.qemu.qmp import QmpError
from tests.qmp.driver import hosted
from trimig.qmp import CommandFailed

ROW = {"capability": "events", "state": True}

#: Commands without an effect, and whether both refuse them in the same words.
SAME_WORDS: list[tuple[str, dict[str, Any]]] = [
    ("bogus", {}),
    ("query-version", {"x": 1}),
    ("query-status", {"x": 1}),
    ("stop", {"x": 1}),
    ("cont", {"x": 1}),
    ("quit", {"x": 1}),
    ("migrate", {}),
    ("migrate", {"uri": 1}),
    ("migrate", {"uri": "tcp:127.0.0.1:1", "blk": 1}),
    ("migrate", {"uri": "tcp:127.0.0.1:1", "bogus": 1}),
    ("migrate", {"uri": "fd:nosuch"}),
    ("migrate", {"uri": "fd:999999"}),
    ("migrate_cancel", {"x": 1}),
    ("migrate_cancel", {}),
    ("migrate-continue", {}),
    ("migrate-continue", {"state": 3}),
    ("migrate-continue", {"state": "bogus"}),
    ("migrate-continue", {"state": "active"}),
    ("migrate-incoming", {}),
    ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}),
    ("migrate-pause", {}),
    ("migrate-recover", {}),
    ("migrate-recover", {"uri": "tcp:127.0.0.1:1"}),
    ("migrate-set-capabilities", {}),
    ("migrate-set-capabilities", {"capabilities": {}}),
    ("migrate-set-capabilities", {"capabilities": []}),
    ("migrate-set-capabilities", {"capabilities": [1]}),
    ("migrate-set-capabilities", {"capabilities": [ROW, {}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events"}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": 1}]}),
    ("migrate-set-capabilities", {"capabilities": [{**ROW, "x": 1}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "bogus", "state": True}]}),
    ("migrate-set-parameters", {}),
    ("getfd", {}),
    ("getfd", {"fdname": "a"}),
    ("closefd", {"fdname": "nosuch"}),
    ("closefd", {"fdname": 5}),
    ("query-name", {}),
    ("query-uuid", {}),
    ("query-status", {}),
]

#: Commands that both refuse or accept, with trimig's own words.
OWN_WORDS: list[tuple[str, dict[str, Any]]] = [
    ("migrate", {"uri": "tcp:foo"}),
    ("migrate", {"uri": "unix:"}),
    ("migrate", {"uri": "pigeon:1"}),
    ("migrate", {"uri": "rdma:1"}),
    ("migrate", {"uri": "tcp:127.0.0.1:1", "resume": True}),
    ("migrate-start-postcopy", {}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": False}]}),
    *(
        ("migrate-set-parameters", {name: value})
        for name, values in {
            "downtime-limit": (0, 2_000_000, 2_000_001, -1, "5", True, 1.5),
            "bogus": (1,),
            "compress-level": (9, 10),
            "compress-threads": (0, 1),
            "decompress-threads": (0, 1),
            "cpu-throttle-initial": (0, 1, 99, 100),
            "cpu-throttle-increment": (0, 1, 99, 100),
            "max-bandwidth": (-1, 0, 2**64 - 1, "1"),
            "xbzrle-cache-size": (4095, 4096, 5000),
            "tls-creds": (None, 5),
            "multifd-compression": ("bogus", "none"),
            "multifd-channels": (0, 1, 255, 256),
            "announce-step": (0, 1),
        }.items()
        for value in values
    ),
]


async def ours(commands: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """``(error class, text)`` of each command; empty if the command is accepted."""
    found = []
    async with hosted() as talk:
        for name, arguments in commands:
            try:
                await talk.say(name, arguments)
            except CommandFailed as error:
                found.append((error.error_class, error.desc))
            else:
                found.append(("", ""))
    return found


async def qemus(commands: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    found = []
    async with Qemu.start(ram="16M") as vm:
        for name, arguments in commands:
            try:
                await vm.qmp.execute(name, arguments)
            except QmpError as error:
                found.append((error.error_class, error.desc))
            else:
                found.append(("", ""))
    return found


@pytest.mark.qemu
async def test_refused_in_the_words_of_a_qemu() -> None:
    mine, theirs = await ours(SAME_WORDS), await qemus(SAME_WORDS)
    for command, (mine_one, their_one) in zip(SAME_WORDS, zip(mine, theirs, strict=True), strict=True):
        assert mine_one == their_one, command


@pytest.mark.qemu
async def test_refused_like_a_qemu() -> None:
    """B6, D3-D12: the class of the error, or none."""
    mine, theirs = await ours(OWN_WORDS), await qemus(OWN_WORDS)
    for command, (mine_one, their_one) in zip(OWN_WORDS, zip(mine, theirs, strict=True), strict=True):
        assert mine_one[0] == their_one[0], (command, mine_one, their_one)


@pytest.mark.qemu
@pytest.mark.parametrize("uri", ["tcp:foo", "unix:", "pigeon:1", "rdma:1", "fd:nosuch", "fd:999999"])
async def test_status_behind_a_bad_address_is_that_of_a_qemu(uri: str) -> None:
    """B5, B6, F8: the members of query-migrate and the events; ``owner`` is trimig's own."""
    async with Qemu.start(ram="16M") as vm, hosted() as talk:
        await talk.capabilities(events=True)
        with pytest.raises(QmpError):
            await vm.migrate(uri)
        await talk.refused("migrate", {"uri": uri})
        assert (await talk.query()).keys() - {"owner"} == (await vm.query_migrate()).keys()
        assert talk.names() == vm.migration_statuses() == ["setup", "failed"]


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("migrate_set_speed", {}, "Parameter 'value' is missing"),
        ("migrate_set_speed", {"value": 1.5}, "Invalid parameter type for 'value', expected: integer"),
        ("migrate_set_speed", {"value": True}, "Invalid parameter type for 'value', expected: integer"),
        ("migrate_set_downtime", {"value": "1"}, "Invalid parameter type for 'value', expected: number"),
        ("migrate-set-cache-size", {"value": 4096, "x": 1}, "Parameter 'x' is unexpected"),
        ("query-migrate-cache-size", {"x": 1}, "Parameter 'x' is unexpected"),
        ("x-trimig-settle", {}, "Parameter 'owner' is missing"),
        ("x-trimig-settle", {"owner": "me"}, "Parameter 'owner' does not accept value 'me'"),
    ],
)
async def test_commands_that_a_qemu_of_today_has_not(name: str, arguments: dict[str, Any], text: str) -> None:
    async with hosted() as talk:
        assert await talk.refused(name, arguments) == text
