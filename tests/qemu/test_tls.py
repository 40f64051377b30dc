"""TLS with a real QEMU as the other end: the rows of QEMU's own test matrix (qemu-tests.md A.1), in both directions.

QEMU loads the same directories as ``tls-creds-x509`` and ``tls-creds-psk``. In each row that fails, the guest runs on
at the source, and the waiting side has failed as well.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.transport.pki import ID, Pki, secure
from trimig.config import AuthzSimple, Config, Parameters, TlsPsk

pytestmark = pytest.mark.qemu

TCP = "tcp:127.0.0.1:0"
NAMES = ("localhost", "127.0.0.1", "dst.example")

needs_psk = pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_client_callback"), reason="Python's ssl has PSK from 3.13 on"
)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def server(pki: Pki) -> Path:
    return pki.make("server", *NAMES)


@pytest.fixture(scope="session")
def client(pki: Pki) -> Path:
    return pki.make("client", "source.example", common_name="host-a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row that QEMU tests: the settings of each side, and whether the migration works."""

    scheme: str = "tcp"
    hostname: str = ""
    #: The client has no certificate.
    anonymous: bool = False
    verify: bool = True
    works: bool = True
    #: Words in the error of trimig as the client, and as the server.
    client_says: str = ""
    server_says: str = ""

    def uri(self, directory: Path) -> str:
        return TCP if self.scheme == "tcp" else f"unix:{directory}/socket"


ROWS = {
    "4 unix, default host": Row(
        scheme="unix", works=False, client_says="no host name to check", server_says="no TLS with the client|connection"
    ),
    "5 unix, override host": Row(scheme="unix", hostname="dst.example"),
    "9 tcp, default host": Row(),
    "10 tcp, override host": Row(hostname="dst.example"),
    "11 tcp, mismatch host": Row(
        hostname="other.example",
        works=False,
        client_says="certificate is not valid for 'other.example'",
        server_says="the other side may not want TLS, or not this side's certificate|does not accept this side's certificate",
    ),
    "14 tcp, allow anonymous client": Row(anonymous=True, verify=False),
    "15 tcp, reject anonymous client": Row(
        anonymous=True,
        works=False,
        client_says="the other side may not want TLS, or not this side's certificate|certificate required",
        server_says="the client shows no certificate",
    ),
}
rows = pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))


def x509(directory: Path, endpoint: str, *, verify: bool = True) -> list[str]:
    """Arguments that make QEMU load the certificates."""
    state = "on" if verify else "off"
    return ["-object", f"tls-creds-x509,id={ID},dir={directory},endpoint={endpoint},verify-peer={state}"]


def fast(config: Config) -> Config:
    """Without a limit of bandwidth."""
    return dataclasses.replace(config, parameters=config.parameters.replace(max_bandwidth=0))


@asynccontextmanager
async def waiting(uri: str, extra: list[str], **parameters: Any) -> AsyncIterator[tuple[Qemu, str]]:
    """A QEMU that waits for a migration with TLS, and its address."""
    with trio.fail_after(peers.LIMIT):
        async with Qemu.start("none", "1M", incoming="defer", extra=extra) as vm:
            await vm.set_parameters({"tls-creds": ID, **parameters})
            yield vm, await vm.incoming(uri)


async def sent_to_qemu(uri: str, vm: Qemu, config: Config) -> None:
    """A guest of trimig goes to *vm* and runs there, every byte as it was."""
    with peers.source() as guest:
        summary = await trimig.migrate(guest, uri, fast(config))
        assert summary.confirmed
        assert await vm.wait_status("running", "paused") == "running"
        assert np.array_equal(vm.ram, peers.memory(guest))


async def refused_to_qemu(uri: str, vm: Qemu, config: Config, words: str) -> str:
    """The attempt fails with *words* in the error; the guest runs on; returns QEMU's error.

    A QEMU 7.2 whose handshake fails reports that and stays; one that fails after the handshake exits.
    """
    with peers.source() as guest:
        with pytest.raises(trimig.TransportFailed, match=words) as caught:
            await trimig.migrate(guest, uri, fast(config))
        assert caught.value.owner is trimig.Ownership.SOURCE
        assert guest.run_state == "running"
    while True:
        said = vm.stderr_text()
        if said.endswith("\n"):
            break
        await trio.sleep(0.01)
    assert not any(event["event"] == "RESUME" for event in vm.qmp.events)
    return said


@asynccontextmanager
async def keeping_on(guest: trimig.Guest, config: Config, uri: str, words: str) -> AsyncIterator[peers.Arrival]:
    """A receiver that drops the connection of the block, and listens on; when it is ended, its error has the reason.

    The reason of each drop must have one of *words*, which are separated by ``|``.
    """
    dropped: list[str] = []

    def note(event: trimig.Event) -> None:
        if event.name == "CONNECTION_DROPPED":
            dropped.append(event.data["reason"])

    async with peers.arriving(guest, config, uri=uri) as arrival:
        arrival.monitor.add_listener(note)
        yield arrival
        while not dropped:
            await arrival.monitor.wait_changed()
        assert any(word in dropped[0] for word in words.split("|")), dropped
        assert not arrival.done.is_set()
        arrival.monitor.cancel("the test has seen the refusal")
        error = await arrival.error()
        assert isinstance(error, trimig.MigrationCancelled)
        assert dropped[0] in str(error)
    assert guest.run_state != "running"


async def from_qemu(uri: str, config: Config, extra: list[str], words: str | None = None, **parameters: Any) -> None:
    """A QEMU sends its guest to trimig. With *words* QEMU is refused, and fails; trimig's error has *words*."""
    async with Qemu.start("none", "1M", extra=extra) as vm:
        peers.mix(vm.ram, seed=7)
        settings = {"tls-creds": ID, "max-bandwidth": 0, **parameters}
        # Without a return path all of so small a guest is in the sockets' buffers before the refusal.
        able = {"return-path": True}
        with peers.machine(running=False) as guest:
            if words is None:
                async with peers.arriving(guest, fast(config), uri=uri) as arrival:
                    await vm.migrate(arrival.uri, capabilities=able, parameters=settings, wait=False)
                    await arrival.summary()
                    await vm.wait_migration_status("completed")
                    assert np.array_equal(vm.ram, peers.memory(guest))
                    assert guest.run_state == "running"
                return
            async with keeping_on(guest, fast(config), uri, words) as arrival:
                await vm.migrate(arrival.uri, capabilities=able, parameters=settings, wait=False)
                await vm.wait_migration_status("failed", fail_on=())
                await vm.wait_status("running")


@rows
async def test_trimig_sends_to_qemu(row: Row, server: Path, client: Path, pki: Pki, tmp_path: Path) -> None:
    """A.1 rows 4, 5, 9-11, 14, 15, B17: T→Q."""
    config = secure(pki.anonymous() if row.anonymous else client, hostname=row.hostname)
    async with waiting(row.uri(tmp_path), x509(server, "server", verify=row.verify)) as (vm, uri):
        if row.works:
            await sent_to_qemu(uri, vm, config)
        else:
            await refused_to_qemu(uri, vm, config, row.client_says)


@rows
async def test_qemu_sends_to_trimig(row: Row, server: Path, client: Path, pki: Pki, tmp_path: Path) -> None:
    """A.1 rows 4, 5, 9-11, 14, 15, B17: Q→T."""
    directory = pki.anonymous() if row.anonymous else client
    await from_qemu(
        row.uri(tmp_path),
        secure(server, verify_peer=row.verify),
        x509(directory, "client"),
        None if row.works else row.server_says,
        **{"tls-hostname": row.hostname},
    )


@rows
async def test_trimig_sends_to_trimig(row: Row, server: Path, client: Path, pki: Pki, tmp_path: Path) -> None:
    """A.1 rows 4, 5, 9-11, 14, 15, B17: T→T."""
    config = secure(pki.anonymous() if row.anonymous else client, hostname=row.hostname)
    with peers.source() as guest, peers.machine(running=False) as there:
        uri, settings = row.uri(tmp_path), fast(secure(server, verify_peer=row.verify))
        if row.works:
            async with peers.arriving(there, settings, uri=uri) as arrival:
                summary = await trimig.migrate(guest, arrival.uri, fast(config))
                assert summary.confirmed
                await arrival.summary()
                assert np.array_equal(peers.memory(there), peers.memory(guest))
                assert there.run_state == "running"
            return
        async with keeping_on(there, settings, uri, row.server_says) as arrival:
            with pytest.raises(trimig.TransportFailed, match=row.client_says):
                await trimig.migrate(guest, arrival.uri, fast(config))
        assert guest.run_state == "running"


@pytest.mark.parametrize("friendly", [True, False])
async def test_qemu_is_let_in_by_its_name_or_not(server: Path, client: Path, *, friendly: bool) -> None:
    """A.1 rows 12, 13: Q→T. The name is the one that a QEMU as the server prints for the same client."""
    async with waiting(
        TCP, [*x509(server, "server"), "-object", "authz-simple,id=who,identity=absent"], **{"tls-authz": "who"}
    ) as (vm, uri):
        said = await refused_to_qemu(uri, vm, secure(client), "the other side may not want TLS|reset|closed")
    name = said.partition("TLS x509 authz check for ")[2].partition(" is denied")[0]
    assert name.endswith("CN=host-a")
    identity = name if friendly else name.replace("host-a", "host-b")
    config = secure(server, AuthzSimple(id="who", identity=identity), authz="who")
    await from_qemu(TCP, config, x509(client, "client"), None if friendly else f"does not let '{name}' in")


async def test_plain_qemu_and_tls_do_not_hang_together(server: Path, client: Path) -> None:
    """Only one side uses TLS: an error on both sides, in either case."""
    with trio.fail_after(peers.LIMIT):
        async with peers.target() as (vm, uri):
            await refused_to_qemu(uri, vm, secure(client), "the other side may not want TLS")
        async with waiting(TCP, x509(server, "server")) as (vm, uri):
            await refused_to_qemu(uri, vm, Config(), "connection")
        await from_qemu(TCP, secure(server), [], "what the other side sends is not TLS", **{"tls-creds": ""})


# -- shared secrets ----------------------------------------------------------------------------------------------------

KEY = "00112233445566778899aabbccddeeff"


def psk(directory: Path, key: str = KEY) -> tuple[Config, Path]:
    """A configuration with that key, and the directory of the key."""
    directory.mkdir()
    (directory / "keys.psk").write_text(f"qemu:{key}\n")
    return Config(parameters=Parameters(tls_creds=ID), objects=(TlsPsk(id=ID, dir=directory),)), directory


def psk_object(directory: Path, endpoint: str) -> list[str]:
    return ["-object", f"tls-creds-psk,id={ID},dir={directory},endpoint={endpoint}"]


@needs_psk
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_shared_secret_works_with_qemu(scheme: str, tmp_path: Path) -> None:
    """A.1 rows 3, 7: T→Q and Q→T."""
    config, directory = psk(tmp_path / "keys")
    uri = TCP if scheme == "tcp" else f"unix:{tmp_path}/socket"
    async with waiting(uri, psk_object(directory, "server")) as (vm, where):
        await sent_to_qemu(where, vm, config)
    await from_qemu(uri, config, psk_object(directory, "client"))


@needs_psk
async def test_different_secrets_are_refused(tmp_path: Path) -> None:
    """A.1 row 8: T→Q and Q→T."""
    config, _ = psk(tmp_path / "ours")
    _, directory = psk(tmp_path / "theirs", "ff" * 16)
    async with waiting(TCP, psk_object(directory, "server")) as (vm, uri):
        await refused_to_qemu(uri, vm, config, "no TLS with|TLS alert")
    await from_qemu(TCP, config, psk_object(directory, "client"), "no TLS with")
