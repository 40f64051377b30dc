"""Fixtures of the tests against a real QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.conftest import missing_qemu
from tests.qemu import installed
from tests.qemu.bootsector import boot_sector
from tests.qemu.harness import Installed, Machine, write_capture

_MACHINES: tuple[Machine, ...] = ("none", "pc", "q35", "microvm")


@pytest.fixture(params=installed.versions())
def qemu(request: pytest.FixtureRequest) -> Installed:
    """Each version of QEMU in turn; skips a version that this machine does not have, or fails in CI."""
    version: str = request.param
    found = installed.installed().get(version)
    missing_qemu(found, os.environ, version)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def captures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By machine type, a file with the whole stream that QEMU sends to a file or pipe.

    ``none``: 16 MiB, a part of it random; ``pc`` and ``q35``: saved while the boot sector counts; ``microvm``: in its
    firmware. The RAM block is ``m0`` in each. Made once per session; treat them as read-only.
    """
    directory = tmp_path_factory.mktemp("captures")
    paths = {str(machine): directory / f"{machine}.qemu" for machine in _MACHINES}

    async def make(machine: Machine) -> None:
        boot = boot_sector() if machine in ("pc", "q35") else None
        await write_capture(paths[machine], machine, boot=boot)

    async def make_all() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for machine in _MACHINES:
                    nursery.start_soon(make, machine)

    trio.run(make_all)
    return paths
