"""Commands for libvirt and similar clients: objects, yank, the human monitor, the dirty rate, and empty answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.qmp.driver import hosted, pair
from trimig.config import TlsX509
from trimig.qmp import CommandFailed
from trimig.status import Status
from trimig.testing import ScriptedGuest

# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [("query-migrat", "query-migrate"), ("migrate-cancel", "migrate_cancel"), ("quitt", "quit"), ("zzz", None)],
)
async def test_an_unknown_command_names_the_nearest(given: str, meant: str | None) -> None:
    async with hosted() as talk:
        with pytest.raises(CommandFailed) as caught:
            await talk.say(given)
        assert caught.value.error_class == "CommandNotFound"
        assert caught.value.desc.startswith(f"The command {given} has not been found")
        assert (f"did you mean {meant}" in caught.value.desc) is (meant is not None)


async def test_an_unknown_argument_names_the_nearest() -> None:
    async with hosted() as talk:
        assert "did you mean fdname?" in await talk.refused("closefd", {"fdname": "x", "fdnam": "y"})


# -- objects -----------------------------------------------------------------------------------------------------------

X509 = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": "/etc/pki", "endpoint": "client", "verify-peer": True}


async def test_objects_come_and_go() -> None:
    async with hosted() as talk:
        await talk.say("object-add", X509)
        assert talk.machine.config.objects == (TlsX509(id="tls0", dir="/etc/pki", endpoint="client"),)
        assert "already" in await talk.refused("object-add", {**X509, "dir": "/other"})
        await talk.say("object-add", {"qom-type": "authz-simple", "id": "who", "identity": "CN=a"})
        await talk.say("migrate-set-parameters", {"tls-creds": "tls0", "tls-authz": "who"})
        assert "'x' not found" in await talk.refused("object-del", {"id": "x"})
        await talk.say("object-del", {"id": "tls0"})
        assert [one.id for one in talk.machine.config.objects] == ["who"]
        await talk.say("object-add", X509)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'qom-type' is missing"),
        ({"qom-type": "tls-creds-x509"}, "'id' is missing"),
        ({"qom-type": 5, "id": "a"}, "expected: string"),
        ({"qom-type": "tls-creds-x508", "id": "a"}, "did you mean tls-creds-x509"),
        ({"qom-type": "secret", "id": "a"}, "there is no object type 'secret'"),
        ({**X509, "id": "9"}, "property 'id' expects a letter"),
        ({**X509, "directory": "x"}, "did you mean dir"),
        ({**X509, "verify-peer": "on"}, "true or false"),
        ({**X509, "priority": "NORMAL"}, "GnuTLS"),
        ({"qom-type": "tls-creds-x509", "id": "a"}, "needs 'dir'"),
        ({"qom-type": "authz-list", "id": "a", "rules": [{"match": "x"}]}, "needs 'policy'"),
    ],
)
async def test_an_object_that_is_none_is_refused_and_changes_nothing(arguments: dict[str, Any], words: str) -> None:
    async with hosted() as talk:
        assert words in await talk.refused("object-add", arguments)
        assert talk.machine.config.objects == ()


async def test_an_object_in_use_stays(tmp_path: Path) -> None:
    """A running migration keeps the objects that it names; afterwards the object may be deleted."""
    async with hosted() as talk:
        await talk.say("object-add", {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(tmp_path)})
        await talk.say("object-add", {"qom-type": "tls-creds-x509", "id": "other", "dir": str(tmp_path)})
        await talk.say("migrate-set-parameters", {"tls-creds": "tls0"})
        monitor = talk.machine.outgoing
        monitor._core._config, monitor._core._status = talk.machine.config, Status.ACTIVE
        assert "in use by a migration" in await talk.refused("object-del", {"id": "tls0"})
        await talk.say("object-del", {"id": "other"})
        monitor._core._status = Status.FAILED
        await talk.say("object-del", {"id": "tls0"})


# -- yank --------------------------------------------------------------------------------------------------------------

MIGRATION = {"instances": [{"type": "migration"}]}


async def test_there_is_something_to_yank_while_a_migration_goes_on(tmp_path: Path) -> None:
    async with pair(tmp_path, ScriptedGuest(blocks={"ram": 256})) as (source, destination, uri):
        assert await source.say("query-yank") == []
        assert await destination.say("query-yank") == [{"type": "migration"}]
        await source.say("migrate-set-parameters", {"max-bandwidth": 10_000})
        await source.say("migrate", {"uri": uri})
        await source.until(Status.ACTIVE)
        assert await source.say("query-yank") == [{"type": "migration"}]
        assert await source.say("yank", {"instances": []}) == {}
        assert source.machine.outgoing.status is Status.ACTIVE
        await source.say("yank", MIGRATION)
        assert await source.over() is Status.FAILED
        assert await source.state() == "running"
        assert (await source.query())["error-desc"]
        await destination.over()
        assert destination.machine.incoming.status is Status.FAILED
        assert await source.say("query-yank") == []


async def test_a_destination_can_be_yanked_too(tmp_path: Path) -> None:
    async with pair(tmp_path, ScriptedGuest(blocks={"ram": 256})) as (source, destination, uri):
        await source.say("migrate-set-parameters", {"max-bandwidth": 10_000})
        await source.say("migrate", {"uri": uri})
        await destination.until(Status.ACTIVE, incoming=True)
        await destination.say("yank", MIGRATION)
        assert await source.over() is Status.FAILED
        await destination.over()
        assert await source.state() == "running"


@pytest.mark.parametrize(
    ("instances", "words"),
    [
        ([{"type": "migration"}], "Instance not found"),
        ([{"type": "block-node", "node-name": "disk"}], "Instance not found"),
        ([{"type": "chardev", "id": "c"}], "Instance not found"),
        ([{}], "'type' is missing"),
        ([{"type": "chardev"}], "'id' is missing"),
        ([{"type": "net"}], "does not accept value 'net'"),
        ([{"type": "migration", "id": "x"}], "'id' is unexpected"),
        ([5], "expected: object"),
    ],
)
async def test_what_cannot_be_yanked(instances: list[Any], words: str) -> None:
    async with hosted() as talk:
        with pytest.raises(CommandFailed) as caught:
            await talk.say("yank", {"instances": instances})
        assert words in caught.value.desc
        assert (caught.value.error_class == "DeviceNotFound") is (words == "Instance not found")


# -- the monitor for people --------------------------------------------------------------------------------------------


async def human(talk: Any, line: str) -> str:
    found: str = await talk.say("human-monitor-command", {"command-line": line})
    return found


async def test_info_migrate_shows_the_globals_and_the_migration(tmp_path: Path) -> None:
    """A12: store-global-state, only-migratable, send-configuration, send-section-footer as on or off."""
    async with pair(tmp_path) as (source, destination, uri):
        for line in ("info migrate", "info migrate -a", " info  migrate "):
            text = await human(source, line)
            assert text.splitlines()[:5] == [
                "globals:", "store-global-state: on", "only-migratable: off", "send-configuration: on",
                "send-section-footer: on",
            ]  # fmt: skip
        assert "socket address: type=unix path=" in await human(destination, "info migrate")
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED
        text = await human(source, "info migrate")
        assert "Migration status: completed\r\n" in text
        assert "owner of the guest: destination\r\n" in text
        assert "total ram: 32 kbytes\r\n" in text
        assert text.endswith("\r\n")


async def test_info_migrate_shows_encodings_and_the_throttle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G6, G7: with the labels of a QEMU, and only with the capability."""
    async with pair(tmp_path) as (source, _, uri):
        await source.capabilities(compress=True, xbzrle=True, auto_converge=True)
        await source.say("migrate", {"uri": uri})
        assert await source.over() is Status.COMPLETED
        text = await human(source, "info migrate")
        for label in ("cache size: 67108864 bytes", "xbzrle pages: ", "compression pages: ", "compression busy: 0"):
            assert f"\r\n{label}" in text
        assert "throttle" not in text
        monkeypatch.setattr(
            source.machine, "info", lambda: {"status": "active", "owner": "source", "cpu-throttle-percentage": 30}
        )
        text = await human(source, "info migrate")
        assert "cpu throttle percentage: 30\r\n" in text
        assert "compression" not in text
        arrived = {"status": "completed", "owner": "destination", "multifd-bytes": 5 << 20}
        monkeypatch.setattr(source.machine, "info", lambda: arrived)
        assert "multifd bytes: 5120 kbytes\r\n" in await human(source, "info migrate")


async def test_info_capabilities_and_parameters_show_everything() -> None:
    async with hosted() as talk:
        text = await human(talk, "info migrate_capabilities")
        rows = await talk.say("query-migrate-capabilities")
        assert text == "".join(f"{row['capability']}: {'on' if row['state'] else 'off'}\r\n" for row in rows)
        lines = (await human(talk, "info migrate_parameters")).splitlines()
        names = [line.partition(":")[0] for line in lines]
        assert names == list(await talk.say("query-migrate-parameters"))
        assert "max-bandwidth: 134217728 bytes/second" in lines
        assert "downtime-limit: 300 ms" in lines
        assert "tls-creds: ''" in lines
        assert "direct-io: off" in lines
        assert "mode: normal" in lines


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "unknown command"),
        ("info", "unknown command"),
        ("info cpus", "unknown command"),
        ("migrate tcp:127.0.0.1:1", "unknown command"),
        ("quit", "unknown command"),
        ("info migrate x", "extraneous characters"),
        ("INFO migrate", "unknown command"),
    ],
)
async def test_other_lines_say_what_is_known_and_do_nothing(line: str, words: str) -> None:
    async with hosted() as talk:
        text = await human(talk, line)
        assert words in text
        assert not talk.machine.ended.is_set()
        assert talk.machine.outgoing.status is Status.NONE


async def test_a_processor_cannot_be_chosen() -> None:
    async with hosted() as talk:
        assert "cpu-index" in await talk.refused(
            "human-monitor-command", {"command-line": "info migrate", "cpu-index": 0}
        )


# -- the dirty rate ----------------------------------------------------------------------------------------------------


async def measured(talk: Any) -> dict[str, Any]:
    """The result, once it exists."""
    while True:
        found: dict[str, Any] = await talk.say("query-dirty-rate")
        if found["status"] != "measuring":
            return found
        await trio.sleep(0.01)


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap", None])
async def test_the_dirty_rate_is_what_was_written(mode: str | None) -> None:
    """1024 pages of 4 KiB in 100 ms are 40 MiB/s, or less on a slow machine."""
    guest = ScriptedGuest(blocks={"ram": 2048}, dirty_per_sync=1024, working_set=1024)
    async with hosted(guest) as talk:
        assert (await talk.say("query-dirty-rate"))["status"] == "unstarted"
        arguments = {"calc-time": 100, "calc-time-unit": "millisecond"} | ({"mode": mode} if mode else {})
        await talk.say("calc-dirty-rate", arguments)
        assert (await talk.say("query-dirty-rate"))["status"] == "measuring"
        assert "not ended" in await talk.refused("calc-dirty-rate", {"calc-time": 1})
        found = await measured(talk)
        assert found["status"] == "measured"
        assert 0 < found["dirty-rate"] <= 40
        assert found["mode"] == (mode or "page-sampling")
        assert (found["calc-time"], found["calc-time-unit"]) == (0, "second")
        assert (await talk.say("query-dirty-rate", {"calc-time-unit": "millisecond"}))["calc-time"] == 100


async def test_a_guest_that_writes_nothing_has_no_rate() -> None:
    async with hosted() as talk:
        await talk.say("calc-dirty-rate", {"calc-time": 50, "calc-time-unit": "millisecond"})
        assert (await measured(talk))["dirty-rate"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'calc-time' is missing"),
        ({"calc-time": 0}, "out of range"),
        ({"calc-time": 61}, "out of range"),
        ({"calc-time": 49, "calc-time-unit": "millisecond"}, "out of range"),
        ({"calc-time": 60001, "calc-time-unit": "millisecond"}, "out of range"),
        ({"calc-time": -1}, "out of range"),
        ({"calc-time": 1, "mode": "dirty-ring"}, "dirty-ring needs KVM"),
        ({"calc-time": 1, "mode": "guessing"}, "does not accept value 'guessing'"),
        ({"calc-time": 1, "sample-pages": 127}, "out of range"),
        ({"calc-time": 1, "sample-pages": 4097}, "out of range"),
        ({"calc-time": 1, "sample-pages": 512, "mode": "dirty-bitmap"}, "only in page-sampling"),
    ],
)
async def test_a_measurement_that_cannot_be_made(arguments: dict[str, Any], words: str) -> None:
    async with hosted() as talk:
        assert words in await talk.refused("calc-dirty-rate", arguments)
        assert (await talk.say("query-dirty-rate"))["status"] == "unstarted"


async def test_no_measurement_where_no_guest_is() -> None:
    async with hosted(waiting=True) as talk:
        assert "waiting for an incoming" in await talk.refused("calc-dirty-rate", {"calc-time": 1})


async def test_no_measurement_during_a_migration_and_a_migration_ends_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair(tmp_path, ScriptedGuest(blocks={"ram": 256})) as (source, destination, uri):
        assert "in progress" in await destination.refused("calc-dirty-rate", {"calc-time": 1})
        await source.say("calc-dirty-rate", {"calc-time": 60})
        await source.say("migrate-set-parameters", {"max-bandwidth": 10_000})
        await source.say("migrate", {"uri": uri})
        assert (await source.say("query-dirty-rate"))["status"] == "unstarted"
        assert "a migration has begun" in caplog.text
        await source.until(Status.ACTIVE)
        assert "in progress" in await source.refused("calc-dirty-rate", {"calc-time": 1})
        await source.say("migrate-set-parameters", {"max-bandwidth": 0})
        assert await source.over() is Status.COMPLETED
        assert "handed over" in await source.refused("calc-dirty-rate", {"calc-time": 1})


# -- what a guest of trimig's does not have ----------------------------------------------------------------------------


async def test_there_are_no_disks_and_no_network_cards() -> None:
    async with hosted() as talk:
        assert await talk.say("query-block") == []
        announce = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
        assert await talk.say("announce-self", announce) == {}
        assert await talk.say("announce-self", {**announce, "interfaces": [], "id": "x"}) == {}
        assert "no network interface 'net0'" in await talk.refused(
            "announce-self", {**announce, "interfaces": ["net0"]}
        )
        assert "'step' is missing" in await talk.refused("announce-self", {"initial": 1, "max": 1, "rounds": 1})
        assert "announce_rounds" in await talk.refused("announce-self", {**announce, "rounds": 1001})
