"""multifd with TLS on each connection: rows 27 to 33 of qemu-tests.md A.1, in both directions.

QEMU tests the same rows without multifd; :mod:`tests.qemu.test_tls` has these. A destination that refuses the source's
connections waits on, and the guest runs on at the source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import trimig
from tests.qemu import peers, test_tls
from tests.qemu.harness import Qemu
from tests.qemu.installed import versions
from tests.qemu.test_multifd_source import SIZE, config, waiting
from tests.qemu.test_tls import NAMES, TCP, Row, keeping_on, needs_psk, psk, psk_object, x509
from tests.transport.pki import ID, Pki, secure

pytestmark = pytest.mark.qemu

_NAMES: Final[Mapping[str, str]] = {
    "29 default host": "9 tcp, default host",
    "30 override host": "10 tcp, override host",
    "31 mismatch host": "11 tcp, mismatch host",
    "32 allow anonymous client": "14 tcp, allow anonymous client",
    "33 reject anonymous client": "15 tcp, reject anonymous client",
}
rows = pytest.mark.parametrize("row", [test_tls.ROWS[name] for name in _NAMES.values()], ids=list(_NAMES))
each = pytest.mark.parametrize(
    "version", [pytest.param(v, marks=() if v == versions()[-1] else (pytest.mark.full,)) for v in versions()]
)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def with_tls(version: str, tls: trimig.Config) -> trimig.Config:
    """A configuration with three data channels, and the credentials of *tls*."""
    ours, theirs = config(version, channels=3), tls.parameters
    parameters = ours.parameters.replace(tls_creds=theirs.tls_creds, tls_hostname=theirs.tls_hostname)
    return dataclasses.replace(ours, parameters=parameters, objects=tls.objects)


async def to_qemu(version: str, ours: trimig.Config, extra: list[str], words: str | None = None) -> None:
    """With *words*: the attempt fails with them in the error, and the guest runs on."""
    monitor = trimig.Monitor()
    with peers.source(SIZE) as guest:
        async with waiting(version, ours, extra=tuple(extra), uri=TCP) as (vm, uri):
            if words is None:
                assert (await trimig.migrate(guest, uri, ours, monitor=monitor)).confirmed
                assert await vm.wait_status("running", "paused") == "running"
                assert np.array_equal(vm.ram, peers.memory(guest))
                assert monitor.counters.multifd_bytes > SIZE // 8
                return
            with pytest.raises(trimig.TransportFailed, match=words) as caught:
                await trimig.migrate(guest, uri, ours)
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
            assert not any(event["event"] == "RESUME" for event in vm.qmp.events)


async def from_qemu(
    version: str, ours: trimig.Config, extra: list[str], words: str | None = None, **parameters: Any
) -> None:
    """With *words*: QEMU is refused with one of them, and fails; trimig waits on."""
    able = {"return-path": True, "multifd": True}
    settings = {"tls-creds": ID, "max-bandwidth": 0, "multifd-channels": 3, **parameters}
    async with Qemu.start("none", f"{SIZE >> 20}M", version=version, extra=extra) as vm:
        peers.mix(vm.ram, seed=7)
        with peers.machine(SIZE, running=False) as guest:
            if words is None:
                async with peers.arriving(guest, ours, uri=TCP) as arrival:
                    await vm.migrate(arrival.uri, capabilities=able, parameters=settings, wait=False)
                    summary = await arrival.summary()
                    await vm.wait_migration_status("completed")
                assert np.array_equal(vm.ram, peers.memory(guest))
                assert summary.data_channels == 3
                return
            async with keeping_on(guest, ours, TCP, words) as arrival:
                await vm.migrate(arrival.uri, capabilities=able, parameters=settings, wait=False)
                await vm.wait_migration_status("failed", fail_on=())
                await vm.wait_status("running")


@each
@rows
async def test_trimig_sends_to_qemu(version: str, row: Row, pki: Pki) -> None:
    """A.1 rows 29 to 33, B17, S13: T→Q."""
    client = pki.anonymous() if row.anonymous else pki.make("client", "source.example", common_name="host-a")
    ours = with_tls(version, secure(client, hostname=row.hostname))
    extra = x509(pki.make("server", *NAMES), "server", verify=row.verify)
    await to_qemu(version, ours, extra, None if row.works else row.client_says)


@each
@rows
async def test_qemu_sends_to_trimig(version: str, row: Row, pki: Pki) -> None:
    """A.1 rows 29 to 33, B17, S13: Q→T."""
    client = pki.anonymous() if row.anonymous else pki.make("client", "source.example", common_name="host-a")
    ours = with_tls(version, secure(pki.make("server", *NAMES), verify_peer=row.verify))
    words = None if row.works else row.server_says
    await from_qemu(version, ours, x509(client, "client"), words, **{"tls-hostname": row.hostname})


@needs_psk
@each
async def test_shared_secret(version: str, tmp_path: Path) -> None:
    """A.1 row 27: T→Q and Q→T."""
    secret, directory = psk(tmp_path / "keys")
    await to_qemu(version, with_tls(version, secret), psk_object(directory, "server"))
    await from_qemu(version, with_tls(version, secret), psk_object(directory, "client"))


@needs_psk
@each
async def test_different_secrets_are_refused(version: str, tmp_path: Path) -> None:
    """A.1 row 28: T→Q and Q→T."""
    secret, _ = psk(tmp_path / "ours")
    _, directory = psk(tmp_path / "theirs", "ff" * 16)
    await to_qemu(version, with_tls(version, secret), psk_object(directory, "server"), "no TLS with|TLS alert")
    await from_qemu(version, with_tls(version, secret), psk_object(directory, "client"), "no TLS with")
