"""Finding QEMUs by the version that they report, below any root, under any name."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trio

from tests.qemu import installed
from tests.qemu.harness import Installed, Qemu, random_ram
from tests.qemu.installed import BrokenRoot

LIMIT = 60.0


def fake(root: Path, version: str, *, where: str = "usr/bin", script: str = "") -> Path:
    """A root whose QEMU is a script that names its version."""
    path = root / where / "qemu-system-x86_64"
    path.parent.mkdir(parents=True)
    say = f"echo 'QEMU emulator version {version}'"
    path.write_text(f"#!/bin/sh\n{script or say}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of roots, and no other QEMU."""
    monkeypatch.setenv("TRIMIG_QEMU_ROOTS", str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("TRIMIG_TEST_QEMU", raising=False)
    return tmp_path


def test_versions_are_what_each_says_and_not_what_its_directory_is_called(roots: Path) -> None:
    fake(roots / "10.0", "9.2.50 (v9.2.0-1234)")
    fake(roots / "whatever", "12.1.0", where="usr/local/bin")
    (roots / "10.0.log").write_text("not a root")
    (roots / "empty").mkdir()
    fake(roots / "part", "5.0.0")  # an unfinished root
    found = installed.installed()
    assert list(found) == ["9.2", "12.1"]
    assert [qemu.full for qemu in found.values()] == ["9.2.50", "12.1.0"]
    assert installed.versions() == ["7.2", "9.2", "10.0", "11.1", "12.1"]
    assert installed.default() == found["9.2"]
    assert installed.choose("12.1").numbers == (12, 1)
    with pytest.raises(FileNotFoundError, match=r"no QEMU 7\.2 on this machine, only 9\.2, 12\.1"):
        installed.choose("7.2")


def test_installed_one_comes_first_and_another_can_be_named(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake(roots / "elsewhere" / "deep", "8.1.2")
    fake(roots / "same", "8.1.0")
    fake(roots / "older", "7.0.0")
    monkeypatch.setenv("PATH", str(path.parent))
    assert installed.choose(None).full == "8.1.2"
    assert installed.installed()["8.1"].full == "8.1.2"
    for name, full in (("7.0", "7.0.0"), ("8.1", "8.1.2"), (str(path), "8.1.2")):
        monkeypatch.setenv("TRIMIG_TEST_QEMU", name)
        assert installed.choose(None).full == full
    monkeypatch.setenv("TRIMIG_TEST_QEMU", "qemu-of-nowhere")
    assert installed.default() is None
    with pytest.raises(FileNotFoundError, match="no qemu-system-x86_64"):
        installed.choose(None)


@pytest.mark.parametrize(("script", "said"), [("echo bang >&2; exit 3", "exits with 3 and says: bang"), ("", "")])
def test_root_whose_qemu_does_not_start_is_an_error_that_says_so(roots: Path, script: str, said: str) -> None:
    path = fake(roots / "broken", "", script=script or "true")
    if not script:
        path.write_bytes(b"\x7fELF but no program")
        said = "does not start"
    with pytest.raises(BrokenRoot, match=said) as caught:
        installed.installed()
    assert str(path) in str(caught.value)


def test_root_without_its_loader_is_an_error_that_names_it(roots: Path) -> None:
    path = fake(roots / "bare", "")
    shutil.copy("/proc/self/exe", path)
    with pytest.raises(BrokenRoot, match=r"needs /lib.*ld.*, which .*bare does not have"):
        installed.installed()


def test_links_of_a_root_lead_to_places_below_it(roots: Path) -> None:
    path = fake(roots / "linked", "8.2.1", where="usr/libexec")
    (roots / "linked/usr/bin").symlink_to("/usr/away")
    (roots / "linked/usr/away").symlink_to("../../../usr/libexec")
    found = installed.installed()
    assert found["8.2"].command == (str(roots / "linked/usr/libexec/qemu-system-x86_64"),)
    assert path.exists()
    (roots / "linked/usr/away").unlink()
    (roots / "linked/usr/away").symlink_to("away")  # a circle
    installed._look.cache_clear()
    assert installed.installed() == {}


def test_libraries_that_one_program_has_for_itself_are_those_of_the_root(tmp_path: Path) -> None:
    """A library path of the root, /usr/lib/own, is a link: it means the root's directory, not this machine's."""
    for name in ("usr/lib/libown.so.1", "usr/lib/own/libhelp-1.1.so", "usr/lib/data/text"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert installed._libraries(tmp_path) == [tmp_path / "usr/lib", tmp_path / "usr/lib/own"]


# -- those that there are ----------------------------------------------------------------------------------------------


@pytest.mark.qemu
async def test_each_is_what_its_monitor_says(qemu: Installed) -> None:
    async with Qemu.start("none", "16M", version=qemu.version) as vm:
        said = vm.qmp.greeting["version"]["qemu"]
        assert qemu.full == f"{said['major']}.{said['minor']}.{said['micro']}"
        assert vm.installed == qemu


@pytest.mark.qemu
async def test_postcopy_and_files_work_with_each(qemu: Installed, tmp_path: Path) -> None:
    """The machines of the harness support postcopy too; sockets and files have the same form for both sides."""
    capabilities = {"postcopy-ram": True}
    with trio.fail_after(LIMIT):
        async with (
            Qemu.start("none", "16M", version=qemu.version) as source,
            Qemu.start("none", "16M", version=qemu.version, incoming="defer") as destination,
        ):
            source.ram[:] = random_ram(16 << 20, seed=4)
            await destination.set_capabilities(capabilities)
            uri = await destination.incoming(f"unix:{tmp_path}/socket")
            slow = {"max-bandwidth": 1 << 20, "downtime-limit": 1}
            await source.migrate(uri, capabilities=capabilities, parameters=slow, wait=False)
            await source.qmp.execute("migrate-start-postcopy")
            await source.wait_migration_status("completed")
            await destination.wait_migration_status("completed")
            assert "postcopy-active" in source.migration_statuses()
            assert np.array_equal(source.ram, destination.ram)
        async with Qemu.start("none", "16M", version=qemu.version) as source:
            await source.migrate(f"exec:cat > {tmp_path}/stream")
            with trio.fail_after(LIMIT):
                await _begins(tmp_path / "stream", b"QEVM")


async def _begins(path: Path, start: bytes) -> None:
    """Wait until that file has those first bytes: the command writes the file a little later than QEMU has
    completed."""
    while True:
        if await trio.Path(path).exists() and (await trio.Path(path).read_bytes()).startswith(start):
            return
        await trio.sleep(0.01)


def _names(found: Sequence[str]) -> list[str]:
    return [version for version in installed.WANTED if version in found]


@pytest.mark.qemu
def test_versions_that_the_project_names_are_those_of_the_roots() -> None:
    """If the variable names roots, both are found, and no version twice."""
    found = list(installed.installed())
    assert len(found) == len(set(found))
    if (Path(os.environ.get("TRIMIG_QEMU_ROOTS", installed.ROOTS)) / "11.1").is_dir():
        assert _names(found)[-2:] == ["10.0", "11.1"]
